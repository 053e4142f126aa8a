"""`pyserve config`: where each value comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyserve.commands import cli
from tests.support.handler_archives import ECHO, write_handler

CONFIG = """\
# four levels, with the command line
enable_envvars_config=true
job_queue_size=10
job_queue_size=20
default_response_timeout=33
models={"m": {"1.0": {"batchSize": 2, "minWorkers": 1, "maxWorkers": 1}}}
"""
YAML = "# of one model\nminWorkers: 2\nmaxWorkers: 3\nbatchSize: 8\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TS_CONFIG_FILE", raising=False)
    write_handler(tmp_path / "store", "plain", ECHO)
    model = tmp_path / "store/m"
    (model / "MAR-INF").mkdir(parents=True)
    manifest = {"model": {"modelName": "m", "handler": "handler.py", "configFile": "model-config.yaml"}}
    (model / "MAR-INF/MANIFEST.json").write_text(json.dumps(manifest))
    (model / "handler.py").write_text(ECHO)
    (model / "model-config.yaml").write_text(YAML)
    (tmp_path / "config.properties").write_text(CONFIG)
    return tmp_path


def report(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    assert cli.main(["config", "--json", *arguments]) == code
    return json.loads(capsys.readouterr().out)


def test_winner_and_losers_of_a_key_that_is_set_at_every_level(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TS_MODEL_STORE", "store")
    monkeypatch.setenv("TS_JOB_QUEUE_SIZE", "44")
    told = report(capsys, "--model-store", "elsewhere")["settings"]
    assert told["job_queue_size"] == {
        "value": 44,
        "origin": "$TS_JOB_QUEUE_SIZE",
        "overrides": [
            {"origin": "config.properties:4", "value": "20"}, {"origin": "config.properties:3", "value": "10"},
        ],
    }  # fmt: skip
    assert told["model_store"]["overrides"] == [{"origin": "--model-store", "value": "elsewhere"}]
    assert told["drain_timeout_s"] == {"value": 30, "origin": "default", "overrides": []}


def test_settings_of_a_model_have_the_line_of_its_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    (model,) = report(capsys, "--model-store", "store", "--models", "m")["models"]
    settings = model["settings"]
    assert settings["batch_size"] == {
        "value": 8, "origin": "model-config.yaml:4",
        "overrides": [{"origin": "config.properties:6 models", "value": 2}],
    }  # fmt: skip
    assert (settings["max_workers"]["value"], settings["max_workers"]["origin"]) == (3, "model-config.yaml:3")
    assert settings["response_timeout"]["origin"] == "config.properties:5 default_response_timeout"
    assert settings["max_batch_delay"] == {"value": 100, "origin": "default", "overrides": []}


def test_text_names_value_place_and_what_it_goes_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config", "--model-store", "store", "--models", "all"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "job_queue_size = 20 config.properties:4 (overrides config.properties:3 = 10)" in lines
    assert "batch_size = 8 model-config.yaml:4 (overrides config.properties:6 models = 2)" in lines
    assert "plain 1.0" in lines


def test_archive_that_cannot_be_opened_is_told_beside_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    Path("store/bad.mar").write_bytes(b"no archive")
    models = report(capsys, "--model-store", "store", "--models", "bad.mar", "m")["models"]
    assert [bool(model["error"]) for model in models] == [True, False]


def test_unknown_key_is_a_warning_and_under_strict_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.properties").write_text("bach_size=8\n")
    assert "'batch_size'" in report(capsys, "--model-store", "store")["unknown_keys"][0]
    assert "'batch_size'" in report(capsys, "--model-store", "store", "--strict", code=2)["problem"]


def test_start_refuses_unknown_keys_under_strict(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.properties").write_text("bach_size=8\n")
    assert cli.main(["start", "--model-store", "store", "--strict"]) == 2
    assert "'batch_size'" in capsys.readouterr().err.splitlines()[-1]


def test_without_a_store_all_is_shown_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys)["problem"].startswith("Missing mandatory parameter --model-store")


def test_store_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert report(capsys, "--model-store", "nowhere", code=1)["problem"].startswith("--model-store directory not found")


def test_secret_values_are_not_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.properties").write_text("keystore_pass=sesame-1\nkeystore_pass=sesame-2\n")
    for form in ((), ("--json",)):
        assert cli.main(["config", "--model-store", "store", *form]) == 0
        told = capsys.readouterr()
        assert "sesame" not in told.out + told.err and "(hidden)" in told.out
