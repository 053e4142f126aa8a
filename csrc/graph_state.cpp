#include "graph_state.h"

#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/passes/inliner.h>

#include <string>
#include <string_view>
#include <unordered_set>

namespace pyserve {
namespace {

using torch::jit::Block;
using torch::jit::Node;
using torch::jit::Value;

bool is_module(const Value* value) {
    const auto type = value->type()->cast<c10::ClassType>();
    return type && type->is_module();
}

bool may_hold_tensors(const Value* value) {
    switch (value->type()->kind()) {
        case c10::TypeKind::IntType:
        case c10::TypeKind::FloatType:
        case c10::TypeKind::BoolType:
        case c10::TypeKind::NumberType:
        case c10::TypeKind::StringType:
        case c10::TypeKind::NoneType:
        case c10::TypeKind::DeviceObjType: return false;
        default: return true;
    }
}

// Operators that may give back their input or a view of it although their schema does not say so.
bool gives_back_its_input(const std::string_view name) {
    for (const std::string_view each :
         {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "type_as", "meshgrid",
          "broadcast_tensors", "rrelu", "atleast_1d", "atleast_2d", "atleast_3d", "block_diag", "pad", "to_dense",
          "unsafe_chunk", "unsafe_split"}) {
        if (name == each) return true;
    }
    return false;
}

// Follows which values of a graph may look into the module's memory, until nothing new is found.
class Search {
  public:
    std::string run(Block* block) {
        do {
            has_grown_ = false;
            walk(block);
        } while (has_grown_ && found_.empty());
        return found_;
    }

  private:
    void mark(const Value* value) {
        if (marked_.insert(value).second) has_grown_ = true;
    }

    bool is_marked(const Value* value) const { return marked_.count(value) != 0 || is_module(value); }

    bool has_marked_input(const Node* node) const {
        for (const Value* input : node->inputs()) {
            if (is_marked(input)) return true;
        }
        return false;
    }

    void walk(Block* block) {
        for (Node* node : block->nodes()) {
            if (!found_.empty()) return;
            visit(node);
        }
    }

    void visit(Node* node) {
        const auto kind = node->kind();
        if (kind == c10::prim::SetAttr) {
            if (is_marked(node->input(0))) found_ = "forward sets the attribute " + node->s(c10::attr::name);
            return;
        }
        if (kind == c10::prim::GetAttr) {
            if (is_marked(node->input(0)) && !is_module(node->output())) mark(node->output());
            return;
        }
        if (kind == c10::prim::Constant) {
            if (may_hold_tensors(node->output())) mark(node->output());  // a weight, once the module is frozen
            return;
        }
        if (kind == c10::prim::CallMethod || kind == c10::prim::CallFunction || kind == c10::prim::fork ||
            kind == c10::prim::awaitable) {
            if (has_marked_input(node)) found_ = "forward makes a call that cannot be followed";
            return;
        }
        if (kind == c10::prim::Loop) return visit_loop(node);
        if (kind == c10::prim::If) return visit_if(node);
        for (Block* inner : node->blocks()) visit_other_block(node, inner);
        if (std::string_view(kind.toUnqualString()) == "manual_seed") {
            found_ = seeded_state;
            return;
        }
        if (std::string_view(kind.toUnqualString()).find("_nested_tensor") != std::string_view::npos) {
            found_ = nested_state;
            return;
        }
        if (const auto* schema = node->maybeSchema()) {
            visit_operator(node, *schema);
        } else if (has_marked_input(node)) {
            for (const Value* output : node->outputs()) mark(output);
        }
    }

    // node: count, condition, carried values; block: index, carried values -> condition, carried values.
    void visit_loop(Node* node) {
        Block* body = node->blocks()[0];
        const size_t count = node->outputs().size();
        for (size_t i = 0; i < count; ++i) {
            if (is_marked(node->input(i + 2)) || is_marked(body->outputs()[i + 1])) mark(body->inputs()[i + 1]);
        }
        walk(body);
        for (size_t i = 0; i < count; ++i) {
            if (is_marked(node->input(i + 2)) || is_marked(body->outputs()[i + 1])) mark(node->output(i));
        }
    }

