"""Which constants of a compiled package a call may change or give away, as its source shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyserve.proof.package_writes import written_constants

GOLDEN = Path(__file__).parents[1] / "golden" / "packages"
GPU_KERNEL = """
template <typename in_ptr0_type_, typename out_ptr0_type_, typename kernels_type_>
static inline void call_triton_poi_0(
    const in_ptr0_type_& in_ptr0,
    const out_ptr0_type_& out_ptr0,
    int64_t xnumel,
    kernels_type_& kernels_
) {
"""


def written(*statements: str, before: str = "") -> tuple[str, ...]:
    lines = ["[[maybe_unused]] auto& weight = constants_->at(0);", "[[maybe_unused]] auto& kept = constants_->at(1);"]
    return written_constants("\n".join([before, *lines, *statements, "} // AOTInductorModel::run_impl"]))


@pytest.mark.parametrize(
    ("name", "constants"),
    [("kept_buffer", ("kept",)), ("counter", ("n",)), ("seq_dyn", ()), ("two_dict", ()), ("mlp_static4", ())],
)
def test_buffers_that_real_packages_write_to_are_found(name: str, constants: tuple[str, ...]) -> None:
    assert written_constants((GOLDEN / f"{name}.txt").read_text()) == constants


@pytest.mark.parametrize(
    "statement",
    [
        "cpp_fused_0((const float*)(weight.data_ptr()), (const float*)(kept.data_ptr()), (float*)(buf0.data_ptr()));",
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(buf0, kept, buf1, "
        "wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper(weight, 2, sizes, strides, 0L)), 1L, 1L));",
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(buf0, weight, &temporary_reference(kept.get()), &b));",
        "aoti_torch_clone(kept, &output_handles[0]);",
        "auto var_0 = wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper(kept, 2, sizes, strides, 0L));\n"
        "aoti_torch_clone(var_0, &output_handles[0]);",
        "const AtenTensorHandle var_array_0[] = {kept, buf1};\n"
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_cat(var_array_0, 2, 1L, &buf2_handle));",
        '// Topologically Sorted Source Nodes: [kept], Original ATen: [aten.add]\ncall("kept");',
        "auto kept_size = kept.sizes();",
    ],
)  # fmt: skip
def test_a_constant_that_is_only_read_is_shared(statement: str) -> None:
    assert written(statement) == ()


@pytest.mark.parametrize(
    "statement",
    [
        "cpp_fused_0((float*)(kept.data_ptr()), (const float*)(weight.data_ptr()), s77);",
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(kept, weight, buf0, buf1, 1L, 1L));",
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(kept, buf0, 0));",
        "AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_fill__Scalar("
        "wrap_with_raii_handle_if_needed(reinterpret_tensor_wrapper(kept, 1, sizes, strides, 0L)), 1.0));",
        "auto buf3 = reinterpret_tensor_wrapper(kept, 1, sizes, strides, 0L);\n"
        "auto buf4 = std::move(buf3);  // reuse\ncpp_fused_0((float*)(buf4.data_ptr()), s77);",
        "AtenTensorHandle buf3_handle;\naoti_torch__reinterpret_tensor(kept, 1, sizes, strides, 0L, &buf3_handle);\n"
        "RAIIAtenTensorHandle buf3(buf3_handle);\noutput_handles[0] = buf3.release();",
        "output_handles[0] = kept.release();",
        "output_handles[0] = wrap_with_raii_handle_if_needed("
        "reinterpret_tensor_wrapper(kept, 1, sizes, strides, 0L)).release();",
        "aoti_torch_proxy_executor_call_function(proxy_executor, 0, 1, std::vector<int64_t>{s77}.data(), 2, "
        "std::vector<AtenTensorHandle>{buf0, kept}.data());",
        "something_unheard_of(weight_size, kept);",
    ],
)  # fmt: skip
def test_a_constant_that_may_be_written_or_given_away_is_not(statement: str) -> None:
    assert written(statement) == ("kept",)


def test_constants_that_are_bound_in_another_way_are_not_shared() -> None:
    info = 'constants_info_[0].name = "kept";\n'
    assert written_constants(info + "auto kept = *pointer(constants_->at(0));") == ("kept",)


def test_a_gpu_kernel_writes_to_what_its_parameters_are_named_for() -> None:
    assert written("call_triton_poi_0(weight, kept, 4L, stream, kernels);", before=GPU_KERNEL) == ("kept",)
