"""config.properties, addresses, precedence and the models to load."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from pyserve.config.address import Address
from pyserve.config.config import Config, UnknownKeyError, load_config
from pyserve.config.keys import ACCEPTED_KEYS, KINDS
from pyserve.config.model_source import ModelSource
from pyserve.config.properties import PropertiesError, parse_properties
from pyserve.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with an empty model store in it."""
    (tmp_path / "store").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str = "", *, environ: dict[str, str] | None = None, **overrides: str) -> Config:
    Path("config.properties").write_text(text)
    flags = {"model_store": "store"} | overrides
    return load_config(
        {key: (value, "--" + key.replace("_", "-")) for key, value in flags.items()}, environ=environ or {}
    )


# The Java rules, each with the entries that java.util.Properties reads.
PROPERTIES = [
    ("a=1", [("a", "1", 1)]),
    ("a = 1 ", [("a", "1 ", 1)]),
    ("a:1\nb 2\nc\t=\t3", [("a", "1", 1), ("b", "2", 2), ("c", "3", 3)]),
    ("a", [("a", "", 1)]),
    ("=1", [("", "1", 1)]),
    ("a==1", [("a", "=1", 1)]),
    ("# x\n  ! y\n\n a=1", [("a", "1", 4)]),
    ("a=1\\\n   2\\\r\n\t3\nb=4", [("a", "123", 1), ("b", "4", 4)]),
    ("a=1\\\\\nb=2", [("a", "1\\", 1), ("b", "2", 2)]),
    ("# x \\\na=1", [("a", "1", 2)]),
    ("a=1\\\n# 2", [("a", "1# 2", 1)]),
    ("a=1\\\n\nb=2", [("a", "1", 1), ("b", "2", 3)]),
    ("a\\=b=1", [("a=b", "1", 1)]),
    ("a\\ b\\:c 1", [("a b:c", "1", 1)]),
    ("a=http\\://h\\:80", [("a", "http://h:80", 1)]),
    ("a=\\t\\n\\r\\f\\x\\\\", [("a", "\t\n\r\fx\\", 1)]),
    ("a=\\u00e9\\uD83D\\uDE00", [("a", "é😀", 1)]),
    ("a=1\rb=2", [("a", "1", 1), ("b", "2", 2)]),
    ("a=1\\", [("a", "1", 1)]),
    ("a=1\na=2", [("a", "1", 1), ("a", "2", 2)]),
    ("", []),
]


@pytest.mark.parametrize(("text", "entries"), PROPERTIES)
def test_properties_are_read_by_the_java_rules(text: str, entries: list[tuple[str, str, int]]) -> None:
    assert parse_properties(text) == entries


def test_broken_unicode_escape_names_its_line() -> None:
    with pytest.raises(PropertiesError, match="four hexadecimal digits") as caught:
        parse_properties("a=1\nb=\\u00g0")
    assert caught.value.line == 2


def test_properties_survive_any_text() -> None:
    seed = int(os.environ.get("PYSERVE_TEST_SEED", random.randrange(2**32)))
    print(f"PYSERVE_TEST_SEED={seed}")
    rng = random.Random(seed)
    for _ in range(2000):
        text = "".join(rng.choices("ab=: \t\f\\#!\r\nu0é\ud83d", k=rng.randrange(30)))
        try:
            lines = [entry.line for entry in parse_properties(text)]
        except PropertiesError:
            continue
        assert lines == sorted(lines)


@pytest.mark.parametrize(
    ("text", "host", "port", "shown", "loopback"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1", 8080, "http://127.0.0.1:8080", True),
        ("http://localhost", "localhost", 81, "http://localhost:81", True),
        ("http://127.9.9.9:1/", "127.9.9.9", 1, "http://127.9.9.9:1", True),
        ("HTTP://0.0.0.0:0", "0.0.0.0", 0, "http://0.0.0.0:0", False),
        ("http://[::1]:8080", "::1", 8080, "http://[::1]:8080", True),
        ("http://[::]", "::", 81, "http://[::]:81", False),
        ("http://serving.example.org:65535", "serving.example.org", 65535, "http://serving.example.org:65535", False),
    ],
)
def test_http_address(text: str, host: str, port: int, shown: str, loopback: bool) -> None:
    address = Address.parse(text, 81)
    assert (address.host, address.port, str(address), address.is_loopback) == (host, port, shown, loopback)
    assert Address.parse(str(address), 0) == address