    void visit_if(Node* node) {
        for (Block* branch : node->blocks()) {
            walk(branch);
            for (size_t i = 0; i < node->outputs().size(); ++i) {
                if (is_marked(branch->outputs()[i])) mark(node->output(i));
            }
        }
    }

    // What goes in may come out at every place.
    void visit_other_block(const Node* node, Block* inner) {
        if (has_marked_input(node)) {
            for (const Value* input : inner->inputs()) mark(input);
        }
        walk(inner);
        for (const Value* output : inner->outputs()) {
            if (!is_marked(output)) continue;
            for (const Value* outer : node->outputs()) mark(outer);
        }
    }

    void visit_operator(const Node* node, const c10::FunctionSchema& schema) {
        const std::string_view name = node->kind().toUnqualString();
        const auto alias_of = [&](size_t i) {
            return i < schema.arguments().size() ? schema.arguments()[i].alias_info() : nullptr;
        };
        bool takes_marked = false;
        for (size_t i = 0; i < node->inputs().size(); ++i) {
            if (!is_marked(node->input(i))) continue;
            takes_marked = true;
            if (const auto* alias = alias_of(i); alias != nullptr && alias->isWrite()) {
                found_ = "forward writes to a buffer or weight of the model (" + std::string(name) + ")";
                return;
            }
        }
        if (!takes_marked) return;
        // Normalisations write their statistics without saying so in their schemas.
        if ((name == "batch_norm" || name == "_batch_norm_impl_index" || name == "instance_norm") &&
            writes_statistics(node)) {
            found_ = "forward updates the statistics of a normalisation (" + std::string(name) + ")";
            return;
        }
        for (size_t i = 0; i < node->inputs().size(); ++i) {
            // What is put into a list or dict may come out of it again.
            const auto* alias = alias_of(i);
            if (alias != nullptr && alias->isWrite() && may_hold_tensors(node->input(i)) &&
                node->input(i)->type()->kind() != c10::TypeKind::TensorType) {
                mark(node->input(i));
            }
        }
        for (size_t out = 0; out < node->outputs().size(); ++out) {
            if (gives_back_its_input(name)) mark(node->output(out));
            const auto* returned = out < schema.returns().size() ? schema.returns()[out].alias_info() : nullptr;
            for (size_t i = 0; returned != nullptr && i < node->inputs().size(); ++i) {
                if (is_marked(node->input(i)) && may_be_same(alias_of(i), *returned)) mark(node->output(out));
            }
        }
    }

    static bool may_be_same(const c10::AliasInfo* argument, const c10::AliasInfo& returned) {
        if (returned.isWildcardBefore() || returned.isWildcardAfter()) return true;
        if (argument == nullptr) return false;
        if (argument->isWildcardBefore() || argument->isWildcardAfter()) return true;
        for (const auto& set : returned.beforeSets()) {
            if (argument->beforeSets().count(set) != 0 || argument->afterSets().count(set) != 0) return true;
        }
        return false;
    }

    // input, weight, bias, mean, variance, is training, ...
    static bool writes_statistics(const Node* node) {
        if (node->inputs().size() < 6 || node->input(3)->type()->kind() == c10::TypeKind::NoneType) return false;
        const auto training = torch::jit::toIValue(node->input(5));
        return !training || !training->isBool() || training->toBool();
    }

    std::unordered_set<const Value*> marked_;
    bool has_grown_ = false;
    std::string found_;
};

}  // namespace

std::string written_state(const torch::jit::Module& module) {
    const auto graph = module.get_method("forward").graph()->copy();
    torch::jit::Inline(*graph);
    return Search().run(graph->block());
}

}  // namespace pyserve
