#include "finite_flow.h"

#include <torch/csrc/jit/ir/constants.h>
#include <torch/csrc/jit/ir/ir.h>

#include <cmath>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "tensors.h"

namespace pyserve {
namespace {

using torch::jit::Block;
using torch::jit::Node;
using torch::jit::Value;

// Of ordinary numbers they make finite ones: sums of products with weights, numbers moved elsewhere, bounded functions.
// That sums do not overflow is tried with numbers at the limit of what counts as ordinary.
const std::unordered_set<std::string>& finite_operators() {
    // clang-format off
    static const std::unordered_set<std::string> names = {
        "_convolution", "conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
        "conv_transpose3d", "linear", "addmm", "matmul", "bmm", "mm", "baddbmm", "einsum", "batch_norm", "group_norm",
        "layer_norm", "instance_norm", "relu", "relu_", "relu6", "relu6_", "leaky_relu", "leaky_relu_", "elu", "elu_",
        "selu", "selu_", "celu", "celu_", "prelu", "gelu", "gelu_", "silu", "silu_", "mish", "mish_", "hardtanh",
        "hardtanh_", "hardsigmoid", "hardsigmoid_", "hardswish", "hardswish_", "sigmoid", "sigmoid_", "tanh", "tanh_",
        "softplus", "softsign", "softmax", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
        "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
        "adaptive_max_pool2d", "adaptive_max_pool3d", "add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "neg", "abs",
        "maximum", "minimum", "max", "min", "amax", "amin", "mean", "sum", "clamp", "clamp_", "clamp_min", "clamp_max",
        "cat", "concat", "stack", "chunk", "split", "split_with_sizes", "tensor_split", "unbind", "slice", "select",
        "narrow", "view", "view_as", "reshape", "flatten", "unflatten", "permute", "transpose", "t", "movedim",
        "contiguous", "expand", "expand_as", "repeat", "squeeze", "unsqueeze", "pad", "constant_pad_nd",
        "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d", "zeros", "ones", "zeros_like",
        "ones_like", "arange", "clone", "detach", "dropout", "dropout_", "feature_dropout", "upsample_nearest2d",
        "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest1d", "upsample_linear1d", "pixel_shuffle",
        "pixel_unshuffle", "channel_shuffle", "grid_sampler", "embedding", "gather", "index_select", "roll", "flip",
        "scaled_dot_product_attention", "copy_", "fill_", "zero_", "index", "full", "full_like", "new_full",
        "new_zeros", "new_ones", "tensor", "scalar_tensor", "where", "masked_fill", "masked_fill_", "eq", "ne", "lt",
        "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "bitwise_not", "bitwise_and", "bitwise_or", "argmax",
        "argmin", "triu", "tril", "cumsum", "one_hot", "type_as", "broadcast_tensors", "empty", "empty_like",
    };
    // clang-format on
    return names;
}

// Kernels that oneDNN has versions of, which treat NaN and infinities in their own way.
bool is_kernel_of_onednn(const std::string& name) {
    for (const char* part :
         {"conv", "relu", "pool", "hard", "clamp", "sigmoid", "tanh", "gelu", "elu", "silu", "swish"}) {
        if (name.find(part) != std::string::npos) return true;
    }
    return false;
}

bool is_finite_constant(const Node* node) {
    const auto value = torch::jit::toIValue(node->output());
    if (!value) return true;
    if (value->isDouble()) return std::isfinite(value->toDouble());
    if (!value->isTensor()) return true;
    const at::Tensor tensor = value->toTensor();
    if (!tensor.defined() || !tensor.is_floating_point() || tensor.numel() == 0) return true;
    return at::isfinite(tensor).all().item().toBool();
}

// A number by which may be divided.
bool is_nonzero_constant(const Value* value) {
    const auto constant = torch::jit::toIValue(value);
    if (!constant) return false;
    if (constant->isInt()) return constant->toInt() != 0;
    if (constant->isDouble()) return std::abs(constant->toDouble()) > 1e-30;
    if (!constant->isTensor() || constant->toTensor().is_complex()) return false;
    return constant->toTensor().to(at::kDouble).abs().gt(1e-30).all().item().toBool();
}

class Flow {
  public:
    std::string run(Block* block) {
        size_t before = 0;
        do {
            before = origins_.size();
            walk(block);
        } while (found_.empty() && origins_.size() != before);
        return found_;
    }

