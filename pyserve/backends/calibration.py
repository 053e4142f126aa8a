"""What an archive brings along to be calibrated with: the extra files in its folder ``calibration/``.

calibration/cat.jpg          a picture, as a client sends it
calibration/request.json     a JSON body, as a client sends it
calibration/recorded.npy     numbers as the model takes them: one item, or many, [n, ...]
calibration/recorded.npz     of a model with several inputs, one array for each of their names
calibration/recorded.pt      a tensor, or a tuple, list or dict of one for each input

The first two kinds go through the handler's `preprocess`, so that an int8 model is calibrated on what requests become.
The more they are like the requests to come, the less int8 costs; some hundred are enough.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyserve.archive.archive import Archive
from pyserve.archive.samples import CALIBRATION_FOLDER as FOLDER
from pyserve.context import Batch, Context
from pyserve.errors import ModelLoadError, ServeError
from pyserve.handler import Handler
from pyserve.proof.probe_inputs import InputDomain
from pyserve.torch_error import cause_of

log = logging.getLogger(__name__)

# So many items are used at most, spread over all files: more of them change the ranges that are found very little.
ITEMS_MAX = 300
# A larger file is left out.
FILE_SIZE_MAX = 1 << 30
# So many left-out files are named.
_NAMED_MAX = 3

_PICTURES = {
    ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp", ".gif": "image/gif",
    ".bmp": "image/bmp", ".tif": "image/tiff", ".tiff": "image/tiff",
}  # fmt: skip
_BODIES = {**_PICTURES, ".json": "application/json", ".txt": "text/plain"}
_TENSORS = (".npy", ".npz", ".pt", ".pth")

Item = tuple[Any, ...]


@dataclass(frozen=True)
class Calibration:
    """Items to calibrate with.

    Attributes:
        items: each a tuple of tensors [1, ...], one per input of the model.
        file_count: how many files they are from.
        left_out: texts about files that could not be used.
    """

    items: list[Item]
    file_count: int
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        files = "file" if self.file_count == 1 else "files"
        return f"{len(self.items)} items of {self.file_count} {files} in {FOLDER}/"


@dataclass(frozen=True)
class Asked:
    """The handler that makes numbers of a request, and what it makes.

    Attributes:
        handler, context: as prepared for the native lane.
        example: one item [1, ...] per input.
        domains: what each input may hold.
    """

    handler: Handler
    context: Context
    example: Sequence[Any]
    domains: Sequence[InputDomain]


class _LeftOut(Exception):
    """A file that cannot be used; the text says why."""


def calibration_files(names: Mapping[str, int] | Sequence[str]) -> list[str]:
    """Those of an archive's files that are there to calibrate with, by their names."""
    return sorted(
        name for name in names
        if name.startswith(f"{FOLDER}/") and Path(name).suffix.lower() in (*_BODIES, *_TENSORS)
        and not Path(name).name.startswith(".")
    )  # fmt: skip


def calibration_of(archive: Archive, asked: Asked, precision: str) -> Calibration | None:
    """What an archive's model at ``precision`` is calibrated with and compared on; None if there is nothing and need
    not be.

    Raises:
        ModelLoadError: int8 needs some, and there are none that can be used.
    """
    names = calibration_files(archive.files)
    if precision == "fp32" or not (names or precision == "int8"):
        return None
    try:
        return read_calibration(archive.name, archive.model_dir, names, asked)
    except ModelLoadError as error:
        if precision == "int8":
            raise
        log.warning("%s", error.message)
        return None


def no_calibration(label: str, names: Iterable[str] = ()) -> ModelLoadError:
    """For an archive that has no calibration files: where they go.

    Args:
        names: of the archive's files; those of other kinds in the folder are named.
    """
    others = sorted(name for name in names if name.startswith(f"{FOLDER}/"))[:_NAMED_MAX]
    found = f" ({', '.join(others)} {'is' if len(others) == 1 else 'are'} of no such kind)" if others else ""
    return ModelLoadError(
        f"{label}: 'precision: int8' needs inputs to calibrate with{found}: put pictures, JSON bodies, .npy or .pt "
        f"files that are like the requests to come into the archive's folder {FOLDER}/ (pyserve archive --{FOLDER} "
        "DIR), or take precision out of model-config.yaml"
    )