def test_tls_addresses_have_ports_of_their_own() -> None:
    config = load("inference_address=https://h\nmanagement_address=HTTPS://h/\nmetrics_address=https://[::1]")
    addresses = config.addresses().values()
    assert [str(each) for each in addresses] == ["https://h:443", "https://h:8444", "https://[::1]:8445"]
    assert all(each.is_tls and Address.parse(str(each), 0) == each for each in addresses)
    assert Address.parse("https://0.0.0.0:8443", 80).client_url == "https://127.0.0.1:8443"
    assert Config.from_json(config.to_json()) == config


def test_unix_address_is_loopback_and_short_enough() -> None:
    longest = "/" + "p" * 106
    address = Address.parse(f"unix:{longest}", 80)
    assert (address.path, address.is_loopback, str(address)) == (longest, True, f"unix:{longest}")
    with pytest.raises(ValueError, match="108 bytes long; a unix socket's may have 107"):
        Address.parse(f"unix:{longest}p", 80)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("127.0.0.1:8080", "http://host"),
        ("http://*:8080", "http://host"),
        ("http://h:80/path", "http://host"),
        ("http://user@h:80", "http://host"),
        ("http://h:65536", "largest is 65535"),
        ("http://h:", "http://host"),
        ("http://", "http://host"),
        ("unix:relative", "absolute path"),
        ("unix:/a\0b", "NUL"),
    ],
)
def test_bad_address_says_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Address.parse(text, 80)
    with pytest.raises(ConfigError, match="--inference-address: inference_address cannot be"):
        load(inference_address=text)


def test_wildcard_address_has_a_url_for_local_clients() -> None:
    assert Address.parse("http://0.0.0.0:8080", 80).client_url == "http://127.0.0.1:8080"
    assert Address.parse("http://[::]:8080", 80).client_url == "http://[::1]:8080"


def test_defaults_are_torchserves() -> None:
    config = load()
    assert [str(each) for each in config.addresses().values()] == [
        "http://127.0.0.1:8080",
        "http://127.0.0.1:8081",
        "http://127.0.0.1:8082",
    ]
    assert (config.max_request_size, config.max_response_size, config.job_queue_size) == (6553500, 6553500, 100)
    assert (config.default_response_timeout, config.default_startup_timeout) == (120, 120)
    assert config.unregister_model_timeout == 120
    assert config.allowed_urls == ""
    assert (config.warnings, config.notices) == ([], [])
    assert config.origin.keys() == KINDS.keys()
    assert set(config.origin.values()) == {"default", "--model-store"}


def test_address_without_a_port_gets_its_own_default() -> None:
    config = load("inference_address=http://h\nmanagement_address=http://h\nmetrics_address=http://h")
    assert [each.port for each in config.addresses().values()] == [80, 8081, 8082]


def test_switched_off_metrics_have_no_address() -> None:
    assert "metrics" not in load("enable_metrics_api=false").addresses()


def test_command_line_goes_before_the_file_and_the_file_before_the_default() -> None:
    config = load("# first\njob_queue_size=7\nmodel_store=nowhere\nstrict=TRUE\n")
    assert (config.job_queue_size, config.strict, config.max_request_size) == (7, True, 6553500)
    assert config.model_store == str(Path("store").absolute())
    assert config.origin["job_queue_size"] == "config.properties:2"
    assert config.origin["model_store"] == "--model-store"
    assert config.origin["max_request_size"] == "default"


def test_ts_config_file_goes_before_ts_config_and_that_before_the_default_file() -> None:
    for number, name in enumerate(("config.properties", "flag.properties", "variable.properties"), start=1):
        Path(name).write_text(f"model_store=store\njob_queue_size={number}\n")
    assert load_config(environ={}).job_queue_size == 1
    assert load_config(ts_config="flag.properties", environ={}).job_queue_size == 2
    both = load_config(ts_config="flag.properties", environ={"TS_CONFIG_FILE": "variable.properties"})
    assert both.job_queue_size == 3
    assert any("--ts-config flag.properties is not used" in line for line in both.warnings)
    assert both.origin["job_queue_size"] == "variable.properties:2"


def test_missing_configuration_file_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--ts-config file not found: x\.properties"):
        load_config(ts_config="x.properties", environ={})
    with pytest.raises(ConfigError, match=r"TS_CONFIG_FILE file not found: x\.properties"):
        load_config(environ={"TS_CONFIG_FILE": "x.properties"})


def test_environment_variables_are_put_in() -> None:
    config = load("inference_address=http://$$HOST$$:$$PORT$$\n", environ={"HOST": "127.0.0.2", "PORT": "99"})
    assert str(config.inference_address) == "http://127.0.0.2:99"
    with pytest.raises(ConfigError, match=r"config\.properties:1: .* environment variable PORT, which is not set"):
        load("inference_address=http://h:$$PORT$$")


