#include "openvino_api.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace pyserve::openvino {
namespace {

template <class Function>
void find(void* library, const char* name, Function*& function) {
    function = reinterpret_cast<Function*>(dlsym(library, name));
    if (function == nullptr) {
        throw std::runtime_error(std::string("OpenVINO's library has no ") + name +
                                 ": it is of a version that pyserve does not know; pip install 'pyserve[openvino]'");
    }
}

}  // namespace

const Api& Api::of(const std::string& library) {
    static std::mutex mutex;
    static std::map<std::string, std::unique_ptr<const Api>>& opened =
        *new std::map<std::string, std::unique_ptr<const Api>>;
    const std::lock_guard lock(mutex);
    std::unique_ptr<const Api>& api = opened[library];
    if (!api) api.reset(new Api(library));
    return *api;
}

Api::Api(const std::string& library) {
    // Its own libraries lie beside it, and it knows that.
    void* opened = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (opened == nullptr) {
        const char* reason = dlerror();
        throw std::runtime_error(std::string("OpenVINO's library cannot be loaded: ") +
                                 (reason != nullptr ? reason : library.c_str()));
    }
    int (*create_core)(Core**) = nullptr;
    find(opened, "ov_core_create", create_core);
    find(opened, "ov_core_compile_model_from_file_props", core_compile);
    find(opened, "ov_compiled_model_inputs_size", inputs_size);
    find(opened, "ov_compiled_model_outputs_size", outputs_size);
    find(opened, "ov_compiled_model_input_by_index", input);
    find(opened, "ov_port_get_element_type", element_type_of);
    find(opened, "ov_port_get_partial_shape", partial_shape_of);
    find(opened, "ov_partial_shape_free", free_partial_shape);
    find(opened, "ov_output_const_port_free", free_port);
    find(opened, "ov_compiled_model_create_infer_request", create_request);
    find(opened, "ov_compiled_model_free", free_model);
    find(opened, "ov_infer_request_set_input_tensor_by_index", set_input);
    find(opened, "ov_infer_request_get_output_tensor_by_index", get_output);
    find(opened, "ov_infer_request_start_async", start);
    find(opened, "ov_infer_request_wait_for", wait_for);
    find(opened, "ov_infer_request_cancel", cancel);
    find(opened, "ov_infer_request_free", free_request);
    find(opened, "ov_tensor_create_from_host_ptr", tensor_on);
    find(opened, "ov_tensor_get_shape", shape_of);
    find(opened, "ov_shape_free", free_shape);
    find(opened, "ov_tensor_get_element_type", tensor_type);
    find(opened, "ov_tensor_get_byte_size", byte_size);
    find(opened, "ov_tensor_data", data);
    find(opened, "ov_tensor_free", free_tensor);
    find(opened, "ov_get_last_err_msg", last_error_);
    find(opened, "ov_get_error_info", outcome_text_);
    check_element_types();
    check(create_core(&core_), "OpenVINO cannot be started");
}

// The numbers of element types were shifted by one between versions; sizes of tensors of each tell which these are.
void Api::check_element_types() const {
    const std::pair<int, size_t> expected[] = {{boolean, 1}, {bf16, 2}, {f16, 2}, {f32, 4}, {f64, 8},
                                               {i8, 1},      {i16, 2},  {i32, 4}, {i64, 8}, {u8, 1}};
    int64_t sizes[] = {8};
    uint64_t memory[8] = {};
    for (const auto& [type, size] : expected) {
        Tensor* made = nullptr;
        size_t bytes = 0;
        bool is_known = tensor_on(type, {1, sizes}, memory, &made) == ok;
        if (is_known) {
            const Owned<Tensor> tensor(made, free_tensor);
            is_known = byte_size(made, &bytes) == ok && bytes == 8 * size;
        }
        if (!is_known) {
            throw std::runtime_error(
                "OpenVINO's library numbers its types in a way that pyserve does not know; pip install "
                "'pyserve[openvino]'");
        }
    }
}

void Api::check(int outcome, const char* doing) const {
    if (outcome == ok) return;
    const char* message = last_error_();
    std::string text = message != nullptr && *message != '\0' ? message : outcome_text_(outcome);
    throw std::runtime_error(std::string(doing) + ": " + text);
}

}  // namespace pyserve::openvino
