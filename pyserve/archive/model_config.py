"""``model-config.yaml``, typed and range-checked.

Only plain YAML values are built: no Python objects, and no aliases that multiply. A bad value of a key that TorchServe
knows is a warning, and counts as not given; one of a key of pyserve's own is an error where the key is followed, which
is not with handlers that bring their own code: they may mean something else by it. Every other key is the handler's
business and is kept.
"""

from __future__ import annotations

import codecs
import contextlib
import difflib
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

from pyserve.archive.entries import LIMITS, refuse
from pyserve.config.bounds import BOUNDS, DEVICE_COUNT_MAX, validate_setting
from pyserve.errors import InvalidModelError, shown
from pyserve.input_config import InputConfigError, InputSpec, read_inputs

try:
    from yaml import CSafeLoader as _QuickLoader
except ImportError:  # PyYAML built without libyaml
    from yaml import SafeLoader as _QuickLoader

# Larger files are read by libyaml's loader only. It is ten times as fast as the one that `yaml.safe_load` uses, takes
# tabs where that does not, and refuses a few things that it takes, such as lone surrogates.
_EXACT_SIZE_MAX = 32 << 10

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
BACKENDS = ("auto", "torchscript", "aotinductor", "openvino")
MEMORY_FORMATS = ("contiguous", "channels_last")
JPEG_DECODERS = ("pillow", "torchvision")
DEVICE_TYPES = ("cpu", "gpu")
PARALLEL_TYPES = ("pp", "tp", "pptp", "custom")
BATCH_DEPENDENCES = ("allowed",)
BUCKET_COUNT_MAX = 64  # each is warmed up on each worker
CONVERSIONS = ("auto", "trace", "script", "python")

_NODE_COUNT_MAX = 1_000_000  # values in the yaml, aliases counted as often as they are used; read in about 10 s
_DEPTH_MAX = 256
_PERCENT = re.compile(r"\s*([0-9]{1,3}(?:\.[0-9]{1,12})?)\s*%\s*")
_QUOTED_NUMBER = re.compile(r"\s*[+-]?[0-9]{1,18}\s*", re.ASCII)
_INT_MAX = 2**31 - 1
_NEAR_MISS_COUNT_MAX = 100  # unknown keys compared with the known ones: comparing costs about 0.1 ms each
_KEY_SIZE_MAX = 64

# Of pyserve's own; TorchServe leaves them to handlers.
_OWN_KEYS = frozenset(
    {"minBatch", "precision", "memoryFormat", "input", "batchDependent", "precisionErrorMax", "audit", "conversion",
     "sideEffects", "jpegDecoder", "exif", "graphs", "batchBuckets", "backend", "backendTrialSeconds",
     "precisionAgreementMin"}
)  # fmt: skip
# Keys of handlers and libraries that TorchServe's documentation uses at the top level: never a misspelling.
_HANDLER_KEYS = frozenset({"handler", "pt2", "micro_batching", "pippy", "deepspeed", "profile"})