  private:
    void walk(Block* block) {
        for (Node* node : block->nodes()) {
            if (!found_.empty()) return;
            visit(node);
        }
    }

    void mark(const Value* value, const std::string& origin) { origins_.emplace(value, origin); }

    const std::string* origin_of_inputs(const Node* node) const {
        for (const Value* input : node->inputs()) {
            const auto known = origins_.find(input);
            if (known != origins_.end()) return &known->second;
        }
        return nullptr;
    }

    void visit(Node* node) {
        const std::string name = node->kind().toUnqualString();
        if (node->kind() == c10::prim::Constant) {
            if (!is_finite_constant(node))
                mark(node->output(),
                     node->output()->type()->kind() == c10::TypeKind::TensorType ? "weights" : "infinity");
            return;
        }
        for (Block* inner : node->blocks()) visit_block(node, inner);
        const std::string* origin = origin_of_inputs(node);
        if (origin != nullptr && is_kernel_of_onednn(name)) {
            found_ = *origin;
            return;
        }
        const bool is_odd = makes_odd_numbers(node, name);
        if (origin == nullptr && !is_odd) return;
        const std::string own = origin != nullptr ? *origin : name;
        if (node->kind().is_aten() && name.size() > 1 && name.back() == '_') {
            // Other names of the tensor that it writes to are not followed.
            if (is_odd) {
                found_ = own;
                return;
            }
            mark(node->input(0), own);
        }
        for (const Value* output : node->outputs()) {
            if (holds_numbers(output)) mark(output, own);
        }
    }

    // What is not finite in a branch or loop may come out at every place of it.
    void visit_block(Node* node, Block* inner) {
        if (const std::string* origin = origin_of_inputs(node)) {
            for (const Value* input : inner->inputs()) mark(input, *origin);
        }
        walk(inner);
        for (const Value* output : inner->outputs()) {
            const auto known = origins_.find(output);
            if (known == origins_.end()) continue;
            for (const Value* outer : node->outputs()) mark(outer, known->second);
            for (const Value* input : inner->inputs()) mark(input, known->second);
        }
    }

    bool makes_odd_numbers(const Node* node, const std::string& name) const {
        if (!node->kind().is_aten()) return !node->kind().is_prim();
        bool gives_numbers = false;
        for (const Value* output : node->outputs()) gives_numbers |= holds_numbers(output);
        if (!gives_numbers) return false;
        if (finite_operators().count(name) != 0) return false;
        if (name == "div" || name == "div_") return !is_nonzero_constant(node->input(1));
        return !is_widening(node, name);
    }

    // Conversions to float32 or float64, which hold what other kinds hold.
    static bool is_widening(const Node* node, const std::string& name) {
        if (name == "float" || name == "double") return true;
        if (name != "to" || node->inputs().size() < 2) return false;
        const auto dtype = torch::jit::toIValue(node->input(1));
        return dtype && dtype->isInt() &&
               (dtype->toInt() == static_cast<int64_t>(at::kFloat) ||
                dtype->toInt() == static_cast<int64_t>(at::kDouble));
    }

    static bool holds_numbers(const Value* value) {
        switch (value->type()->kind()) {
            case c10::TypeKind::IntType:
            case c10::TypeKind::BoolType:
            case c10::TypeKind::StringType:
            case c10::TypeKind::NoneType:
            case c10::TypeKind::DeviceObjType: return false;
            case c10::TypeKind::ListType: {
                const auto element = value->type()->containedType(0)->kind();
                return element != c10::TypeKind::IntType && element != c10::TypeKind::BoolType;
            }
            default: return true;
        }
    }

    std::unordered_map<const Value*, std::string> origins_;  // may be odd -> the operator that made it so
    std::string found_;
};

}  // namespace

std::string may_hide_nan(const torch::jit::Module& module) {
    return Flow().run(module.get_method("forward").graph()->block());
}

}  // namespace pyserve
