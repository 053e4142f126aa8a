// A batch's output as rows of plain numbers, which are answers or what answers are made of. No Python.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <utility>

#include "tensors.h"

namespace pyserve {

// How a batch's output is cut into rows.
struct RowCut {
    at::Tensor output;
    const char* bytes;
    size_t size;
    std::string head;  // the kind, as in Python's struct, and the sizes: "f16", "q3,224"

    static char kind_of(at::ScalarType type) {
        switch (type) {
            case at::kFloat: return 'f';
            case at::kDouble: return 'd';
            case at::kChar: return 'b';
            case at::kShort: return 'h';
            case at::kInt: return 'i';
            case at::kLong: return 'q';
            case at::kByte: return 'B';
            case at::kBool: return '?';
            default: return '\0';
        }
    }

    at::IntArrayRef shape() const { return output.sizes().slice(1); }  // of a row

    // Whether each number of a row has a word in JSON, and there are some.
    bool has_words(const char* row) const {
        if (size == 0) return false;
        switch (output.scalar_type()) {
            case at::kFloat: return are_finite<float>(row);
            case at::kDouble: return are_finite<double>(row);
            default: return true;
        }
    }
    // A row's JSON is at most as long, in the layout that takes most room, without what may stand around it.
    size_t text_size_max() const {
        constexpr size_t number_size = 32, indent = 2, levels_around = 4;
        const auto depth = static_cast<size_t>(output.dim()) + levels_around;
        // Each number, and as often each bracket around it, may have a line of its own.
        const size_t line = number_size + indent * depth;
        const size_t count = output.dim() > 0 && output.size(0) > 0 ? output.numel() / output.size(0) : 0;
        return count * line * (1 + 2 * static_cast<size_t>(output.dim()));
    }

    static std::optional<RowCut> of(const c10::IValue& value, size_t count) {
        if (!value.isTensor() || count == 0) return {};
        at::Tensor output = value.toTensor();
        const char kind = output.defined() ? kind_of(output.scalar_type()) : '\0';
        if (kind == '\0' || output.layout() != at::kStrided || !output.device().is_cpu() || output.dim() < 1 ||
            static_cast<size_t>(output.size(0)) != count)
            return {};
        output = output.resolve_neg().contiguous();  // negated by a mark only, which its memory does not show
        std::string head(1, kind);
        for (int64_t i = 1; i < output.dim(); ++i) head += (i > 1 ? "," : "") + std::to_string(output.size(i));
        const auto* bytes = static_cast<const char*>(output.const_data_ptr());
        const size_t size = output.nbytes() / count;
        return RowCut{std::move(output), bytes, size, std::move(head)};
    }

  private:
    template <class T>
    bool are_finite(const char* row) const {
        for (const char* const end = row + size; row < end; row += sizeof(T)) {
            T value;
            std::memcpy(&value, row, sizeof value);
            if (!std::isfinite(value)) return false;
        }
        return true;
    }
};

}  // namespace pyserve
