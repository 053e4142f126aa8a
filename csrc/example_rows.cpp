#include "example_rows.h"

#include <ATen/CPUGeneratorImpl.h>

#include <algorithm>

namespace pyserve {
namespace {

constexpr uint64_t seed = 20;

at::Tensor like(const at::Tensor& example, const at::Generator& generator) {
    if (example.numel() == 0) return example.clone();
    if (example.is_floating_point()) {
        const double scale = std::max(1.0, example.abs().max().item<double>());
        return (at::randn(example.sizes(), generator, example.options().dtype(at::kFloat)) * scale)
            .to(example.scalar_type());
    }
    const at::Tensor places = at::randint(0, example.numel(), {example.numel()}, generator, at::kLong);
    return example.reshape({-1}).index_select(0, places).reshape(example.sizes());
}

}  // namespace

std::vector<Inputs> rows_like(const Inputs& example, size_t count) {
    const at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
    std::vector<Inputs> rows(count);
    for (Inputs& row : rows) {
        for (const at::Tensor& input : example) row.push_back(like(input, generator));
    }
    return rows;
}

bool are_alike(const std::vector<Inputs>& rows) {
    for (size_t row = 1; row < rows.size(); ++row) {
        for (size_t i = 0; i < rows[row].size(); ++i) {
            if (!rows[row][i].equal(rows[0][i])) return false;
        }
    }
    return true;
}

}  // namespace pyserve
