"""What a file is, by what is in it and not by its name; and what to say of one that is no model.

    kind_of(source)  ->  ARCHIVE, TORCHSCRIPT, EXPORTED, COMPILED, WEIGHTS, SAFETENSORS, or InvalidModelError

Nothing of the file is run. Whole modules that were pickled are told from state dicts by the first class in them.
"""

from __future__ import annotations

import io
import re
import shlex
from pathlib import PurePath
from typing import BinaryIO, NoReturn

from pyserve.archive.entries import LIMITS, MANIFEST_NAME, Limits, Reader, SourceFile, refuse
from pyserve.archive.extract import is_packed, open_reader
from pyserve.archive.inert_pickle import InertPickleError, Named, read_inert
from pyserve.archive.weights import MappedWindow
from pyserve.errors import shown

ARCHIVE = "archive"
TORCHSCRIPT = "TorchScript"
EXPORTED = "exported program"
COMPILED = "AOTInductor package"
WEIGHTS = "weights"
SAFETENSORS = "safetensors"

# What the loaders know the kinds by.
SUFFIXES = {TORCHSCRIPT: ".pt", EXPORTED: ".pt2", COMPILED: ".pt2", WEIGHTS: ".pth", SAFETENSORS: ".safetensors"}

_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # of torch.save before 1.6
_LEGACY_HEADERS = 3  # pickles before the one that counts
_EXPORTED_NAME = re.compile(r"(?:[^/]+/models/[^/]+|(?:[^/]+/)?serialized_exported_program)\.json")
_LFS = b"version https://git-lfs.github.com/spec/"
_SAFETENSORS_HEADER_MAX = 100 << 20
_HEAD_SIZE = 4096
_PICKLE_SIZE_MAX = 256 << 20

SAVE_PROGRAM = "torch.export.save(torch.export.export(model, (example,)), 'net.pt2')"
SAVE_WEIGHTS = "torch.save(model.state_dict(), 'net.pth')"

# First bytes -> what it is, what to do.
_OTHERS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it", "export the PyTorch model instead"),
    (b"GGUF", "a GGUF file, as llama.cpp reads it", "pack a handler of your own that reads it"),
    (b"\x93NUMPY", "a NumPy array", "it can be sent to a model, but is none"),
    (b"\x7fELF", "a compiled library",
     "compile a .pt2 package instead, with torch._inductor.aoti_compile_and_package, or pack it with `pyserve archive "
     "--serialized-file`"),
    (b"\xff\xd8\xff", "a JPEG picture", "it can be sent to a model, but is none"),
    (b"\x89PNG", "a PNG picture", "it can be sent to a model, but is none"),
    (b"%PDF", "a PDF document", "give the model's file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first, and give the model in it"),
    (b"Rar!", "a RAR archive", "unpack it first, and give the model in it"),
    (b"BZh", "a bzip2 file", "unpack it first, and give the model in it"),
    (b"\xfd7zXZ", "an xz file", "unpack it first, and give the model in it"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first, and give the model in it"),
)  # fmt: skip

# Entries of a zip that is neither a model nor an archive -> what it is, what to do.
_OTHER_ZIPS = (
    (lambda names: all(name.endswith(".npy") for name in names), "NumPy arrays (.npz)",
     "they can be sent to a model, but are none"),
    (lambda names: "model.weights.h5" in names and "config.json" in names, "a Keras model",
     "export the PyTorch model instead"),
    (lambda names: "[Content_Types].xml" in names, "an Office document", "give the model's file"),
)  # fmt: skip


def kind_of(source: SourceFile, limits: Limits = LIMITS) -> tuple[str, Reader | None]:
    """One of the kinds above, with the reader of one that is a zip or tar.

    A zip in which nothing says what it is counts as an archive: it may lack its manifest.

    Raises:
        InvalidModelError: it is something else, or a damaged zip or tar; the text says what, and what to type.
    """
    name = source.label
    if source.size == 0:
        refuse(name, "is empty (0 bytes); make or copy it again")
    head = source.read_at(0, min(source.size, _HEAD_SIZE))
    if is_packed(head):
        reader = open_reader(source, limits)
        return (_kind_of_zip(reader, name), reader) if reader.kind == "zip" else (ARCHIVE, reader)
    if head.startswith(_LEGACY_MAGIC):
        with MappedWindow(source.descriptor, source.offset, source.size) as file:
            _check_pickle(file, name, headers=_LEGACY_HEADERS)  # type: ignore[arg-type]
        return WEIGHTS, None
    if _is_safetensors(head, source.size):
        return SAFETENSORS, None
    _refuse_other(head, source.size, name)


def _is_safetensors(head: bytes, size: int) -> bool:
    header = int.from_bytes(head[:8], "little")
    return len(head) > 9 and 2 <= header <= min(size - 8, _SAFETENSORS_HEADER_MAX) and head[8:9] == b"{"


