"""The cause in torch's own texts, wherever it stands; each is one that torch 2.13 writes."""

from __future__ import annotations

import pytest

from pyserve.torch_error import LENGTH_MAX, cause_of

SCRIPT = """The following operation failed in the TorchScript interpreter.
Traceback of TorchScript, serialized code (most recent call last):
  File "code/__torch__/torch/nn/modules/linear.py", line 12, in forward
    bias = self.bias
    return torch.linear(x, weight, bias)
           ~~~~~~~~~~~~ <--- HERE

Traceback of TorchScript, original code (most recent call last):
/opt/env/site-packages/torch/nn/modules/linear.py(134): forward
/srv/somebody/model.py(6): forward
RuntimeError: mat1 and mat2 must have the same dtype, but got Float and BFloat16
"""
RAISED = """The following operation failed in the TorchScript interpreter.
Traceback of TorchScript (most recent call last):
  File "/srv/somebody/model.py", line 24, in forward
        assert x.size(0)>5, "too small"
        ~~~~~~~~~~~~~~~~~~~~~~~~~~~~~~ <--- HERE
RuntimeError: AssertionError: too small
"""
FRAMES = """mat1 and mat2 shapes cannot be multiplied (3x4 and 3x4)
Exception raised from meta at /pytorch/aten/src/ATen/native/LinearAlgebra.cpp:204 (most recent call first):
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x80 (0x7f0d2b1c in /opt/torch/lib/libc10.so)
frame #1: <unknown function> + 0x17f4e5 (0x7f0d2c)
"""
UNPICKLING = """Weights only load failed. This file can still be loaded, to do so you have two options, \x1b[1mdo \
those steps only if you trust the source of the checkpoint\x1b[0m.
\t(1) In PyTorch 2.6, we changed the default value of the `weights_only` argument in `torch.load` from `False` to \
`True`. Re-running `torch.load` with `weights_only` set to `False` will likely succeed, but it can result in arbitrary \
code execution. Do it only if you got the file from a trusted source.
\t(2) Alternatively, to load with `weights_only=True` please check the recommended steps in the following error message.
\tWeightsUnpickler error: Unsupported global: GLOBAL __main__.Net was not an allowed global by default. Please use \
`torch.serialization.add_safe_globals([__main__.Net])` to allowlist this global if you trust this class/function.
"""
CHAINED = """Traceback (most recent call last):
  File "/srv/somebody/model.py", line 3, in f
    z()
ValueError: not today

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/srv/somebody/model.py", line 9, in g
RuntimeError: no weights today
"""
GUARD = """Constraints violated (n)! For more information, run with TORCH_LOGS="+dynamic".
  - Not all values of n = L['ids'].size()[1] in the specified range n <= 64 satisfy the generated guard \
2 <= L['ids'].size()[1] and L['ids'].size()[1] <= 32
Suggested fixes:
  n = Dim('n', max=32)
"""
FIXED = """Constraints violated (size_0)! For more information, run with TORCH_LOGS="+dynamic".
  - You marked size_0 as dynamic but your code specialized it to be a constant (17). If you're using mark_dynamic, \
either remove it or use maybe_mark_dynamic.
Suggested fixes:
  size_0 = 17
"""
DATA = """Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)).  (Size-like symbols: none)

consider using data-dependent friendly APIs such as guard_or_false, guard_or_true and statically_known_true.
Caused by: (_export/non_strict_utils.py:1205 in __torch_function__)

The following call raised this error:
  File "/srv/somebody/model.py", line 64, in forward
"""
SCRIPTING = """
Python builtin <built-in function eval> is currently not supported in Torchscript:
  File "/srv/somebody/model.py", line 32
    def forward(s,x): return eval("x")
                             ~~~~ <--- HERE
"""
AOTI = (
    "run_func_( container_handle_, input_handles.data(), reinterpret_cast<AOTInductorStreamHandle>(stream_handle), "
    "proxy_executor_handle_) API call failed at /pytorch/csrc/inductor/aoti_runner/model_container_runner.cpp, line 145"
)
CASES = {
    SCRIPT: "mat1 and mat2 must have the same dtype, but got Float and BFloat16",
    RAISED: "too small",
    "builtins.RuntimeError: poisoned input": "poisoned input",
    FRAMES: "mat1 and mat2 shapes cannot be multiplied (3x4 and 3x4)",
    UNPICKLING: "it holds __main__.Net, and only tensors and plain values in lists and dicts are read as weights",
    CHAINED: "no weights today",
    GUARD: "dimension 1 of ids is not free: the program needs 2 <= size and size <= 32",
    FIXED: "the code computes with size_0 as a plain number, here 17",
    DATA: "Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)). (Size-like symbols: none)",
    SCRIPTING: "Python builtin <built-in function eval> is currently not supported in Torchscript",
    AOTI: "the package's compiled code failed; it writes why only to the standard error of the process",
    "Error in dlopen: /tmp/x/abc/model.so: undefined symbol: foo": "Error in dlopen: model.so: undefined symbol: foo",
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4503599627370496 bytes.": "DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4503599627370496 bytes.",
    "PytorchStreamReader failed locating file constants.pkl: file not found. This is an internal miniz error. If you "
    "are seeing this error, there is a high likelihood": "PytorchStreamReader failed locating file constants.pkl: "
    "file not found.",
    "Expected self.dtype() == mat2.dtype() to be true, but got false.  (Could this error message be improved?  If so, "
    "please report it)": "Expected self.dtype() == mat2.dtype() to be true, but got false.",
    "nothing known about <torch.Thing object at 0x7f3322aa>": "nothing known about a torch.Thing",
    "module contains attributes values that overlaps -0.0529  0.4424 -0.3211  0.1234\n-1.0000e-02 0.5 0.25 0.75\n"
    "[ CPUFloatType{2,4} ]": "module contains attributes values that overlaps (numbers) CPUFloatType{2,4} ]",
    "Tracer cannot infer type of namespace(x=tensor([1., 1.]))": "Tracer cannot infer type of namespace(x=a tensor)",
    "index out of range in self": "index out of range in self",
    "": "",
}  # fmt: skip


@pytest.mark.parametrize("text", CASES, ids=CASES.values())
def test_the_cause_is_found_wherever_it_stands(text: str) -> None:
    assert cause_of(text) == CASES[text]


@pytest.mark.parametrize("text", CASES, ids=CASES.values())
def test_no_frame_address_folder_or_unsafe_advice_is_kept(text: str) -> None:
    unwanted = ("frame #", "0x", "/srv", "/opt", "/tmp", "weights_only", "safe_globals", "\n", "Traceback", "HERE")
    assert not [word for word in unwanted if word in cause_of(text)]


def test_a_long_text_is_cut_and_read_in_time() -> None:
    assert len(cause_of("so long " * 100_000)) == LENGTH_MAX
    assert cause_of("Traceback (most recent call last):\n" + "  File x\n" * 50_000 + "KeyError: 'end'") == "'end'"
