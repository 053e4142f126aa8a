"""``model-config.yaml``: what is typed, what is refused, and that reading it runs nothing."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import pytest
import yaml

from pyserve.archive.model_config import ModelConfig, read_yaml
from pyserve.config.bounds import BOUNDS, validate_setting
from pyserve.errors import BadRequestError, InvalidModelError
from pyserve.input_config import InputSpec

LABEL = "m.mar: model-config.yaml"


def parse(text: str) -> ModelConfig:
    return ModelConfig.parse(text.encode(), LABEL)


def test_every_key_becomes_its_attribute() -> None:
    config = parse("""
minWorkers: 1
maxWorkers: 4
batchSize: 8
maxBatchDelay: 100
minBatch: 2
responseTimeout: 120
startupTimeout: 60
deviceType: gpu
deviceIds: [0, 2]
jobQueueSize: 1000
precision: bf16
memoryFormat: channels_last
jpegDecoder: torchvision
exif: true
input: {dtype: float32, shape: [3, -1, 224]}
maxRetryTimeoutInSec: 300
clientTimeoutInMills: 0
parallelType: tp
parallelLevel: 2
torchrun: {nproc-per-node: 2}
useJobTicket: true
continuousBatching: false
sequenceBatching: true
sequenceMaxIdleMSec: 10
sequenceTimeoutMSec: 20
maxSequenceJobQueueSize: 3
maxNumSequence: 4
asyncCommunication: true
useVenv: false
batchDependent: allowed
precisionErrorMax: 0.05
precisionAgreementMin: 99.5%
backend: openvino
backendTrialSeconds: 5
audit: 0.1%
conversion: script
sideEffects: true
graphs: false
batchBuckets: [8, 1, 4, 8]
handler: {profile: true}
""")
    assert dataclasses.asdict(config) | {"raw": {}, "text": ""} == {
        "workers_min": 1,
        "workers_max": 4,
        "batch_size": 8,
        "max_batch_delay_ms": 100,
        "min_batch": 2,
        "response_timeout_s": 120,
        "startup_timeout_s": 60,
        "device_type": "gpu",
        "device_ids": [0, 2],
        "queue_size": 1000,
        "precision": "bf16",
        "memory_format": "channels_last",
        "jpeg_decoder": "torchvision",
        "exif": True,
        "input": {
            "dtype": "float32",
            "shape": (3, -1, 224),
            "name": "",
            "sizes": ((3, 3), (1, None), (224, 224)),
            "values": None,
            "same": (),
            "pad_to": (),
            "pad_value": 0,
        },
        "retry_timeout_max_s": 300,
        "client_timeout_ms": 0,
        "parallel_type": "tp",
        "parallel_level": 2,
        "torchrun": {"nproc-per-node": 2},
        "use_job_ticket": True,
        "continuous_batching": False,
        "sequence_batching": True,
        "sequence_idle_max_ms": 10,
        "sequence_timeout_ms": 20,
        "sequence_queue_size": 3,
        "sequence_count_max": 4,
        "async_communication": True,
        "use_venv": False,
        "batch_dependent": "allowed",
        "precision_error_max": 0.05,
        "precision_agreement_min": 0.995,
        "backend": "openvino",
        "backend_trial_s": 5,
        "audit_share": 0.001,
        "conversion": "script",
        "side_effects": True,
        "graphs": False,
        "batch_buckets": [1, 4, 8],
        "raw": {},
        "text": "",
        "needed": (),
        "quoted": (),
        "has_file": True,
        "warnings": [],
    }
    assert config.raw["handler"] == {"profile": True}


@pytest.mark.parametrize("text", ["", "# nothing\n", "batchSize:\n"])
def test_empty_file_sets_nothing_but_is_a_file(text: str) -> None:
    config = parse(text)
    assert config.has_file and config.batch_size is None
    assert config == dataclasses.replace(ModelConfig(), raw=config.raw, text=text, has_file=True)


def test_no_file_is_all_none() -> None:
    config = ModelConfig()
    values = dataclasses.asdict(config)
    assert (values.pop("raw"), values.pop("has_file"), values.pop("warnings"), values.pop("text")) == (
        {},
        False,
        [],
        "",
    )
    assert (values.pop("needed"), values.pop("quoted")) == ((), ())
    assert set(values.values()) == {None}


@pytest.mark.parametrize(
    "line",
    [
        "minWorkers: -1",
        "minWorkers: two",
        "minWorkers: 1.0",
        "minWorkers: true",
        "batchSize: -1",
        "batchSize: 0",
        "batchSize: 2147483648",
        "batchSize: [8]",
        "batchSize: {a: 1}",
        "maxBatchDelay: .inf",
        "maxBatchDelay: .nan",
        "maxBatchDelay: -1",
        "responseTimeout: 0",
        "startupTimeout: 0",
        "deviceIds: 3",
        "deviceIds: []",
        "deviceIds: [-1]",
        "deviceIds: [a]",
        "deviceIds: {0: 1}",
        "deviceIds: [1024]",
        "deviceIds: [true]",
        "deviceType: 3",
        "jobQueueSize: 0",
        "precision: int4",
        "precision: 16",
        "memoryFormat: nhwc",
        "jpegDecoder: gpu",
        "input: 3",
        "input: {}",
        "input: {dtype: float32}",
        "input: {dtype: complex, shape: [3]}",
        "input: {dtype: [1], shape: [3]}",
        "input: {shape: 3}",
        "input: {shape: [0]}",
        "input: {shape: [-2]}",
        "input: {shape: [1.5]}",
        "input: {shape: [true]}",
        "input: {shape: [65536, 65536]}",
        "input: {shape: [1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]}",
        "input: {shape: [3], size: 4}",
        "input: {shape: [-1], pad_to: 4}",
        "input: {shape: [-1], pad_to: [8, 4]}",
        "input: {shape: [-1], pad_to: [0]}",
        "input: {shape: [3], pad_to: [4]}",
        "input: {shape: [-1, -1], pad_to: [4]}",
        "input: {shape: [-1], pad_to: [99999999999]}",
        'input: {shape: [-1], pad_to: [4], pad_value: "x"}',
        "parallelType: dp",
        "useVenv: 1",
        'useJobTicket: "yes"',
        "torchrun: 3",
        'input: {shape: ["4..2"]}',
        'input: {shape: [".."]}',
        "input: {shape: [0..4]}",
        "input: {shape: [1..99999999999]}",
        "input: {dtype: int64, shape: [2..4], vocabulary: 0}",
        "input: {shape: [2], values: [1, 0]}",
        "input: {shape: [2], same: length}",
        "input: []",
        "input: [{name: a, shape: [1]}, {name: a, shape: [1]}]",
        "batchDependent: yes",
        "batchDependent: forbidden",
        "conversion: jit",
        "conversion: 1",
        "audit: 101%",
        "audit: -1%",
        "audit: 1.5",
        "audit: .nan",
        "audit: some",
        "audit: true",
        "audit: [1]",
        'audit: "1e-3%"',
        "precisionErrorMax: 0",
        "precisionErrorMax: -0.1",
        "precisionErrorMax: .inf",
        "precisionErrorMax: 5%",
        "clientTimeoutInMills: -1",
        f"batchSize: 0x{'f' * 5000}",
        "minBatch: 0",
        "graphs: often",
        "batchBuckets: 8",
        "batchBuckets: []",
        "batchBuckets: [0]",
        "batchBuckets: [a]",
        "batchBuckets: [1.5]",
        "backend: tensorrt",
        "backend: [openvino]",
        "backendTrialSeconds: -1",
        "backendTrialSeconds: 1.5",
        "precisionAgreementMin: 101%",
        "precisionAgreementMin: most",
    ],
)
def test_bad_value_is_left_out_and_its_key_named(line: str) -> None:
    config = parse(line)
    key = line.partition(":")[0]
    assert config.warnings[0].startswith(f"{LABEL}: {key}") and config.warnings[0].endswith("it is left out")
    assert len(config.warnings) == 1 and len(config.warnings[0]) < 400
    # Of pyserve's own keys a built-in handler is told; TorchServe's are left out, as it does.
    is_own = key in {
        "minBatch", "precision", "memoryFormat", "input", "batchDependent", "precisionErrorMax", "audit", "conversion",
        "sideEffects", "jpegDecoder", "graphs", "batchBuckets", "backend", "backendTrialSeconds",
        "precisionAgreementMin",
    }  # fmt: skip
    assert [f"{text}; it is left out" for text in config.needed] == (config.warnings if is_own else [])
    unset = dataclasses.replace(config, raw={}, text="", needed=(), quoted=(), warnings=[], has_file=False)
    assert unset == ModelConfig()


@pytest.mark.parametrize(
    ("line", "attribute", "value"),
    [
        ('batchSize: "8"', "batch_size", 8),
        ("maxBatchDelay: ' 50 '", "max_batch_delay_ms", 50),
        ("minWorkers: '2'", "workers_min", 2),
        ("useJobTicket: 'true'", "use_job_ticket", True),
        ("useVenv: 'False'", "use_venv", False),
    ],
)
def test_value_in_quotes_is_what_it_says_but_for_strict(line: str, attribute: str, value: object) -> None:
    config = parse(line)
    assert getattr(config, attribute) == value
    said = [each for each in config.warnings if "counts only together" not in each]
    assert len(said) == 1 and "in quotes" in said[0] and config.needed == ()
    config.leave_out_quoted()
    assert getattr(config, attribute) is None


@pytest.mark.parametrize("text", ['"8.5"', "'yes'", '"0x8"', "''", "'８'", "'" + "9" * 19 + "'"])
def test_text_that_is_no_number_is_left_out(text: str) -> None:
    assert parse(f"batchSize: {text}").batch_size is None
    assert parse(f"useVenv: {text}").use_venv is None


@pytest.mark.parametrize(
    ("line", "attribute", "value"),
    [
        ("batchSize: 100000", "batch_size", 65536),
        ("minWorkers: 1000000000", "workers_min", 1024),
        ("maxBatchDelay: 3600001", "max_batch_delay_ms", 3_600_000),
        ("responseTimeout: 86401", "response_timeout_s", 86_400),
        ("jobQueueSize: 1000001", "queue_size", 1_000_000),
    ],
)
def test_number_that_torchserve_takes_becomes_the_nearest(line: str, attribute: str, value: int) -> None:
    config = parse(line)
    assert getattr(config, attribute) == value
    said = [each for each in config.warnings if "counts only together" not in each]
    assert len(said) == 1 and f"is taken as {value}" in said[0]


def test_parallel_level_in_quotes_is_left_out_as_torchserve_does() -> None:
    assert parse("parallelLevel: '1'").parallel_level is None  # or it could not be served


def test_unknown_isolation_is_a_warning() -> None:
    assert "isolation must be process" in parse("isolation: foo").warnings[0]
    assert parse("isolation: thread").warnings == []


def test_a_million_device_ids_are_left_out() -> None:
    config = parse("deviceIds: [" + "1," * 2000 + "1]")
    assert config.device_ids is None and "deviceIds must be a list of 1 to 1024" in config.warnings[0]
    with pytest.raises(InvalidModelError, match="stands for more than 1000000 values"):
        parse("deviceIds: [" + "1," * 1_000_000 + "1]")


def test_least_above_most_is_left_out() -> None:
    config = parse("minWorkers: 3\nmaxWorkers: 2")
    assert (config.workers_min, config.workers_max, config.needed) == (None, None, ())
    assert "must not be larger than" in config.warnings[0]
    config = parse("minBatch: 9\nbatchSize: 8")
    assert (config.min_batch, config.batch_size, len(config.needed)) == (None, 8, 1)


# What TorchServe's handlers were seen to get, of the same text.
AS_SAFE_LOAD = {
    "a: 2024-01-02\nb: 2024-01-02T03:04:05.123456+02:00\nc: 2024-01-02 03:04:05": {
        "a": date(2024, 1, 2),
        "b": datetime(2024, 1, 2, 3, 4, 5, 123456, tzinfo=timezone(timedelta(seconds=7200))),
        "c": datetime(2024, 1, 2, 3, 4, 5),
    },
    "a: !!binary aGVsbG8=": {"a": b"hello"},
    "a: !!set {x, y}": {"a": {"x", "y"}},
    "a: !!omap [x: 1, y: 2]": {"a": [("x", 1), ("y", 2)]},
    "a: !!pairs [x: 1, x: 2]": {"a": [("x", 1), ("x", 2)]},
    "h: {0: cat, 0.5: x, true: y, null: z, 2024-01-02: d}": {
        "h": {0: "cat", 0.5: "x", True: "y", None: "z", date(2024, 1, 2): "d"}
    },
    "a: 010\nb: 0o10\nc: 0x10\nd: 0b11\ne: 1_000\nf: 089": {
        "a": 8, "b": "0o10", "c": 16, "d": 3, "e": 1000, "f": "089",
    },
    "a: yes\nb: NO\nc: on\nd: y": {"a": True, "b": False, "c": True, "d": "y"},
    "a: 190:20:30\nb: 1e3\nc: 1.0e+3\nd: .inf\ne: 1.10\nf: 1.2.3": {
        "a": 685230, "b": "1e3", "c": 1000.0, "d": math.inf, "e": 1.1, "f": "1.2.3",
    },
    "a: 123456789012345678901234567890": {"a": 123456789012345678901234567890},
    "a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}": {"a": {"p": 1, "q": 2}, "b": {"p": 1, "q": 3}},
    "a: 1\na: 2": {"a": 2},
    'a: "\\ud800\\0"': {"a": "\ud800\0"},
    "l: {" + ", ".join(f"{i}: n{i}" for i in range(30_000)) + "}": {"l": {i: f"n{i}" for i in range(30_000)}},
    "a: " + "[" * 200 + "]" * 200: None,
}  # fmt: skip


@pytest.mark.parametrize("text", AS_SAFE_LOAD, ids=range(len(AS_SAFE_LOAD)))
def test_handlers_get_what_safe_load_gives(text: str) -> None:
    config = parse(text)
    assert repr(config.raw) == repr(read_yaml(config.text))
    if len(text) < 1000:
        assert repr(config.raw) == repr(yaml.safe_load(text))
    if AS_SAFE_LOAD[text] is not None:
        assert config.raw == AS_SAFE_LOAD[text]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_file_of_any_encoding_that_yaml_has(encoding: str) -> None:
    config = ModelConfig.parse("a: hé你😀".encode(encoding), LABEL)
    assert (config.raw, config.text) == ({"a": "hé你😀"}, "a: hé你😀")


def test_tabs_are_taken_where_libyaml_takes_them() -> None:
    assert parse("a:\t1\nb: 2\t# x").raw == {"a": 1, "b": 2}


def test_unknown_device_type_is_ignored_with_a_warning() -> None:
    config = parse("deviceType: neuron")
    assert config.device_type is None
    assert "neuron" in config.warnings[0]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("batchsize", "batchSize"),
        ("batch_size", "batchSize"),
        ("max-batch-delay", "maxBatchDelay"),
        ("responseTimeOut", "responseTimeout"),
        ("minWorker", "minWorkers"),
        ("jobQueuSize", "jobQueueSize"),
    ],
)
def test_near_miss_of_a_key_is_a_warning(key: str, meant: str) -> None:
    config = parse(f"{key}: 3")
    assert len(config.warnings) == 1
    assert f"did you mean {meant}?" in config.warnings[0]
    assert config.raw == {key: 3}


def test_keys_of_handlers_give_no_warning() -> None:
    config = parse("handler: {a: 1}\npt2: {compile: {enable: true}}\nmicro_batching: {}\nmy_own_thing: 3\n3: 4\n")
    assert config.warnings == []


def test_many_unknown_keys_are_quick() -> None:
    config = parse("\n".join(f"batchSizes{index}: 1" for index in range(5000)))
    assert len(config.warnings) <= 100


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system ['touch {}']",
        "!!python/object/new:os.system ['touch {}']",
        "a: !!python/name:os.system",
        "a: !!python/module:os",
        "a: !custom 3",
    ],
)
def test_yaml_builds_no_python_objects(tmp_path: Path, text: str) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(InvalidModelError, match="is not plain YAML"):
        parse(text.replace("{}", str(mark)))
    assert not mark.exists()


def bomb(levels: int = 9, width: int = 9) -> str:
    lines = ["a0: &a0 [" + ", ".join(["lol"] * width) + "]"]
    lines += [f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * width) + "]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(),
        "a: &a {b: &b [1, 2], <<: *a}",
        "a: &a [*a]",
        "a: *nothing",
        "a: &a {x: 1}\nb: {<<: [" + ", ".join(["*a"] * 600_000) + "]}",
    ],
    ids=["bomb", "merge of itself", "itself", "nothing", "merges"],
)
def test_aliases_that_multiply_are_refused(text: str) -> None:
    with pytest.raises(InvalidModelError, match=r"alias|1000000 values|not plain YAML"):
        parse(text)


def test_honest_aliases_are_read() -> None:
    config = parse("base: &base {x: 1}\nhandler:\n  <<: *base\n  y: 2\nlist: [*base, *base]\n")
    assert config.raw["handler"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "a: " + "[" * 270 + "]" * 270,
        "- 1\n- 2",
        "text",
        "a: [",
        "a: b: c",
        "\t\tx: 1",
        "a: \x00",
        "? [1]\n: 2",
        "a: 2024-13-45",
        "{" * 1000,
        "a: " + "9" * 5000,
        "&a " * 10,
        "a: 1\n---\nb: 2",
    ],
    ids=range(14),
)
def test_broken_yaml_is_refused(text: str) -> None:
    with pytest.raises(InvalidModelError, match=r"^m\.mar: model-config\.yaml: "):
        parse(text)


def test_bytes_that_are_no_text_are_refused() -> None:
    for text in (b"\xff\xfe\x00\xd8", b"a: \x80", bytes(range(256))):
        with pytest.raises(InvalidModelError):
            ModelConfig.parse(text, LABEL)


def test_larger_than_16_mebibytes_is_refused() -> None:
    assert len(parse("a: " + "x" * (4 << 20)).raw["a"]) == 4 << 20
    with pytest.raises(InvalidModelError, match="more than the 16777216 allowed"):
        parse("a: " + "x" * (16 << 20))


def test_a_bomb_takes_little_memory() -> None:
    code = (
        "import resource\nfrom pyserve.archive.model_config import ModelConfig\n"
        "from pyserve.errors import InvalidModelError\n"
        "text = open(0, 'rb').read()\nbefore = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    ModelConfig.parse(text, 'm')\nexcept InvalidModelError:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], input=bomb(40, 40).encode(), check=True, capture_output=True, cwd=root
    )
    assert int(done.stdout) * 1024 < 64 << 20


def test_input_spec_defaults_to_float32_and_may_be_a_scalar() -> None:
    assert parse("input: {shape: []}").input == InputSpec("float32", ())
    assert parse("input: {dtype: int64, shape: [-1]}").input == InputSpec("int64", (-1,))
    padded = "input: {dtype: int64, shape: [-1, 2], pad_to: [4, 8], pad_value: -1}"
    assert parse(padded).input == InputSpec("int64", (-1, 2), pad_to=(4, 8), pad_value=-1)


def test_ranges_are_plain_yaml() -> None:
    config = parse("""