@dataclass
class ModelConfig:
    """The keys of ``model-config.yaml``; None where the file does not say.

    Attributes:
        batch_dependent: ``"allowed"``: answers may depend on what else is in the batch.
        precision_error_max: largest error of a lowered precision, relative to the largest number of an output.
        precision_agreement_min: share, 0 to 1, of the calibration inputs on which int8 must name the same class first
            as fp32.
        backend: what runs the model in the native lane; ``"auto"`` the fastest that gives the same answers.
        backend_trial_s: how long backends may be compared and measured for that.
        audit_share: share, 0 to 1, of the requests whose answers are computed again and compared.
        conversion: how an eager model gets to the native lane; ``"trace"`` and ``"script"`` also where it could not be
            proven right, ``"python"`` never.
        graphs: False: calls of the model are not recorded and replayed on an accelerator.
        batch_buckets: sizes that batches are filled up to there, in order; False: never.
        side_effects: a handler's call changes something outside: no request is run twice.
        raw: the whole yaml, as `yaml.safe_load` gives it and handlers see it.
        text: of the file, from which `read_yaml` makes the same.
        needed: what is wrong with keys of pyserve's own, where they are followed.
        quoted: attributes whose values are in quotes, which TorchServe does not take.
        has_file: there was a file, even an empty one.
        warnings: texts about keys that look misspelled or cannot be followed.
    """

    workers_min: int | None = None
    workers_max: int | None = None
    batch_size: int | None = None
    max_batch_delay_ms: int | None = None
    min_batch: int | None = None
    response_timeout_s: int | None = None
    startup_timeout_s: int | None = None
    device_type: str | None = None
    device_ids: list[int] | None = None
    queue_size: int | None = None
    precision: str | None = None
    memory_format: str | None = None
    jpeg_decoder: str | None = None
    exif: bool | None = None
    input: InputSpec | list[InputSpec] | None = None
    retry_timeout_max_s: int | None = None
    client_timeout_ms: int | None = None
    parallel_type: str | None = None
    parallel_level: int | None = None
    torchrun: dict[str, Any] | None = None
    use_job_ticket: bool | None = None
    continuous_batching: bool | None = None
    sequence_batching: bool | None = None
    sequence_idle_max_ms: int | None = None
    sequence_timeout_ms: int | None = None
    sequence_queue_size: int | None = None
    sequence_count_max: int | None = None
    async_communication: bool | None = None
    use_venv: bool | None = None
    batch_dependent: str | None = None
    precision_error_max: float | None = None
    precision_agreement_min: float | None = None
    backend: str | None = None
    backend_trial_s: int | None = None
    audit_share: float | None = None
    conversion: str | None = None
    side_effects: bool | None = None
    graphs: bool | None = None
    batch_buckets: list[int] | bool | None = None
    raw: dict[Any, Any] = field(default_factory=dict)
    text: str = ""
    needed: tuple[str, ...] = ()
    quoted: tuple[str, ...] = ()
    has_file: bool = False
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, text: bytes, label: str) -> ModelConfig:
        """Reads a yaml file. ``label`` is what to call it in messages, such as ``"m.mar: model-config.yaml"``.

        Raises:
            InvalidModelError: not YAML, too large, or aliases that multiply.
        """
        decoded = _decoded(text, label)
        raw = _load(decoded, label)
        config = cls(raw=raw, text=decoded, has_file=True)
        for key, value in raw.items():
            # An empty value ("batchSize:") means what leaving the key out means.
            if key in _KEYS and value is not None:
                config._set(key, value, label)
        for key in itertools.islice(raw.keys() - _KEYS.keys() - _HANDLER_KEYS, _NEAR_MISS_COUNT_MAX):
            config._maybe_warn(key, label)
        config._check_together(label)
        isolation = raw.get("isolation")
        if isolation not in (None, "process", "thread"):
            config.warnings.append(f"{label}: isolation must be process (worker processes, the default) or thread, not "
                                   f"{shown(str(isolation))}; it is left out")  # fmt: skip
        return config

    def _set(self, key: str, value: Any, label: str) -> None:
        attribute, read = _KEYS[key]
        if isinstance(value, str) and read in (_integer, _boolean):
            self.quoted += (attribute,)
        try:
            setattr(self, attribute, read(f"{label}: {key}", attribute, value, self.warnings))
        except InvalidModelError as error:
            self.warnings.append(f"{error.message}; it is left out")
            if key in _OWN_KEYS:
                self.needed += (error.message,)

    def with_input(self, value: Any, label: str) -> ModelConfig:
        """The same with ``input``, which the file does not have: as if it stood at its end."""
        raw = {**self.raw, "input": value}
        line = yaml.safe_dump({"input": value}, default_flow_style=None, sort_keys=False)
        text = f"{self.text.rstrip()}\n{line}".lstrip()
        try:
            is_same = read_yaml(text) == raw
        except yaml.YAMLError:
            is_same = False
        text = text if is_same else yaml.safe_dump(raw, sort_keys=False)
        completed = ModelConfig.parse(text.encode(), label)
        completed.warnings = self.warnings
        return completed

    def leave_out_quoted(self) -> None:
        """Takes back what is in quotes, as TorchServe has it."""
        for attribute in self.quoted:
            setattr(self, attribute, None)

    def _check_together(self, label: str) -> None:
        if (self.workers_min is None) != (self.workers_max is None):
            given, missing = ("minWorkers", "maxWorkers") if self.workers_max is None else ("maxWorkers", "minWorkers")
            self.warnings.append(f"{label}: {given} counts only together with {missing}, as for TorchServe; give both")
        if self.workers_min is not None and self.workers_max is not None and self.workers_min > self.workers_max:
            self.warnings.append(f"{label}: minWorkers ({self.workers_min}) must not be larger than maxWorkers "
                                 f"({self.workers_max}); both are left out")  # fmt: skip
            self.workers_min = self.workers_max = None
        if self.min_batch is not None and self.batch_size is not None and self.min_batch > self.batch_size:
            problem = f"{label}: minBatch ({self.min_batch}) must not be larger than batchSize ({self.batch_size})"
            self.warnings.append(f"{problem}; it is left out")
            self.needed += (problem,)
            self.min_batch = None

    @staticmethod
    def key_of(attribute: str) -> str:
        """What ``attribute`` is called in the file."""
        return next(key for key, (name, _) in _KEYS.items() if name == attribute)

    def _maybe_warn(self, key: object, label: str) -> None:
        if not isinstance(key, str) or len(key) > _KEY_SIZE_MAX:
            return
        plain = {known.lower(): known for known in _KEYS}
        close = difflib.get_close_matches(key.lower().replace("_", "").replace("-", ""), plain, n=1, cutoff=0.85)
        if close:
            self.warnings.append(
                f"{label}: unknown key {shown(key)}, did you mean {plain[close[0]]}? "
                "It is passed to the handler and changes nothing else"
            )