def read_calibration(label: str, folder: Path, names: Sequence[str], asked: Asked) -> Calibration:
    """The items in an archive's calibration files, at most `ITEMS_MAX`; files that cannot be used are left out.

    Args:
        label: what to call the archive in messages.
        folder: where it is unpacked.
        names: of its calibration files, below ``folder``.

    Raises:
        ModelLoadError: there are none, or none can be used; the text names one and says why.
    """
    if not names:
        raise no_calibration(label)
    used = _spread(list(names), ITEMS_MAX)
    rows_max = -(-ITEMS_MAX // len(used))
    reader = _Reader(asked, rows_max)
    items: list[Item] = []
    left_out: list[str] = []
    file_count = 0
    for name in used:
        try:
            found = reader.read(folder / name)
        except _LeftOut as error:
            left_out.append(f"{name}: {error}")
            continue
        items += found[: ITEMS_MAX - len(items)]
        file_count += 1
    if not items:
        which = "its only calibration file cannot be used"
        if len(used) > 1:
            which = f"none of its {len(used)} calibration files can be used"
        raise ModelLoadError(
            f"{label}: {which}: {'; '.join(text.rstrip('.') for text in left_out[:_NAMED_MAX])}"
            f"{'; ...' if len(left_out) > _NAMED_MAX else ''}. Replace what is there by pictures or bodies that the "
            "model answers, or take 'precision: int8' out of model-config.yaml"
        )
    for text in left_out[:_NAMED_MAX]:
        log.warning("%s: a calibration file is left out: %s", label, text)
    if len(left_out) > _NAMED_MAX:
        log.warning("%s: %d calibration files are left out, of %d", label, len(left_out), len(used))
    return Calibration(items, file_count, left_out)


def _spread(all_of_them: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of them, evenly: files are often sorted by class."""
    if len(all_of_them) <= count:
        return list(all_of_them)
    return [all_of_them[number * len(all_of_them) // count] for number in range(count)]


class _Reader:
    def __init__(self, asked: Asked, rows_max: int):
        self._handler, self._context = asked.handler, asked.context
        self._example, self._domains = list(asked.example), list(asked.domains)
        self._rows_max = rows_max
        specs = list(getattr(asked.handler, "specs", None) or ())
        self._specs = specs if len(specs) == len(self._example) else []

    def read(self, path: Path) -> list[Item]:
        """The items of one file, each checked. Raises _LeftOut."""
        suffix = path.suffix.lower()
        try:
            if not path.is_file():
                raise _LeftOut("it is not there, or no regular file")
            size = path.stat().st_size
            if not 0 < size <= FILE_SIZE_MAX:
                raise _LeftOut(f"it has {size} bytes; from 1 to {FILE_SIZE_MAX} can be read")
            if suffix in _BODIES:
                return [self._of_body(path.read_bytes(), _BODIES[suffix])]
            return self._of_tensors(_loaded(path, suffix))
        except OSError as error:
            raise _LeftOut(f"it cannot be read: {error.strerror or type(error).__name__}") from error
        except (RuntimeError, TypeError, ValueError, MemoryError) as error:  # torch's, of kinds that it cannot convert
            cause = cause_of(str(error))
            raise _LeftOut(f"it cannot be used: {type(error).__name__}{': ' if cause else ''}{cause}") from error

    def _of_body(self, body: bytes, content_type: str) -> Item:
        try:
            value: Any = bytearray(body)
            if content_type == "application/json":
                value = json.loads(body)
            elif content_type == "text/plain":
                value = body.decode()
            self._context.bind(Batch([FOLDER], [(("content-type", content_type),)]))
            made = self._handler.preprocess([{"body": value}])
        except Exception as error:  # the handler may be the archive's own
            text = error.message if isinstance(error, ServeError) else cause_of(str(error))
            raise _LeftOut(f"the handler cannot read it: {text or type(error).__name__}") from error
        finally:
            self._context.bind(None)
        inputs = tuple(made) if isinstance(made, (tuple, list)) else (made,)
        return self._checked(inputs)

    def _of_tensors(self, loaded: Any) -> list[Item]:
        inputs = self._in_order(loaded)
        for position, given in enumerate(inputs):
            if odd := _odd_kind(given):
                raise _LeftOut(f"{self._name(position)} of it is {odd}; save it as an ordinary tensor of numbers")
        batched = []
        for position, (given, example) in enumerate(zip(inputs, self._example, strict=True)):
            each = given[None] if given.dim() == example.dim() - 1 else given
            if each.dim() != example.dim():
                raise _LeftOut(
                    f"{self._name(position)} has shape {list(each.shape)}; one item is "
                    f"{list(example.shape[1:])}, several are [n, {str(list(example.shape[1:]))[1:-1]}]"
                )
            batched.append(each)
        count = batched[0].shape[0]
        if any(each.shape[0] != count for each in batched) or count == 0:
            raise _LeftOut(f"its inputs have {', '.join(str(each.shape[0]) for each in batched)} items")
        return [
            self._checked(tuple(each[row : row + 1] for each in batched))
            for row in _spread(range(count), self._rows_max)
        ]  # fmt: skip

    def _in_order(self, loaded: Any) -> list[Any]:
        """One tensor per input."""
        import torch

        count = len(self._example)
        if isinstance(loaded, Mapping):
            names = [spec.name for spec in self._specs] if count > 1 else list(loaded)[:1]
            missing = [name for name in names if name not in loaded]
            if missing or len(names) != count:
                raise _LeftOut(f"it has {', '.join(map(repr, list(loaded)[:5]))}, not {', '.join(map(repr, names))}")
            loaded = [loaded[name] for name in names]
        inputs = list(loaded) if isinstance(loaded, (tuple, list)) else [loaded]
        if len(inputs) != count or not all(isinstance(each, torch.Tensor) for each in inputs):
            kinds = ", ".join(type(each).__name__ for each in inputs[:5])
            raise _LeftOut(f"it has {len(inputs)} values ({kinds}), and the model takes {count} tensors")
        return inputs

    def _checked(self, inputs: Item) -> Item:
        """``inputs`` in the model's dtypes, each [1, ...], filled up where the handler does that."""
        import torch

        if len(inputs) != len(self._example) or not all(isinstance(each, torch.Tensor) for each in inputs):
            raise _LeftOut(f"the handler makes {len(inputs)} values of it, and the model takes {len(self._example)} "
                           "tensors")  # fmt: skip
        kept = [
            self._converted(position, each, example)
            for position, (each, example) in enumerate(zip(inputs, self._example, strict=True))
        ]
        if self._specs and all(hasattr(spec, "padded") for spec in self._specs):
            kept = [spec.padded(each) for spec, each in zip(self._specs, kept, strict=True)]
        for position, (each, domain) in enumerate(zip(kept, self._domains, strict=True)):
            self._check(position, each, domain)
        return tuple(kept)

    def _converted(self, position: int, given: Any, example: Any) -> Any:
        import torch

        if given.dtype != example.dtype:
            is_wider = example.is_floating_point() and not given.is_complex()
            if not is_wider and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
                raise _LeftOut(f"{self._name(position)} is {_dtype(given)}, and the model takes {_dtype(example)}")
            given = given.to(example.dtype)
        return given.detach().contiguous().clone()

    def _check(self, position: int, given: Any, domain: InputDomain) -> None:
        name = self._name(position)
        if given.shape[0] != 1:
            raise _LeftOut(f"{name} has {given.shape[0]} rows for one item")
        sizes = [(low, high) for low, high in domain.sizes]
        shape = list(given.shape[1:])
        fits = len(shape) == len(sizes) and all(
            low <= size and (high is None or size <= high) for size, (low, high) in zip(shape, sizes, strict=True)
        )
        if not fits:
            wanted = ", ".join(str(low) if low == high else f"{low} to {high or 'any'}" for low, high in sizes)
            raise _LeftOut(f"{name} has shape {shape}, and one item is [{wanted}]")
        if given.is_floating_point() and not bool(given.isfinite().all()):
            raise _LeftOut(f"{name} has numbers that are NaN or infinite")
        if domain.values is not None and given.numel():
            low, high = (float(each) for each in given.aminmax())
            if low < domain.values[0] or high > domain.values[1]:
                raise _LeftOut(f"{name} has numbers from {low:g} to {high:g}, outside of "
                               f"{domain.values[0]:g} to {domain.values[1]:g}")  # fmt: skip

    def _name(self, position: int) -> str:
        if len(self._example) == 1:
            return "the input"
        name = self._specs[position].name if self._specs else ""
        return f"input {name!r}" if name else f"input {position + 1}"


def _odd_kind(tensor: Any) -> str:
    """What a tensor is that has not its numbers one beside the other in memory; ``""`` of one that does."""
    import torch

    if tensor.is_nested:
        return "nested"
    if tensor.is_quantized:
        return "quantized"
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    return "without numbers (of the device 'meta')" if tensor.is_meta else ""


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _loaded(path: Path, suffix: str) -> Any:
    """The tensors in a file, in their structure. Runs no code of the file's. Raises _LeftOut."""
    import numpy as np
    import torch

    try:
        if suffix in (".pt", ".pth"):
            return torch.load(path, map_location="cpu", weights_only=True)
        _check_begin(path, suffix)
        found = np.load(path, allow_pickle=False)
        if suffix == ".npz":
            with found:
                return {name: torch.from_numpy(found[name]) for name in found.files}
        return torch.from_numpy(found)
    except (OSError, _LeftOut):
        raise
    except Exception as error:  # numpy's and torch's, of many classes
        cause = cause_of(str(error))
        raise _LeftOut(f"it cannot be read: {type(error).__name__}{': ' if cause else ''}{cause}") from error


def _check_begin(path: Path, suffix: str) -> None:
    """That it is what its name says. numpy takes anything else for a pickle, and advises to trust it."""
    wanted, saver = (b"PK", "numpy.savez") if suffix == ".npz" else (b"\x93NUMPY", "numpy.save")
    with path.open("rb") as file:
        if file.read(len(wanted)) != wanted:
            raise _LeftOut(f"it cannot be read: it is no {suffix} file, as {saver} writes them")
