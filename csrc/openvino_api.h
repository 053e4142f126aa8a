// OpenVINO's C library, found at run time: the extension is built without it, and runs without it until a model asks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace pyserve::openvino {

// Opaque ones of the library.
struct Core;
struct CompiledModel;
struct InferRequest;
struct Tensor;
struct Port;

struct Shape {
    int64_t rank;
    int64_t* sizes;
};

struct Range {
    int64_t min;
    int64_t max;  // -1 without one
};

struct PartialShape {
    Range rank;
    Range* sizes;
};

struct Property {
    const char* key;
    const void* value;  // a text, for all that are used here
};

// Values of the library's own enumerations. Those of element types have changed once: see Api::check_element_types.
enum Outcome : int { ok = 0, not_ready = -9 };
enum ElementType : int {
    boolean = 1,
    bf16 = 2,
    f16 = 3,
    f32 = 4,
    f64 = 5,
    i8 = 7,
    i16 = 8,
    i32 = 9,
    i64 = 10,
    u8 = 16,
};

// The functions that are used. Any thread.
class Api {
  public:
    // Opens the library at the first call for its path.
    // Throws std::runtime_error: it cannot be opened, or is of a version that is not known here.
    static const Api& of(const std::string& library);

    // Throws std::runtime_error with what the library says about it, unless `outcome` is ok.
    void check(int outcome, const char* doing) const;
    // The process's only one: it holds the plugins. Never freed, as threads may still be in it when the process ends.
    Core* core() const { return core_; }

    int (*core_compile)(const Core*, const char* path, const char* device, size_t count, const Property*,
                        CompiledModel**) = nullptr;
    int (*inputs_size)(const CompiledModel*, size_t*) = nullptr;
    int (*outputs_size)(const CompiledModel*, size_t*) = nullptr;
    int (*input)(const CompiledModel*, size_t, Port**) = nullptr;
    int (*element_type_of)(const Port*, int*) = nullptr;
    int (*partial_shape_of)(const Port*, PartialShape*) = nullptr;
    void (*free_partial_shape)(PartialShape*) = nullptr;
    void (*free_port)(Port*) = nullptr;
    int (*create_request)(const CompiledModel*, InferRequest**) = nullptr;
    void (*free_model)(CompiledModel*) = nullptr;
    int (*set_input)(InferRequest*, size_t, const Tensor*) = nullptr;
    int (*get_output)(const InferRequest*, size_t, Tensor**) = nullptr;
    int (*start)(InferRequest*) = nullptr;
    int (*wait_for)(InferRequest*, int64_t ms) = nullptr;
    int (*cancel)(InferRequest*) = nullptr;
    void (*free_request)(InferRequest*) = nullptr;
    int (*tensor_on)(int type, Shape, void*, Tensor**) = nullptr;
    int (*shape_of)(const Tensor*, Shape*) = nullptr;
    int (*free_shape)(Shape*) = nullptr;
    int (*tensor_type)(const Tensor*, int*) = nullptr;
    int (*byte_size)(const Tensor*, size_t*) = nullptr;
    int (*data)(const Tensor*, void**) = nullptr;
    void (*free_tensor)(Tensor*) = nullptr;

  private:
    explicit Api(const std::string& library);
    void check_element_types() const;

    const char* (*last_error_)() = nullptr;
    const char* (*outcome_text_)(int) = nullptr;
    Core* core_ = nullptr;
};

// What the library gave, given back to it in the end.
template <class T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

}  // namespace pyserve::openvino
