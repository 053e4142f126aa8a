"""Where a model's settings come from, and what a change of them is checked for."""

from __future__ import annotations

from typing import Any

import pytest

from pyserve.archive.model_config import ModelConfig
from pyserve.config.config import Config
from pyserve.errors import BadRequestError, InvalidModelError
from pyserve.lanes.settings import PARAMETERS, ModelSettings, first_settings, first_workers

# attribute, management parameter, key of model-config.yaml, key of the models block, attribute of Config, default
SOURCES = [
    ("batch_size", "batch_size", "batchSize", "batchSize", None, 1),
    ("max_batch_delay_ms", "max_batch_delay", "maxBatchDelay", "maxBatchDelay", None, 100),
    ("min_batch", "min_batch", "minBatch", None, None, 1),
    ("response_timeout_s", "response_timeout", "responseTimeout", "responseTimeout", "default_response_timeout", 120),
    ("startup_timeout_s", "startup_timeout", "startupTimeout", "startupTimeout", "default_startup_timeout", 120),
    ("queue_size", "job_queue_size", "jobQueueSize", None, "job_queue_size", 100),
    ("client_timeout_ms", "client_timeout", "clientTimeoutInMills", None, None, 0),
]


def settings(
    config: Config | None = None, yaml: str = "", block: dict[str, Any] | None = None, **parameters: Any
) -> ModelSettings:
    return first_settings(config or Config(), ModelConfig.parse(yaml.encode(), "m.mar"), block or {}, parameters, "m")


@pytest.mark.parametrize("row", SOURCES, ids=lambda row: row[0])
def test_parameter_beats_yaml_beats_block_beats_config_beats_default(
    row: tuple[str, str, str, str | None, str | None, int],
) -> None:
    attribute, parameter, key, block_key, config_key, default = row
    config = Config(**{config_key: 11}) if config_key else Config()  # type: ignore[arg-type]
    block = {block_key: 12} if block_key else {}
    # A minimum needs a batch size that it fits.
    room = "batchSize: 99\n" if attribute == "min_batch" else ""
    yaml = f"{room}{key}: 13\n"

    def value(*sources: Any, **parameters: Any) -> int:
        return int(getattr(settings(*sources, **parameters), attribute))

    assert value() == default
    assert value(config) == (11 if config_key else default)
    assert value(config, "", block) == (12 if block_key else 11 if config_key else default)
    assert value(config, yaml, block) == 13
    parameters: dict[str, Any] = {parameter: 14}
    assert value(config, yaml, block, **parameters) == 14


def test_every_parameter_is_in_the_table() -> None:
    assert {row[1]: row[0] for row in SOURCES} == PARAMETERS


@pytest.mark.parametrize("value", [0, -1, "4", None, 2.5])
def test_a_senseless_value_of_the_block_is_passed_over(value: object) -> None:
    assert settings(block={"batchSize": value}).batch_size == 1


def test_a_minimum_above_the_batch_size_is_refused() -> None:
    with pytest.raises(InvalidModelError, match=r"minBatch .4.*larger than"):
        settings(yaml="minBatch: 4\n", batch_size=2)


def test_a_minimum_above_the_batch_size_beside_it_is_left_out_and_refused_where_it_counts() -> None:
    config = ModelConfig.parse(b"minBatch: 4\nbatchSize: 2\n", "m.mar")
    assert (config.min_batch, config.batch_size) == (None, 2)
    assert len(config.needed) == 1
    assert "minBatch (4) must not be larger than batchSize (2)" in config.needed[0]


def test_the_client_timeout_limits_the_queue_and_else_the_response_timeout() -> None:
    assert (ModelSettings().queue_limit_s, ModelSettings().queue_limit_source) == (120, "response_timeout")
    with_limit = settings(yaml="clientTimeoutInMills: 1500\n")
    assert (with_limit.queue_limit_s, with_limit.queue_limit_source) == (1.5, "clientTimeoutInMills")


@pytest.mark.parametrize(
    ("yaml", "block", "default", "asked", "workers"),
    [
        ("", {}, 0, None, (1, 1)),
        ("", {}, 3, None, (3, 3)),
        ("", {}, 3, 0, (0, 0)),
        ("", {}, 3, -1, (0, 0)),
        ("", {}, 3, 2, (2, 2)),
        ("", {"minWorkers": 4, "maxWorkers": 5}, 3, 2, (4, 5)),
        ("", {"minWorkers": 4}, 3, 2, (2, 2)),
        ("", {"minWorkers": 5, "maxWorkers": 4}, 3, 2, (2, 2)),
        ("minWorkers: 6\nmaxWorkers: 7\n", {"minWorkers": 4, "maxWorkers": 5}, 3, 2, (6, 7)),
        ("minWorkers: 6\n", {"minWorkers": 4, "maxWorkers": 5}, 3, 2, (4, 5)),
    ],
)
def test_the_first_workers(
    yaml: str, block: dict[str, Any], default: int, asked: int | None, workers: tuple[int, int]
) -> None:
    config = Config(default_workers_per_model=default)
    assert first_workers(config, ModelConfig.parse(yaml.encode(), "m.mar"), block, asked) == workers


def test_a_change_is_checked_before_anything_is_changed() -> None:
    current = ModelSettings(batch_size=4)
    assert current.checked({"batch_size": 8, "min_batch": 8}, queue_size_max=100) == {"batch_size": 8, "min_batch": 8}
    for changes, text in [
        ({"min_batch": 5}, "must not be larger"),
        ({"batch_size": 0}, "batch_size"),
        ({"job_queue_size": 101}, "raised to 100"),
        ({"response_timeout": -1}, "response_timeout"),
    ]:
        with pytest.raises(BadRequestError, match=text):
            current.checked(changes, queue_size_max=100)
    assert current == ModelSettings(batch_size=4)