input:
  - {name: ids, dtype: int64, shape: [2..64], vocabulary: 30522, same: length}
  - {name: mask, dtype: float32, shape: [..64], values: [0, 1], same: length}
  - {name: picture, shape: [3, 32..512, 16..], same: [height, width]}
""")
    assert config.input == [
        InputSpec("int64", (-1,), "ids", ((2, 64),), (0, 30521), ("length",)),
        InputSpec("float32", (-1,), "mask", ((2, 64),), (0, 1), ("length",)),
        InputSpec("float32", (3, -1, -1), "picture", ((3, 3), (32, 512), (16, None)), None, ("height", "width")),
    ]


@pytest.mark.parametrize(
    ("text", "share"),
    [("0.1%", 0.001), ("100 %", 1.0), ("0%", 0.0), ("0.25", 0.25), ("1", 1.0), ("0", 0.0), ('"5%"', 0.05)],
)
def test_a_share_is_a_percentage_or_a_number(text: str, share: float) -> None:
    assert parse(f"audit: {text}").audit_share == pytest.approx(share)


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_themselves_are_allowed_and_their_neighbours_are_not(name: str) -> None:
    bounds = BOUNDS[name]
    assert validate_setting(name, bounds.least) == bounds.least
    assert validate_setting(name, bounds.most) == bounds.most
    for value in (bounds.least - 1, bounds.most + 1, float(bounds.least), str(bounds.least), None, True, 10**5000):
        with pytest.raises(InvalidModelError, match=name):
            validate_setting(name, value)


def test_setting_error_takes_the_callers_label_and_class() -> None:
    with pytest.raises(BadRequestError, match=r"^batch_size must be a whole number from 1 to 65536 requests, not 0$"):
        validate_setting("batch_size", 0, error=BadRequestError)
    with pytest.raises(InvalidModelError, match=r"^batchSize must"):
        validate_setting("batch_size", "x", label="batchSize")
