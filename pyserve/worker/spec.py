"""What a process needs to know to load a handler and call it: the server says it once, when the process starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from pyserve.archive.archive import Archive
from pyserve.archive.model_config import read_yaml
from pyserve.archive.model_folder import Originals
from pyserve.errors import JsonObject

# How the handler is called.
BATCH = "batch"  # one batch after the other
CONTINUOUS = "continuous"  # requests join and leave between two calls (continuousBatching)
ASYNC = "async"  # a coroutine per request, many at a time (asyncCommunication)


@dataclass(frozen=True)
class WorkerSpec:
    """One model as its worker processes see it. Fits JSON.

    Attributes:
        name, version: of the model.
        model_dir: folder with the unpacked archive, weights included, which handlers may write to.
        originals: of large files in it, see `pyserve.archive.model_folder`.
        handler: as in the manifest: a built-in's name, ``file.py`` or ``file.py:function``.
        manifest: MANIFEST.json as a dict, as handlers see it; None when there is none.
        config_text: of model-config.yaml. What YAML can say does not fit JSON: dates, bytes, numbers as keys.
        batch_size: the most requests of one call when the process starts.
        gpu_id: index of the GPU, None on a CPU.
        intra_op_threads: of torch, when the process starts.
        decode_input: whether JSON and text bodies are decoded (``decode_input_request``).
        envelope: ``service_envelope``; None for none.
        lenient: whether input that a handler cannot be given is left out, as in TorchServe; else it is refused.
        limit_max_image_pixels: whether pictures above Pillow's pixel limit are refused.
        isolate_errors: whether a batch that failed is retried item by item.
        has_side_effects: nothing that the handler has seen is run a second time.
        mode: BATCH, CONTINUOUS or ASYNC.
        nan_as_null: whether NaN in a result is answered as null; else as NaN, which is no JSON.
        max_response_size: bytes; a larger answer is an error.
        header_keys: the three names of the sequence headers: id, start, end.
        metrics_config: path of the metrics.yaml, None for the built-in one.
        keeps_each_metric: every value is told, for the log files.
        watch: reload handler code when a file of model_dir changes.
        is_audit: runs requests again for the audit, see `handlers.plain`.
        startup_timeout_s: what loading may take, all in all.
        rehearses: whether the handler is tried with samples before it counts as loaded, see `rehearsal`.
        tries_batches: whether batches are tried then; not if another worker of the model has done so.
    """

    name: str
    version: str
    model_dir: str
    handler: str
    originals: Originals = field(default_factory=dict)
    manifest: dict[str, Any] | None = field(default_factory=dict)
    config_text: str = ""
    batch_size: int = 1
    gpu_id: int | None = None
    intra_op_threads: int = 1
    decode_input: bool = True
    envelope: str | None = None
    lenient: bool = False
    limit_max_image_pixels: bool = True
    isolate_errors: bool = True
    has_side_effects: bool = False
    mode: str = BATCH
    nan_as_null: bool = True
    max_response_size: int = 6_553_500
    header_keys: tuple[str, str, str] = (
        "ts_request_sequence_id", "ts_request_sequence_start", "ts_request_sequence_end",
    )  # fmt: skip
    metrics_config: str | None = None
    keeps_each_metric: bool = False
    watch: bool = False
    is_audit: bool = False
    startup_timeout_s: float = 120.0
    rehearses: bool = True
    tries_batches: bool = True

    @classmethod
    def of(
        cls, archive: Archive, *, name: str | None = None, handler: str | None = None, **settings: Any
    ) -> WorkerSpec:
        """The spec of an opened archive, in the folder of its own, whose weights are put beside its other files.

        Args:
            name: the name it is served under; the manifest's by default.
            handler: in place of the manifest's.
            settings: further attributes.
        """
        folder = archive.own_folder(with_weights=True)
        config = archive.config
        mode = CONTINUOUS if config.continuous_batching else ASYNC if config.async_communication else BATCH
        manifest = archive.manifest
        return cls(
            name=name or manifest.model_name,
            version=manifest.model_version,
            model_dir=str(folder.resolve()),
            handler=handler or manifest.handler,
            originals=archive.originals,
            **{"manifest": manifest.raw, "config_text": config.text, "mode": mode, **settings},
        )

    @cached_property
    def config(self) -> dict[Any, Any]:
        """model-config.yaml as handlers see it: as `yaml.safe_load` gives it. Read here, in the worker, once."""
        return read_yaml(self.config_text) or {}

    def to_json(self) -> JsonObject:
        """A JSON object from which `from_json` makes an equal spec."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: JsonObject) -> WorkerSpec:
        """The inverse of `to_json`."""
        return cls(**{**values, "header_keys": tuple(values["header_keys"])})