def config_lines(text: str) -> dict[str, int]:
    """Top-level key -> its line, counted from 1, of a file that `ModelConfig.parse` has read without error."""
    root = yaml.compose(text, Loader=_QuickLoader)
    if not isinstance(root, yaml.MappingNode):
        return {}
    return {key.value: key.start_mark.line + 1 for key, _ in root.value if isinstance(key, yaml.ScalarNode)}


_Read = Callable[[str, str, Any, list[str]], Any]


def _integer(label: str, attribute: str, value: Any, warnings: list[str]) -> int:
    if attribute != "parallel_level":  # which cannot be followed, and TorchServe does not when it is in quotes
        value = _unquoted(label, value, warnings)
    most = BOUNDS[attribute].most
    if isinstance(value, int) and most < value <= _INT_MAX:  # TorchServe takes it
        warnings.append(f"{label} is {value}, more than {most}; it is taken as {most}")
        value = most
    return validate_setting(attribute, value, label=label)


def _unquoted(label: str, value: Any, warnings: list[str]) -> Any:
    """The number or boolean that a text in quotes is; anything else as it is."""
    if not isinstance(value, str):
        return value
    plain: Any = {"true": True, "false": False}.get(value.strip().lower())
    if plain is None and _QUOTED_NUMBER.fullmatch(value):
        plain = int(value)
    if plain is None:
        return value
    warnings.append(f"{label} is {shown(value)} in quotes; it is taken as {str(plain).lower()}")
    return plain


def _boolean(label: str, _: str, value: Any, warnings: list[str]) -> bool:
    value = _unquoted(label, value, warnings)
    if not isinstance(value, bool):
        raise InvalidModelError(f"{label} must be true or false, not {shown(str(value))}")
    return value


def _one_of(*choices: str) -> _Read:
    def read(label: str, _: str, value: Any, __: list[str]) -> str:
        if not isinstance(value, str) or value not in choices:
            raise InvalidModelError(f"{label} must be one of {', '.join(choices)}, not {shown(str(value))}")
        return value

    return read


def _device_type(label: str, _: str, value: Any, warnings: list[str]) -> str | None:
    if not isinstance(value, str):
        raise InvalidModelError(f"{label} must be one of {', '.join(DEVICE_TYPES)}, not {shown(str(value))}")
    if value not in DEVICE_TYPES:  # other servers' device names: archives with them must still load
        warnings.append(f"{label}: {shown(value)} is none of {', '.join(DEVICE_TYPES)}; the server chooses the device")
        return None
    return value