def test_unknown_key_is_named_with_its_place_and_the_nearest_known() -> None:
    config = load("x=1\njob_que_size=5\n")
    assert config.warnings == [
        "config.properties:1: unknown key 'x'",
        "config.properties:2: unknown key 'job_que_size'; did you mean 'job_queue_size'?",
    ]
    assert config.job_queue_size == 100


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("bach_size", "did you mean 'batch_size'? It is a setting of each model: batchSize in its model-config.yaml"),
        ("batch_size", "; it is a setting of each model: batchSize in its model-config.yaml, or in 'models'"),
        ("watch", "unknown key 'watch'"),
    ],
)
def test_key_of_another_place_is_told_where_it_belongs(key: str, fix: str) -> None:
    (warning,) = load(f"{key}=8").warnings
    assert fix in warning


def test_unknown_key_is_an_error_under_strict() -> None:
    assert load("bach_size=8\nstrict=false").unknown_keys[0].startswith("config.properties:1: unknown key 'bach_size'")
    with pytest.raises(UnknownKeyError, match=r"strict \(config\.properties:2\): config\.properties:1: .*'batch_size'"):
        load("bach_size=8\nstrict=true")


def test_environment_variables_go_before_everything_when_the_file_asks_for_them() -> None:
    variables = {"TS_JOB_QUEUE_SIZE": "44", "TS_ALLOWED_URLS": "https://x/.*", "TS_HEADER_KEY_SEQUENCE_ID": "s"}
    assert load("job_queue_size=7", environ=variables).job_queue_size == 7
    text = "enable_envvars_config=true\njob_queue_size=7\njob_queue_size=8\n"
    config = load(text, environ=variables, job_queue_size="9")
    assert (config.job_queue_size, config.origin["job_queue_size"]) == (44, "$TS_JOB_QUEUE_SIZE")
    assert config.overridden["job_queue_size"] == [
        ["--job-queue-size", "9"], ["config.properties:3", "8"], ["config.properties:2", "7"],
    ]  # fmt: skip
    assert config.ts_header_key_sequence_id == "s"
    assert config.allowed_urls == ""  # those need a switch of their own
    assert load(text + "use_env_allowed_urls=true", environ=variables).allowed_urls == "https://x/.*"
    assert config.notices == []


def test_wrong_environment_variable_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^\$TS_JOB_QUEUE_SIZE: job_queue_size cannot be 'many'"):
        load("enable_envvars_config=true", environ={"TS_JOB_QUEUE_SIZE": "many"})


def test_keys_without_an_effect_are_named_once() -> None:
    config = load("vmargs=-Xmx1g\nnumber_of_netty_threads=4\nio_ratio=50\nvmargs=-Xmx2g\nversion=0.12.0")
    assert config.notices == [
        "config.properties: accepted, without effect here: vmargs, io_ratio (there is no JVM here); "
        "number_of_netty_threads (one event loop serves all connections)"
    ]


def test_every_key_without_an_effect_says_why() -> None:
    config = load("".join(f"{key}=1\n" for key in ACCEPTED_KEYS))
    assert (config.unknown_keys, config.warnings) == ([], [])
    (notice,) = config.notices
    for key, why in ACCEPTED_KEYS.items():
        assert key in notice and f"({why})" in notice


def test_repeated_key_is_named_with_both_lines() -> None:
    config = load("job_queue_size=1\n\njob_queue_size=2")
    assert config.warnings == ["config.properties:3: job_queue_size was set in line 1 already; line 3 counts"]
    assert config.job_queue_size == 2


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("job_queue_size=many", "a whole number from 1 to 1000000"),
        ("job_queue_size=0", "a whole number from 1 to 1000000"),
        ("job_queue_size=1_0", "a whole number"),
        ("job_queue_size=1.5", "a whole number"),
        ("job_queue_size=", "a whole number"),
        ("max_request_size=2147483648", "a whole number from 1 to 2147483647"),
        ("default_response_timeout=-1", "a whole number from 1 to 86400"),
        ("strict=yes", "true or false"),
        ("compat=loose", "default or strict"),
        ("error_detail=some", "auto or full or none"),
        ("metrics_address=ftp://h", "http://host"),
        ("service_envelope=a/b", "body, json, kserve, kservev2, or the name of a module"),
        ("blacklist_env_vars=(", "a regular expression of names"),
        ("ts_header_key_sequence_id=a b", "the name of a header"),
        ("isolate_errors=no", "true or false"),
        ("models=[1]", "a JSON object"),
        ("models={", "a JSON object"),
        ('models={"m": {"1.0": {"minWorkers": "2"}}}', "minWorkers is not of type int"),
        ('models={"m": {"1.0": {"minWorkers": true}}}', "minWorkers is not of type int"),
    ],
)
def test_bad_value_names_place_key_value_and_what_is_allowed(line: str, allowed: str) -> None:
    key, _, value = line.partition("=")
    with pytest.raises(ConfigError) as caught:
        load(f"# comment\n{line}")
    assert str(caught.value).startswith(f"config.properties:2: {key} cannot be {value!r}; allowed: ")
    assert allowed in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_block_is_kept_and_unknown_settings_are_named() -> None:
    block = {"m": {"1.0": {"minWorkers": 2, "batchSiez": 4}}}
    config = load(f"models={json.dumps(block)}")
    assert config.models == block
    assert config.warnings == [
        "config.properties:1: models: m 1.0: unknown setting 'batchSiez'; did you mean 'batchSize'?"
    ]


