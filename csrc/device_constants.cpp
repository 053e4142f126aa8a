#include "device_constants.h"

#include <algorithm>
#include <string>

namespace pyserve {
namespace {

using torch::jit::Block;
using torch::jit::Module;
using torch::jit::Node;

// Without an index it is whichever device of its kind is current, and that is the model's.
bool is_same(c10::Device named, c10::Device device) {
    return named.type() == device.type() && (!named.has_index() || named.index() == device.index());
}

bool is_compared(const Node& constant) {
    return std::any_of(constant.output()->uses().begin(), constant.output()->uses().end(), [](const auto& use) {
        return use.user->kind() == c10::aten::eq || use.user->kind() == c10::aten::ne;
    });
}

template <class Visit>
void visit_nodes(Block* block, const Visit& visit) {
    for (Node* node : block->nodes()) {
        visit(*node);
        for (Block* inner : node->blocks()) visit_nodes(inner, visit);
    }
}

// All nodes of all functions that came with the module, those of classes and of functions that it calls too.
template <class Visit>
void visit_nodes(const Module& module, const Visit& visit) {
    for (torch::jit::Function* function : module._ivalue()->compilation_unit()->get_functions()) {
        if (function->isGraphFunction()) visit_nodes(torch::jit::toGraphFunction(*function).graph()->block(), visit);
    }
}

// Calls `visit(device, rename)` for each device that is named.
template <class Visit>
void visit_devices(const Module& module, const Visit& visit) {
    visit_nodes(module, [&](Node& node) {
        if (node.kind() != c10::prim::Constant || node.outputs().size() != 1 || node.mustBeNone()) return;
        if (node.output()->type()->kind() != c10::TypeKind::DeviceObjType || is_compared(node)) return;
        visit(c10::Device(node.s(c10::attr::value)), [&](c10::Device to) { node.s_(c10::attr::value, to.str()); });
    });
    for (const Module& each : module.modules()) {
        for (const auto& attribute : each.named_attributes(/*recurse=*/false)) {
            if (!attribute.value.isDevice()) continue;
            visit(attribute.value.toDevice(), [&](c10::Device to) { Module(each).setattr(attribute.name, to); });
        }
    }
}

}  // namespace

bool names_other_devices(const Module& module, c10::Device device) {
    bool found = false;
    visit_devices(module, [&](c10::Device named, const auto&) { found = found || !is_same(named, device); });
    return found;
}

bool has_branches(const Module& module) {
    bool found = false;
    visit_nodes(module, [&](const Node& node) {
        found = found || node.kind() == c10::prim::If || node.kind() == c10::prim::Loop;
    });
    return found;
}

bool has_forks(const Module& module) {
    bool found = false;
    visit_nodes(module, [&](const Node& node) { found = found || node.kind() == c10::prim::fork; });
    return found;
}

void rename_devices(Module& module, std::optional<c10::Device> from, c10::Device to) {
    visit_devices(module, [&](c10::Device named, const auto& rename) {
        if (!is_same(named, to) && (!from.has_value() || is_same(named, *from))) rename(to);
    });
}

}  // namespace pyserve