def _kind_of_zip(reader: Reader, name: str) -> str:
    entries = {entry.name: entry for entry in reader.entries}
    tops = {each.partition("/")[2] for each in entries}
    if MANIFEST_NAME in entries or MANIFEST_NAME in tops:
        return ARCHIVE
    if any("/aotinductor/" in each for each in entries):
        return COMPILED
    if any(_EXPORTED_NAME.fullmatch(each) for each in entries):
        return EXPORTED
    if "constants.pkl" in tops and any(each.endswith("data.pkl") for each in entries):
        return TORCHSCRIPT
    pickle = next((entry for each, entry in entries.items() if each.partition("/")[2] == "data.pkl"), None)
    for is_it, what, fix in _OTHER_ZIPS:
        if entries and is_it(entries):
            refuse(name, f"is {what}, not a model of PyTorch; {fix}")
    if pickle is None or pickle.size > _PICKLE_SIZE_MAX:
        return ARCHIVE
    _check_pickle(io.BytesIO(reader.read(pickle, _PICKLE_SIZE_MAX)), name)
    return WEIGHTS


def _check_pickle(file: BinaryIO, name: str, headers: int = 0) -> None:
    """Refuses what torch.save made of something else than weights.

    Args:
        headers: pickles to pass over first.
    """
    try:
        for _ in range(headers):
            read_inert(file)
        first = read_inert(file, until_named=True)
    except InertPickleError:
        return  # whoever loads it says what is wrong
    if not isinstance(first, Named) or first.name in ("collections.OrderedDict", "builtins.dict"):
        return
    if first.name.startswith("torch._utils._rebuild"):
        refuse(name, f"holds a tensor, not a model; save the model: {SAVE_PROGRAM}")
    refuse(
        name,
        f"is a whole object that was pickled ({shown(first.name)}), and reading it would run code that is in it; save "
        f"its weights, {SAVE_WEIGHTS}, and give the file with its class too (--model-file model.py), or save a "
        f"program: {SAVE_PROGRAM}",
    )


def weights_alone(name: str) -> str:
    """What to say of weights that come without the class that they belong to; behind the file's name and a colon."""
    kept = PurePath(name).name
    return (
        "holds weights only, not the model that they belong to; give the Python file with its class too, as in "
        f"`pyserve start {shlex.quote(kept)} --model-file model.py`, or pack both with `pyserve archive`, or "
        f"save a program: {SAVE_PROGRAM}"
    )


def _refuse_other(head: bytes, size: int, name: str) -> NoReturn:
    stem = PurePath(name).stem
    if head.startswith(_LFS):
        refuse(name, f"is a pointer of Git LFS ({size} bytes), not the file itself; fetch that with `git lfs pull`")
    for magic, what, fix in _OTHERS:
        if head.startswith(magic):
            refuse(name, f"is {what}, not a model of PyTorch; {fix}")
    if head[:1] == b"\x08" and (name.lower().endswith(".onnx") or b"pytorch" in head[:64] or b"onnx" in head[:64]):
        refuse(
            name,
            f"is an ONNX file, which onnxruntime runs from an archive: `pyserve archive --model-name {stem} --version "
            f"1.0 --handler tensor --serialized-file {name} --config-file model-config.yaml`, with its input: in "
            f"model-config.yaml; or save the PyTorch model: {SAVE_PROGRAM}",
        )
    if head[:1] == b"\x80" and size > 2 and head[1:2] <= b"\x05":
        refuse(name, f"is a pickle that torch.save did not write, and reading it would run code; {_or_save()}")
    text = _text_of(head)
    if text is None:
        refuse(
            name,
            f"is neither a zip (.mar) nor a tar.gz, nor a file of PyTorch's: it begins with {head[:8]!r}; make it with "
            f"`pyserve archive`, or download it again; or {_or_save()}",
        )
    start = text.lstrip().lower()
    if start.startswith(("<!doctype", "<html")):
        refuse(name, "is an HTML page, not a model, perhaps of a download that failed; download it again, and look at "
               "it with `head`")  # fmt: skip
    if name.endswith(".py"):
        refuse(name, "is Python source, not a model; give the folder that it is in, or give it as --handler or "
               "--model-file beside the weights")  # fmt: skip
    first = text.strip().splitlines()[0] if text.strip() else ""
    refuse(name, f"is a text file, not a model: it begins with {shown(first)}; give the model's file")


def _or_save() -> str:
    return f"save the model with torch.jit.save, or as a program: {SAVE_PROGRAM}"


def _text_of(head: bytes) -> str | None:
    """The beginning as text; None if it is none."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # else a character that the end of what was read cuts
            return None
        text = head[: error.start].decode()
    return text if all(each.isprintable() or each.isspace() for each in text) else None
