"""The cause in what torch says of an error, as one line for a person.

Torch's texts bury it: TorchScript's puts it below a traceback, the C++ library above its frames, and the unpickler
between pieces of advice that nobody should follow. Only reads text, so that what runs without torch can use it too.
"""

from __future__ import annotations

import re

LENGTH_MAX = 400
# More of a text is not looked at: of a longer one, as much from its start and its end.
_READ_MAX = 8000

# From here to the end there are only frames and addresses.
_FRAMES = re.compile(
    r"^[ \t]*(Exception raised from |frame #\d+: |C\+\+ CapturedTraceback:|C\+\+ stack trace|#\d+ 0x)", re.M
)
# "RuntimeError: mat1 and mat2 ..." at the start of a line, as Python and TorchScript end their tracebacks.
_NAMED = re.compile(r"^(?:[A-Za-z_]\w*\.)*(\w*(?:Error|Exception|Failure|Interrupt|SymNode)):[ \t]*(.*)$", re.M)
_TRACEBACK = re.compile(r"^(Traceback|The following operation failed in the TorchScript interpreter)", re.M)
# Pointers into code, which follow the cause or stand between two.
_CODE = re.compile(r"^\s*(File \"|~+|\^+|.*<--- HERE|The following call raised this error)")
_GLOBAL = re.compile(r"Unsupported (?:global|class|operand)[^:]*:? ?(?:GLOBAL )?([\w.]+)")
# What torch.export says of a size that the program does not take.
_GUARD = re.compile(r"Not all values of \S+ = L\['(\w+)'\]\.size\(\)\[(\d+)\] .*?satisfy the generated guard ([^\n]+)")
_FIXED = re.compile(r"You marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)")
_AOTI_CALL = re.compile(r"\w+\(.*\) API call failed\b.*", re.S)
_ADVICE = re.compile(
    r"(?: ?This is an internal (?:miniz )?error\b.*"
    r"|[^.:]*\bweights_only\b.*|[^.:]*\b(?:add_)?safe_globals\b.*|[^.:]*arbitrary code execution.*"
    r"|,?[^.,]*\btrust(?:ed)? (?:the |this )?(?:source|class)\b.*|For more (?:information|debugging).*|Set TORCH_.*"
    r"|You can suppress.*|consider using .*"
    r"|CUDA kernel errors might be.*|Compile with .TORCH_USE_CUDA_DSA.*|Consider using a constant container.*"
    r"|\(Could this error message be improved\?.*|Please (?:file|report|open) .*|Suggested fixes:.*"
    r"|If you absolutely need.*)",
    re.S,
)
_CLEANED = [
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"\[enforce fail at [^\]]*\] (?:.*? == \d+\. )?"), ""),
    (re.compile(r"\bat (?:[\w./+-]*/)[\w.+-]+\.(?:cpp|cc|cu|h|cuh)(?::\d+|, line \d+)?"), ""),
    (re.compile(r"<([\w.]+) object at 0x[0-9a-fA-F]+>"), r"a \1"),
    (re.compile(r"(?:\bat |@)?\b0x[0-9a-fA-F]{5,}\b"), ""),
    # A folder is nobody's business; a file's name may be what matters.
    (re.compile(r"(?<![\w:/.])/(?:[\w.+@~-]+/)+"), ""),
    # Numbers of a tensor that is printed: weights, or what a client sent.
    (re.compile(r"tensor\([^()]*\)"), "a tensor"),
    (re.compile(r"(?:-?\d+\.\d*(?:e[+-]?\d+)?[\s,\[\]]+){3,}"), "(numbers) "),
    (re.compile(r"\s+"), " "),
    (re.compile(r"(?<= )\(\s*\)|\s+(?=[.,;:](?:\s|$))"), ""),
]


def cause_of(error_text: str) -> str:
    """What went wrong, in one line of at most `LENGTH_MAX` characters.

    Frames, memory addresses, folders and advice to load a file unsafely are left out.

    Args:
        error_text: ``str(error)``, or a whole report with its traceback.

    Returns:
        ``""`` for a text that says nothing.
    """
    text = error_text if len(error_text) <= 2 * _READ_MAX else f"{error_text[:_READ_MAX]}\n\n{error_text[-_READ_MAX:]}"
    text = _CLEANED[0][0].sub("", text).replace("\r\n", "\n").strip()
    frames = _FRAMES.search(text)
    if frames is not None and text[: frames.start()].strip():
        text = text[: frames.start()]
    if "Weights only load failed" in text or "WeightsUnpickler" in text:
        return _of_unpickling(text)
    guard = _GUARD.search(text)
    if guard is not None:
        limits = re.sub(r"L\['\w+'\]\.size\(\)\[\d+\]", "size", guard[3]).strip()
        return f"dimension {guard[2]} of {guard[1]} is not free: the program needs {limits}"
    fixed = _FIXED.search(text)
    if fixed is not None:
        return f"the code computes with {fixed[1]} as a plain number, here {fixed[2]}"
    if _AOTI_CALL.match(text):
        return "the package's compiled code failed; it writes why only to the standard error of the process"
    named = list(_NAMED.finditer(text)) if _TRACEBACK.search(text) or _NAMED.match(text) else []
    # The last one is raised by the code at fault; those before it wrap it, or were being handled.
    while named:
        match = named.pop()
        cause = _sentence(match[2] + text[match.end() :]) or (match[1] if not named else "")
        if cause:
            nested = _NAMED.match(cause)
            return nested[2] or nested[1] if nested else cause
    return _sentence(text)


def _of_unpickling(text: str) -> str:
    """It names the class that stands in the file where only tensors may; torch's advice is to load it unsafely."""
    found = _GLOBAL.search(text)
    if found is not None:
        return f"it holds {found[1]}, and only tensors and plain values in lists and dicts are read as weights"
    _, _, rest = text.partition("WeightsUnpickler error:")
    return _sentence(rest) or "it holds more than tensors and plain values in lists and dicts"


def _sentence(text: str) -> str:
    """The first paragraph of a text that says something, as one clean line."""
    kept: list[str] = []
    for line in text.strip().splitlines():
        if _CODE.match(line) or (kept and not line.strip()):
            if kept:
                break
            continue
        kept.append(line.strip())
    cause = _ADVICE.sub("", " ".join(kept)[: 3 * LENGTH_MAX]) if kept else ""
    for pattern, replacement in _CLEANED:
        cause = pattern.sub(replacement, cause)
    cause = cause.strip(" :;,-")
    return cause if len(cause) <= LENGTH_MAX else cause[: LENGTH_MAX - 3].rstrip() + "..."
