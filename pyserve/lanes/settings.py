"""What can be changed of a model while it runs, and where the first values come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyserve.archive.model_config import ModelConfig
from pyserve.config.bounds import validate_setting
from pyserve.config.config import Config
from pyserve.config.keys import TIMEOUT_MAX_S
from pyserve.cpu_budget import cpu_budget
from pyserve.errors import BadRequestError, InvalidModelError

# Management parameter -> attribute of ModelSettings.
PARAMETERS = {
    "batch_size": "batch_size",
    "max_batch_delay": "max_batch_delay_ms",
    "min_batch": "min_batch",
    "response_timeout": "response_timeout_s",
    "startup_timeout": "startup_timeout_s",
    "job_queue_size": "queue_size",
    "client_timeout": "client_timeout_ms",
}
# Key of config.properties' ``models`` block -> attribute.
BLOCK_KEYS = {
    "batchSize": "batch_size",
    "maxBatchDelay": "max_batch_delay_ms",
    "responseTimeout": "response_timeout_s",
    "startupTimeout": "startup_timeout_s",
}
# Attributes that model-config.yaml sets under the same names.
YAML_ATTRIBUTES = (*PARAMETERS.values(), "use_job_ticket")
_TIMEOUTS = frozenset({"response_timeout_s", "startup_timeout_s"})


@dataclass
class ModelSettings:
    """Times in the unit of the name. ``client_timeout_ms`` is 0 when a request may wait as long as it may run;
    ``use_job_ticket`` refuses what no idle worker takes at once.
    """

    workers_min: int = 1
    workers_max: int = 1
    batch_size: int = 1
    max_batch_delay_ms: int = 100
    min_batch: int = 1
    response_timeout_s: int = 120
    startup_timeout_s: int = 120
    queue_size: int = 100
    client_timeout_ms: int = 0
    use_job_ticket: bool = False

    @property
    def queue_limit_s(self) -> float:
        """How long a request may wait before it runs."""
        return self.client_timeout_ms / 1e3 or float(self.response_timeout_s)

    @property
    def least_limit_s(self) -> float:
        """No run of the network is too long that is shorter."""
        return float(min(self.response_timeout_s, self.startup_timeout_s))

    @property
    def queue_limit_source(self) -> str:
        return "clientTimeoutInMills" if self.client_timeout_ms else "response_timeout"

    def checked(self, changes: Mapping[str, int], *, queue_size_max: int) -> dict[str, int]:
        """``changes`` (keys of PARAMETERS) as attributes and values.

        Raises:
            BadRequestError: a value is out of range, by itself or beside the others.
        """
        wanted = {
            PARAMETERS[name]: validate_setting(PARAMETERS[name], value, label=name, error=BadRequestError)
            for name, value in changes.items()
        }
        batch_size = wanted.get("batch_size", self.batch_size)
        min_batch = wanted.get("min_batch", self.min_batch)
        if min_batch > batch_size:
            raise BadRequestError(f"min_batch ({min_batch}) must not be larger than batch_size ({batch_size})")
        if wanted.get("queue_size", 0) > queue_size_max:
            raise BadRequestError(
                f"job_queue_size can be raised to {queue_size_max} while the model runs; for more, unregister it and "
                "set jobQueueSize in its model-config.yaml"
            )
        return wanted


def first_settings(
    config: Config, yaml: ModelConfig, block: Mapping[str, Any], parameters: Mapping[str, int], label: str
) -> ModelSettings:
    """Parameter, else model-config.yaml, else the ``models`` block, else the default. Workers are set elsewhere.

    ``compat=strict`` lets model-config.yaml's time limits go before the parameters; ``debug`` lifts them.

    Args:
        label: the archive's name, for messages.

    Raises:
        InvalidModelError: values that do not go together.
    """
    settings = ModelSettings(
        response_timeout_s=config.default_response_timeout,
        startup_timeout_s=config.default_startup_timeout,
        queue_size=config.job_queue_size,
    )
    for key, attribute in BLOCK_KEYS.items():
        value = block.get(key)
        if isinstance(value, int) and value > 0:
            setattr(settings, attribute, value)
    for attribute in YAML_ATTRIBUTES:
        value = getattr(yaml, attribute)
        if value is not None:
            setattr(settings, attribute, value)
    for parameter, value in parameters.items():
        attribute = PARAMETERS[parameter]
        if config.compat == "strict" and attribute in _TIMEOUTS and getattr(yaml, attribute) is not None:
            continue  # there model-config.yaml has the last word on these two
        setattr(settings, attribute, value)
    if config.debug:
        settings.response_timeout_s = settings.startup_timeout_s = TIMEOUT_MAX_S
    if settings.min_batch > settings.batch_size:
        raise InvalidModelError(
            f"{label}: minBatch ({settings.min_batch}) must not be larger than the batch size ({settings.batch_size})"
        )
    return settings


def first_workers(
    config: Config, yaml: ModelConfig, block: Mapping[str, Any], asked: int | None, *, gpus: int = 0
) -> tuple[int, int]:
    """(workers_min, workers_max) to start with; ``asked`` is None at start-up.

    One by default, as its threads take all cores, or one per GPU. Under ``compat=strict`` one per GPU, or per CPU if
    there are none.

    Args:
        gpus: how many the model may use; under ``compat=strict`` how many there are.
    """
    if config.debug:
        return 1, 1
    low, high = yaml.workers_min, yaml.workers_max
    if low is None or high is None:
        low, high = block.get("minWorkers"), block.get("maxWorkers")
    if isinstance(low, int) and isinstance(high, int) and 0 < low <= high:
        return low, high
    default = config.default_workers_per_model or gpus or 1
    if config.compat == "strict" and not config.default_workers_per_model:
        default = gpus or cpu_budget(config.cpu_budget)
    count = default if asked is None else max(0, asked)
    return count, count
