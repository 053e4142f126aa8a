"""`pyserve doctor`: one list of what is well and what is not."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from pyserve.archive import versions
from pyserve.commands import cli, doctor
from pyserve.config.config import read_config
from tests.support import certificates
from tests.support.handler_archives import ECHO, write_handler

FREE = (
    "inference_address=http://127.0.0.1:0\nmanagement_address=http://127.0.0.1:0\nmetrics_address=http://127.0.0.1:0\n"
)
FREE += "grpc_inference_port=0\ngrpc_management_port=0\n"
LINE = re.compile(r"(PASS|NOTE|WARN|FAIL)  \S.{13} \S.*|(    ){5} ?\S.*")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYSERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # no pid file of a server that happens to run here
    monkeypatch.delenv("TS_CONFIG_FILE", raising=False)
    (tmp_path / "config.properties").write_text(FREE)
    return tmp_path


def listed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int) -> list[str]:
    """The lines, spaces in a row made one; each must look like the others."""
    assert cli.main(["doctor", *map(str, arguments)]) == code
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    counts = [sum(line.startswith(level) for line in lines) for level in ("PASS", "NOTE", "WARN", "FAIL")]
    assert last == "{} PASS, {} NOTE, {} WARN, {} FAIL".format(*counts)
    assert (counts[3] > 0) == (code == 1)
    return [" ".join(line.split()) for line in lines]


def folder_archive(path: Path, handler: str, requirements: str | None = None, **manifest: Any) -> Path:
    (path / "MAR-INF").mkdir(parents=True)
    (path / "handler.py").write_text(handler)
    model = {"modelName": "m", "modelVersion": "1.0", "handler": "handler.py"}
    if requirements is not None:
        (path / "requirements.txt").write_text(requirements)
        model["requirementsFile"] = "requirements.txt"
    (path / "MAR-INF/MANIFEST.json").write_text(json.dumps({"model": model, **manifest}))
    return path


def test_healthy_machine_has_no_failure_and_says_what_it_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys, code=0)
    names = {line.split()[1] for line in lines if line.startswith("PASS")}
    assert {"python", "torch", "native", "devices", "sys.path", "open", "CPUs", "memory", "cache"} <= names
    assert f"PASS folder {Path.cwd()}" in lines


def test_a_package_that_is_not_there_does_not_pass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-thing": "nothing", "torch": "much"})
    lines = listed(capsys, code=0)
    assert "NOTE no-such-thing not installed; needed for nothing" in lines
    assert any(line.startswith("PASS torch 2") for line in lines)


def test_address_that_is_taken_is_a_failure_that_names_the_key_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        text = FREE.replace("metrics_address=http://127.0.0.1:0", f"metrics_address={address}")
        Path("config.properties").write_text(text)
        lines = listed(capsys, code=1)
    at = lines.index(f"FAIL metrics {address}: Address already in use")
    assert lines[at + 1] == "stop what listens there, or set metrics_address"


def test_a_port_of_grpc_that_is_taken_is_a_failure_only_if_grpc_must_be(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = FREE.replace("grpc_inference_port=0", f"grpc_inference_port={port}")
        for whether, level in (("auto", "WARN"), ("true", "FAIL")):
            Path("config.properties").write_text(f"{text}enable_grpc={whether}\n")
            lines = listed(capsys, code=int(level == "FAIL"))
            assert f"{level} gRPC inference 127.0.0.1:{port}: Address already in use" in lines
        Path("config.properties").write_text(f"{text}enable_grpc=false\n")
        assert not any("gRPC inference" in line for line in listed(capsys, code=0))


def test_configuration_that_would_not_do_is_in_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.properties").write_text(FREE + "modle_store=x\n")
    lines = listed(capsys, code=0)
    assert "WARN configuration config.properties:6: unknown key 'modle_store'; did you mean 'model_store'?" in lines
    Path("config.properties").write_text(FREE + "model_store=nowhere\n")
    assert any(line.startswith("FAIL model store ") for line in listed(capsys, code=1))
    Path("config.properties").write_text(FREE + "job_queue_size=many\n")
    lines = listed(capsys, code=1)
    assert any(line.startswith("FAIL configuration config.properties:6: job_queue_size") for line in lines)


@pytest.mark.slow
def test_archive_as_it_was_packed_passes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = listed(capsys, write_handler(Path(), "m", ECHO), code=0)
    assert "PASS archive m 1.0, handler handler.py, 2 files" in lines
    assert any(line.startswith("PASS versions as it was packed: torch 2") for line in lines)
    assert any(line.startswith("PASS handler ") for line in lines)


@pytest.mark.slow
def test_other_versions_missing_packages_and_broken_code_are_told_with_the_mend(
    capsys: pytest.CaptureFixture[str],
) -> None:
    recorded = {versions.MANIFEST_KEY: {"python": "2.7.1", "torch": "1.13.0", "packages": {"no-such-one": "3"}}}
    source = "import no_such_one\nimport nor_this\n" + ECHO
    lines = listed(capsys, folder_archive(Path("m"), source, "no-such-one==3\n", **recorded), code=1)
    assert [line.partition(", here")[0] for line in lines if line.startswith("WARN versions")] == [
        "WARN versions packed with python 2.7.1", "WARN versions packed with torch 1.13.0",
        "WARN versions packed with no-such-one 3",
    ]  # fmt: skip
    assert "FAIL requirements requirements.txt wants no-such-one 3, here not installed" in lines
    for module, line in (("no_such_one", 1), ("nor_this", 2)):
        at = lines.index(f"FAIL handler no module named '{module}', imported at handler.py:{line}")
        assert module.replace("_", "-") in lines[at + 1].replace("_", "-")


@pytest.mark.parametrize(
    ("name", "text"),
    [("nowhere.mar", "Model not found at: nowhere.mar"), ("bad.mar", "bad.mar"), ("empty", "handler.py")],
)
def test_what_is_no_model_is_a_failure_in_the_list(capsys: pytest.CaptureFixture[str], name: str, text: str) -> None:
    Path("bad.mar").write_bytes(b"no archive")
    Path("empty").mkdir()
    (line,) = [line for line in listed(capsys, name, code=1) if line.startswith("FAIL")]
    assert line.startswith("FAIL archive ") and text in line


def test_cache_that_cannot_be_used_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("")
    monkeypatch.setenv("PYSERVE_CACHE", str(Path("file").absolute()))
    assert cli.main(["doctor"]) in (0, 1)
    lines = capsys.readouterr().out.splitlines()
    at = next(index for index, line in enumerate(lines) if line[6:].startswith("cache "))
    assert not lines[at].startswith("PASS") and "set PYSERVE_CACHE to a folder" in lines[at + 1]


@pytest.mark.parametrize(
    ("lines", "limits", "expected"),
    [
        ("0::/a/b\n", {"sys/fs/cgroup/a/memory.max": "500", "sys/fs/cgroup/a/b/memory.max": "max"}, 500),
        ("4:memory:/c\n", {"sys/fs/cgroup/memory/c/memory.limit_in_bytes": "700"}, 700),
        ("2:cpu:/c\n", {}, 1 << 62),
    ],
)
def test_least_memory_limit_of_all_groups_counts(
    tmp_path: Path, lines: str, limits: dict[str, str], expected: int
) -> None:
    for name, text in {"proc/self/cgroup": lines, **limits}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert doctor.memory_limit(tmp_path) == expected


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ("", ""),
        ("inference_address=https://127.0.0.1:0\n", "WARN certificate none is given: one is made at start"),
        ("inference_address=https://127.0.0.1:0\ncertificate_file=server.pem\n",
         "FAIL certificate certificate_file (config.properties:7) is set without private_key_file"),
        ("inference_address=https://127.0.0.1:0\ncertificate_file=server.pem\nprivate_key_file=server.key\n",
         "PASS certificate TLS: a certificate for localhost, 127.0.0.1, valid until"),
        ("management_address=http://0.0.0.0:0\n", "PASS keys management calls will need keys, written to"),
        ("management_address=http://0.0.0.0:0\ndisable_token_authorization=true\n",
         "WARN keys management is not on loopback and needs no key"),
        ("token_file=absent\n", "FAIL keys the file of keys absent cannot be read: No such file or directory"),
        ("token_file=keys\n", "PASS keys in keys"),
    ],
)  # fmt: skip
def test_what_keeps_strangers_out(folder: Path, settings: str, line: str) -> None:
    certificates.self_signed(folder)
    (folder / "keys").write_text("a-key-of-some-length\n")
    (folder / "config.properties").write_text(FREE + settings)
    told = [f"{each.level} {each.name} {each.text}" for each in doctor._strangers(read_config())]
    assert told[0].startswith(line) if line else not told