def _device_ids(label: str, _: str, value: Any, warnings: list[str]) -> list[int]:
    if not isinstance(value, list) or not 1 <= len(value) <= DEVICE_COUNT_MAX:
        found = f"a list of {len(value)}" if isinstance(value, list) else shown(str(value))
        raise InvalidModelError(f"{label} must be a list of 1 to {DEVICE_COUNT_MAX} device numbers, not {found}")
    return [validate_setting("device_id", _unquoted(label, item, warnings), label=label) for item in value]


def _buckets(label: str, _: str, value: Any, warnings: list[str]) -> list[int] | bool:
    """``false``, or sizes of batches."""
    value = _unquoted(label, value, warnings)
    if isinstance(value, bool):
        return value
    if not isinstance(value, list) or not 1 <= len(value) <= BUCKET_COUNT_MAX:
        found = f"a list of {len(value)}" if isinstance(value, list) else shown(str(value))
        raise InvalidModelError(
            f"{label} must be true, false or a list of 1 to {BUCKET_COUNT_MAX} batch sizes such as [1, 8, 32], "
            f"not {found}"
        )
    return sorted({validate_setting("batch_size", _unquoted(label, item, warnings), label=label) for item in value})


def _mapping(label: str, _: str, value: Any, __: list[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidModelError(f"{label} must be a mapping, not {shown(str(value))}")
    return value


def _inputs(label: str, _: str, value: Any, __: list[str]) -> InputSpec | list[InputSpec]:
    """One input, or a list of them with a name each."""
    try:
        inputs = read_inputs(value, label)
    except InputConfigError as error:
        raise InvalidModelError(str(error)) from error
    return inputs if isinstance(value, list) else inputs[0]


def _positive(label: str, _: str, value: Any, __: list[str]) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidModelError(f"{label} must be a number above 0, such as 0.05, not {shown(str(value))}")
    return float(value)


def _share(of: str, example: str) -> _Read:
    """``"0.1%"`` or 0.001."""

    def read(label: str, _: str, value: Any, __: list[str]) -> float:
        found = _PERCENT.fullmatch(value) if isinstance(value, str) else None
        share = float(found[1]) / 100 if found else value
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
            raise InvalidModelError(
                f"{label} must be a share of {of}, from 0% to 100% or from 0 to 1, such as {example}, not "
                f"{shown(str(value))}"
            )
        return float(share)

    return read


_KEYS: dict[str, tuple[str, _Read]] = {
    "minWorkers": ("workers_min", _integer),
    "maxWorkers": ("workers_max", _integer),
    "batchSize": ("batch_size", _integer),
    "maxBatchDelay": ("max_batch_delay_ms", _integer),
    "minBatch": ("min_batch", _integer),
    "responseTimeout": ("response_timeout_s", _integer),
    "startupTimeout": ("startup_timeout_s", _integer),
    "deviceType": ("device_type", _device_type),
    "deviceIds": ("device_ids", _device_ids),
    "jobQueueSize": ("queue_size", _integer),
    "precision": ("precision", _one_of(*PRECISIONS)),
    "memoryFormat": ("memory_format", _one_of(*MEMORY_FORMATS)),
    "exif": ("exif", _boolean),
    "jpegDecoder": ("jpeg_decoder", _one_of(*JPEG_DECODERS)),
    "input": ("input", _inputs),
    "maxRetryTimeoutInSec": ("retry_timeout_max_s", _integer),
    "clientTimeoutInMills": ("client_timeout_ms", _integer),
    "parallelType": ("parallel_type", _one_of(*PARALLEL_TYPES)),
    "parallelLevel": ("parallel_level", _integer),
    "torchrun": ("torchrun", _mapping),
    "useJobTicket": ("use_job_ticket", _boolean),
    "continuousBatching": ("continuous_batching", _boolean),
    "sequenceBatching": ("sequence_batching", _boolean),
    "sequenceMaxIdleMSec": ("sequence_idle_max_ms", _integer),
    "sequenceTimeoutMSec": ("sequence_timeout_ms", _integer),
    "maxSequenceJobQueueSize": ("sequence_queue_size", _integer),
    "maxNumSequence": ("sequence_count_max", _integer),
    "asyncCommunication": ("async_communication", _boolean),
    "useVenv": ("use_venv", _boolean),
    "batchDependent": ("batch_dependent", _one_of(*BATCH_DEPENDENCES)),
    "precisionErrorMax": ("precision_error_max", _positive),
    "precisionAgreementMin": ("precision_agreement_min", _share("the calibration inputs", "0.99")),
    "backend": ("backend", _one_of(*BACKENDS)),
    "backendTrialSeconds": ("backend_trial_s", _integer),
    "audit": ("audit_share", _share("the requests", "0.1%")),
    "conversion": ("conversion", _one_of(*CONVERSIONS)),
    "sideEffects": ("side_effects", _boolean),
    "graphs": ("graphs", _boolean),
    "batchBuckets": ("batch_buckets", _buckets),
}


def read_yaml(text: str) -> Any:
    """What ``text``, which `ModelConfig.parse` has read before, says: as `yaml.safe_load` does.

    Raises:
        yaml.YAMLError: it is not plain YAML.
    """
    # Neither loader builds Python objects.
    if len(text) > _EXACT_SIZE_MAX:
        return yaml.load(text, Loader=_QuickLoader)
    try:
        return yaml.load(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        try:
            return yaml.load(text, Loader=_QuickLoader)
        except yaml.YAMLError:
            raise error from None


def _decoded(text: bytes, label: str) -> str:
    if len(text) > LIMITS.config_size_max:
        refuse(
            label, f"has {len(text)} bytes, more than the {LIMITS.config_size_max} allowed; put data into an extra file"
        )
    encoding = "utf-16" if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return text.decode(encoding)
    except UnicodeDecodeError as error:
        refuse(label, f"is not {encoding.removesuffix('-sig').upper()} (byte {error.start}); save it as UTF-8")


def _load(text: str, label: str) -> dict[Any, Any]:
    try:
        for loader in (_QuickLoader, yaml.SafeLoader)[: 1 if len(text) > _EXACT_SIZE_MAX else 2]:
            with contextlib.suppress(yaml.YAMLError):  # `read_yaml` raises it again if none can read it
                _check_expansion(text, label, loader)
        raw = read_yaml(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        refuse(label, f"is not plain YAML: {shown(error.problem or 'broken')}{where}")
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError) as error:
        refuse(label, f"is not plain YAML: {shown(str(error).splitlines()[0] if str(error) else type(error).__name__)}")
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        refuse(label, f"must be a mapping such as `batchSize: 8`, not a {type(raw).__name__}")
    return raw


def _check_expansion(text: str, label: str, loader: Any) -> None:
    """Counts values as if aliases were copies, from the event stream, before anything is built.

    A few hundred bytes of aliases of aliases stand for billions of values: harmless in memory, since they are
    shared, but not to whoever walks or prints the configuration later.
    """
    sizes: dict[str, int | None] = {}  # anchor -> values below it; None while it is still open
    open_nodes: list[tuple[str | None, int]] = []  # (anchor, values below so far)
    total = 0

    def count(size: int) -> None:
        nonlocal total
        total += size
        if open_nodes:
            anchor, below = open_nodes[-1]
            open_nodes[-1] = (anchor, below + size)
        if total > _NODE_COUNT_MAX:
            refuse(label, f"stands for more than {_NODE_COUNT_MAX} values; use fewer aliases or put data into a file")

    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            size = sizes.get(event.anchor)
            if size is None:
                refuse(label, f"alias {shown(str(event.anchor))} stands for itself or for nothing; write the value out")
            count(size)
        elif isinstance(event, yaml.ScalarEvent):
            if event.anchor:
                sizes[event.anchor] = 1
            count(1)
        elif isinstance(event, yaml.CollectionStartEvent):
            if len(open_nodes) >= _DEPTH_MAX:
                refuse(label, f"is nested more than {_DEPTH_MAX} levels deep; make it flatter")
            if event.anchor:
                sizes[event.anchor] = None
            count(1)
            open_nodes.append((event.anchor, 0))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, below = open_nodes.pop()
            if anchor:
                sizes[anchor] = below + 1
            if open_nodes:
                outer, outer_below = open_nodes[-1]
                open_nodes[-1] = (outer, outer_below + below)
