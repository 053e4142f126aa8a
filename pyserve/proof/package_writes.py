"""Which of its constants an AOTInductor package writes to or gives away, read from the source that torch keeps in it.

One package runs for all workers at once, and its constants are shared: one that a call writes to, such as a counter or
a cache in a buffer, would carry the numbers of one request into another's answer.

A constant counts as written unless every use of it is known to only read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_CONSTANT = re.compile(r"auto& (\w+) = constants_->at\(\d+\);")
_NAMED = re.compile(r'constants_info_\[\d+\]\.name = "(\w+)"')
_END = re.compile(r"\} // \w+::run_impl\b")
_COMMENT_OR_STRING = re.compile(r'//[^\n]*|R"\(.*?\)"|"(?:\\.|[^"\\\n])*"', re.DOTALL)
_GPU_KERNEL = re.compile(r"static inline void (call_\w+)\(([^)]*)\)\s*\{")
_READS_MEMORY = re.compile(r"\(const [^()]*\*\)\($")
_DECLARED = re.compile(r"^[\w:<>\s\[\]&*]*?\b(\w+)\s*(?:\[\d*\])?\s*=[^=]")
_OWNED = re.compile(r"^RAIIAtenTensorHandle (\w+)\(")
_HANDLE = re.compile(r"&(\w+)\b(?!\()")
# Calls that hand on the tensor they are given.
_WRAPPERS = frozenset({
    "AOTI_TORCH_ERROR_CODE_CHECK", "wrap_with_raii_handle_if_needed", "reinterpret_tensor_wrapper",
    "RAIIAtenTensorHandle", "temporary_reference", "borrow_arrayref_tensor_as_tensor",
    "convert_arrayref_tensor_to_tensor", "move", "",
})  # fmt: skip
# What they give lies in the memory of what they are given.
_VIEWS = frozenset({
    "reinterpret_tensor", "as_strided", "alias", "detach", "view_dtype", "view_as_real", "view_as_complex", "real",
    "imag", "select", "slice", "narrow", "transpose", "permute", "expand", "squeeze", "unsqueeze", "split", "unbind",
    "new_tensor_handle", "get_data_ptr",
})  # fmt: skip
_LOOKS = ("sizes", "strides", "reset", "get_device_idx", "dim", "numel")


@dataclass(frozen=True)
class _Call:
    name: str
    position: int  # of the argument in question


def written_constants(source: str) -> tuple[str, ...]:
    """Names of the constants that the program in ``source`` may write to or give away, in their order."""
    start = _CONSTANT.search(source)
    if len(_CONSTANT.findall(source)) != source.count("constants_->at("):
        return tuple(_NAMED.findall(source)) or ("of unknown name",)  # bound in a way that this does not know
    if start is None:
        return ()
    kernels = _gpu_kernels(source[: start.start()])
    body = source[start.start() :]
    end = _END.search(body)
    body = _COMMENT_OR_STRING.sub('""', body[: end.start()] if end else body)
    constants = _CONSTANT.findall(body)
    statements = [each.strip() for each in _CONSTANT.sub("", body).split(";")]
    places: dict[str, list[str]] = {}  # word -> the statements that have it
    for statement in statements:
        for word in set(re.findall(r"\w+", statement)):
            places.setdefault(word, []).append(statement)
    return tuple(dict.fromkeys(name for name in constants if _is_written(name, places, kernels)))


def _is_written(constant: str, places: dict[str, list[str]], kernels: dict[str, list[str]]) -> bool:
    names, at = [constant], 0
    while at < len(names):
        word = re.compile(rf"(?<![\w.>:]){re.escape(names[at])}\b")
        for statement in places.get(names[at], ()):
            for found in word.finditer(statement):
                aliases = _aliases(statement, found.start(), found.end(), kernels)
                if aliases is None:
                    return True
                names += [each for each in aliases if each not in names]
        at += 1
    return False


def _aliases(statement: str, start: int, end: int, kernels: dict[str, list[str]]) -> list[str] | None:
    """Other names that this use of a tensor gives it; None if the use may write to the tensor or give it away."""
    before, after = statement[:start], statement[end:]
    if after.startswith(".data_ptr()"):
        return [] if _READS_MEMORY.search(before) else None
    if re.match(rf"\.(?:{'|'.join(_LOOKS)})\(", after):
        return []
    declared = _DECLARED.match(statement) or _OWNED.match(statement)
    if before == "AtenTensorHandle " or (declared and declared.start(1) == start):
        return []  # it is declared here
    for call in _calls(before):
        if call.name in _WRAPPERS or (declared and call.name == declared[1]):
            continue
        return _aliases_of_call(call, statement, kernels)
    if "output_handles" in before or declared is None:
        return None
    return [declared[1]]


def _aliases_of_call(call: _Call, statement: str, kernels: dict[str, list[str]]) -> list[str] | None:
    if call.name == "assert_size_stride":
        return []
    if call.name in kernels:
        parameters = kernels[call.name]
        is_read = call.position < len(parameters) and parameters[call.position].startswith("in_ptr")
        return [] if is_read else None
    operator = re.fullmatch(r"aoti_torch_(?:cpu_|cuda_)?_*(\w+)", call.name)
    if operator is None:
        return None
    name = operator[1]
    if name in _VIEWS:
        return _HANDLE.findall(statement)
    if name.startswith(("proxy_executor", "assign_tensors")) or "batch_norm" in name or "rnn" in name:
        return None  # they may write to any of their arguments
    writes_first = re.search(r"_(?:out|$)|_out_|__", name) is not None
    return None if writes_first and call.position == 0 else []


def _calls(before: str) -> Iterator[_Call]:
    """The calls and lists around the end of ``before``, innermost first."""
    depth, position = 0, 0
    for at in range(len(before) - 1, -1, -1):
        char = before[at]
        if char in ")}]":
            depth += 1
        elif char in "({[" and depth:
            depth -= 1
        elif char in "({[":
            name = re.search(r"(\w*)(?:<[^<>()]*>)?\s*$", before[:at])
            is_list = char != "(" or before[:at].rstrip().endswith((">", "="))
            yield _Call("" if is_list or name is None else name[1], position)
            position = 0
        elif char == "," and not depth:
            position += 1


def _gpu_kernels(source: str) -> dict[str, list[str]]:
    """Names of the parameters of each function that starts a kernel on a GPU."""
    return {
        name: [found[-1] if (found := re.findall(r"\w+", each)) else "" for each in parameters.split(",")]
        for name, parameters in _GPU_KERNEL.findall(source)
    }