def test_deep_models_block_is_an_error_not_a_crash() -> None:
    with pytest.raises(ConfigError, match="not JSON"):
        load("models=" + '{"a":' * 100_000)


def test_configuration_survives_json() -> None:
    config = load(
        'inference_address=http://[::1]:1\nmanagement_address=unix:/tmp/x\nmodels={"m":{"1":{"minWorkers":1}}}\n'
        "number_of_gpu=2\nenable_model_api=true\nunknown=1\nvmargs=x\n"
    )
    again = Config.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert isinstance(again.management_address, Address)


def test_every_known_key_is_a_field_and_none_is_both_used_and_unused() -> None:
    assert Config().to_json().keys() - KINDS.keys() == {
        "origin", "overridden", "unknown_keys", "repeated_keys", "warnings", "notices", "self_signed_dir",
    }  # fmt: skip
    assert KINDS.keys() - Config().to_json().keys() == set()
    assert not ACCEPTED_KEYS.keys() & KINDS.keys()


def fill_store() -> Path:
    store = Path("store").absolute()
    for name in ("b.mar", "a.mar", "c.tar.gz", "d.model", ".hidden.mar", "readme.txt", "e.tgz"):
        (store / name).touch()
    (store / "folder").mkdir()
    (store / ".git").mkdir()
    return store


def test_all_means_every_archive_and_folder_of_the_store() -> None:
    store = fill_store()
    names = ["a.mar", "b.mar", "c.tar.gz", "d.model", "e.tgz", "folder"]
    for word in ("all", "ALL"):
        assert load(load_models=word).models_to_load() == [ModelSource(None, str(store / name)) for name in names]
    assert load().store_files() == names
    assert load().models_to_load() == []


def test_models_are_names_in_the_store_paths_and_urls() -> None:
    store = fill_store()
    outside = Path("outside").absolute()
    outside.mkdir()
    (outside / "o.mar").touch()
    Path("a.mar").touch()
    wanted = f"a.mar, first=b.mar,,{outside / 'o.mar'},outside/o.mar,n=./outside/o.mar,u=http://h/m.mar?a=1,gone.mar"
    assert load(load_models=wanted).models_to_load() == [
        ModelSource(None, str(store / "a.mar")),
        ModelSource("first", str(store / "b.mar")),
        ModelSource(None, str(outside / "o.mar")),
        ModelSource("n", str(outside / "o.mar")),
        ModelSource("u", "http://h/m.mar?a=1"),
        ModelSource(None, str(store / "gone.mar")),
    ]


@pytest.mark.parametrize("wanted", ["=a.mar", "name=", "a.mar,=b.mar"])
def test_half_a_model_is_an_error(wanted: str) -> None:
    with pytest.raises(ConfigError, match=r"--load-models: .*write archive\.mar or name=archive\.mar"):
        load(load_models=wanted)


def test_store_is_needed_unless_every_model_is_a_path() -> None:
    Path("m.mar").touch()
    assert load_config({"load_models": ("m.mar", "--models")}, environ={}).models_to_load()[0].exists
    for wanted in ("", "all", "gone.mar", "m.mar,gone.mar"):
        with pytest.raises(ConfigError, match="Missing mandatory parameter --model-store"):
            load_config({"load_models": (wanted, "--models")}, environ={})
    with pytest.raises(ConfigError, match=r"--model-store directory not found: .*nowhere"):
        load_config({"model_store": ("nowhere", "--model-store")}, environ={})


def test_file_may_be_latin_1_or_start_with_a_byte_order_mark() -> None:
    Path("config.properties").write_bytes(b"\xef\xbb\xbfmodel_store=store\n")
    assert load_config(environ={}).origin["model_store"] == "config.properties:1"
    Path("config.properties").write_bytes(b"model_store=store\ncors_allowed_origin=\xe9\n")
    assert load_config(environ={}).cors_allowed_origin == "é"


def test_huge_file_is_refused() -> None:
    Path("config.properties").write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        load_config(environ={})
