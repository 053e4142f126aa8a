"""What a cluster is to serve, and what changes make of it."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pyserve.errors import (
    BadRequestError,
    ConfigError,
    ConflictError,
    DefaultVersionError,
    ModelNotFoundError,
    ServeError,
    VersionNotFoundError,
)
from pyserve.replicas.arguments import Arguments
from pyserve.replicas.bringing import looked_at
from pyserve.replicas.changing import changed
from pyserve.replicas.fitting import Node, check_fits
from pyserve.replicas.ray_words import ended, ray_version_problem
from pyserve.replicas.session import Session
from pyserve.replicas.state import Entry, State
from tests.support.ports import free_port

A1, A2, B1 = Entry("a", "1", "a.mar", "11"), Entry("a", "2", "a-2.mar", "22"), Entry("b", "1", "b.mar", "33")
FIRST = State.first("base", (A1, B1))


def test_a_deployed_version_takes_the_place_of_the_default_one() -> None:
    state = changed(FIRST, "deploy", {"entry": asdict(A2)})
    assert state.entries == (B1, A2) and state.defaults == {"a": "2", "b": "1"} and state.generation == 2
    kept = changed(FIRST, "deploy", {"entry": asdict(A2), "keeps_old": True})
    assert kept.entries == (A1, B1, A2) and kept.defaults["a"] == "2"
    new = changed(FIRST, "deploy", {"entry": asdict(Entry("c", "1", "c.mar"))})
    assert new.defaults == {"a": "1", "b": "1", "c": "1"} and len(new.entries) == 3


def test_a_version_that_is_added_is_not_the_default_one() -> None:
    state = changed(FIRST, "add", {"entry": asdict(A2)})
    assert (
        state.defaults["a"] == "1" and changed(state, "set_default", {"name": "a", "version": "2"}).defaults["a"] == "2"
    )
    assert changed(state, "remove", {"name": "a", "version": "2"}).entries == FIRST.entries
    assert changed(FIRST, "remove", {"name": "b"}).defaults == {"a": "1"}
    assert changed(FIRST, "scale", {"name": "b", "workers": 2}).entry("b", None).workers == 2


@pytest.mark.parametrize(
    ("kind", "arguments", "error"),
    [
        ("deploy", {"entry": asdict(A1)}, ConflictError),
        ("add", {"entry": asdict(B1)}, ConflictError),
        ("set_default", {"name": "c", "version": "1"}, ModelNotFoundError),
        ("set_default", {"name": "a", "version": "9"}, VersionNotFoundError),
        ("remove", {"name": "a", "version": "2"}, VersionNotFoundError),
        ("scale", {"name": "a", "workers": -1}, BadRequestError),
        ("turn", {}, BadRequestError),
    ],
)
def test_a_change_that_cannot_be_made_says_why(
    kind: str, arguments: dict[str, object], error: type[ServeError]
) -> None:
    with pytest.raises(error):
        changed(FIRST, kind, arguments)
    assert State.first("base", (A1, B1)) == FIRST


def test_the_default_version_stays_while_there_are_others() -> None:
    with pytest.raises(DefaultVersionError):
        changed(changed(FIRST, "add", {"entry": asdict(A2)}), "remove", {"name": "a"})


def test_a_state_is_read_as_it_was_written() -> None:
    state = changed(
        FIRST, "deploy", {"entry": asdict(Entry("a", "2", "a", url="s3://b/a.mar", settings={"batch_size": 2}))}
    )
    assert State.from_json(json.loads(state.text())) == state


# --- before anything is begun ---------------------------------------------------------------------------------------

NODES = [
    Node("head", 0), Node("one", 4, 8 << 30, {"GPU": 2.0, "disk": 1.0}), Node("two", 2, 4 << 30, {"fast": 1.0}),
]  # fmt: skip
FREE = {"CPU": 6.0, "GPU": 2.0, "disk": 1.0, "fast": 1.0}


@pytest.mark.parametrize(
    "asked",
    [
        {"needs": {"CPU": 2.0}, "replicas": 3},
        {"needs": {"CPU": 1.0, "GPU": 1.0}, "replicas": 2},
        {"needs": {"CPU": 0.1, "GPU": 0.1}, "replicas": 20},
        {"needs": {"CPU": 1.0, "disk": 0.5, "GPU": 0.0}, "replicas": 2},
        {"needs": {"CPU": 1.0}, "replicas": 2, "per_node": 1},
        {"needs": {"CPU": 4.0}, "replicas": 0},
    ],
)
def test_what_fits_is_begun(asked: dict[str, Any]) -> None:
    check_fits(NODES, FREE, size=1 << 30, **asked)


@pytest.mark.parametrize(
    ("nodes", "free", "asked", "text"),
    [
        (NODES, FREE, {"needs": {"CPU": 8.0}}, "no node of the cluster has 8 CPUs for a replica (CPUs: one 4, two 2)"),
        ([], {}, {}, "no node of the cluster has 1 CPU for a replica (CPUs: none)"),
        (NODES, FREE, {"needs": {"CPU": 8.0}, "replicas": 0}, "no node of the cluster has 8 CPUs"),
        (NODES, FREE, {"needs": {"CPU": 3.0}, "replicas": 2}, "room for 1 "),  # six CPUs, but no two nodes with three
        (NODES, {"CPU": 3.0}, {"needs": {"CPU": 2.0}, "replicas": 2}, "other programs have left 3 of 6"),
        (NODES, FREE, {"size": 16 << 30}, "the archives have 16384 MB"),
        (NODES, FREE, {"needs": {"CPU": 1.0, "fast": 1.0}, "size": 6 << 30}, "the archives have 6144 MB"),
        (NODES, FREE, {"needs": {"CPU": 1.0, "GPU": 3.0}}, "has 3 GPUs for a replica (GPUs: one 2)"),
        (NODES[2:], FREE, {"needs": {"CPU": 1.0, "GPU": 1.0}}, "has 1 GPU for a replica (GPUs: none)"),
        (NODES, FREE, {"needs": {"CPU": 1.0, "tape": 1.0}}, "has 1 tape for a replica (tape: none)"),
        (NODES, FREE, {"needs": {"GPU": 1.0, "fast": 1.0}}, "no node of the cluster has 1 GPU and 1 fast together"),
        (NODES, FREE, {"needs": {"GPU": 1.0}, "replicas": 3}, "3 replicas of 1 GPU do not fit the cluster"),
        (NODES, {"GPU": 1.0}, {"needs": {"GPU": 1.0}, "replicas": 2}, "other programs have left 1 of 2"),
        (NODES, FREE, {"replicas": 3, "per_node": 1}, "3 replicas of 1 CPU, 1 on a node do not fit"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_numbers(
    nodes: list[Node], free: dict[str, float], asked: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        check_fits(nodes, free, **{"needs": {"CPU": 1.0}, "replicas": 1, "size": 0, **asked})
    assert text in str(raised.value)


def test_who_can_manage_the_cluster_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="token_file"):
        Arguments.of({"models": ["a.mar"], "config": {"enable_model_api": True}})
    assert Arguments.of({"models": ["a.mar"], "config": {"enable_model_api": True, "token_file": "/k"}}).models


def test_versions_of_ray() -> None:
    assert "2.9.3 is too old" in ray_version_problem("2.9.3")
    assert not ray_version_problem("2.60.0") and not ray_version_problem("3.0.0rc1")


def session(address: str = "auto") -> Session:
    return Session({"command": "status", "address": address, "application": "pyserve"}, lambda *_, **__: None)


def test_ray_that_is_missing_or_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("ray")
    old.__version__, old.serve = "2.9.3", types.ModuleType("ray.serve")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", old)
    with pytest.raises(ConfigError, match=r"Ray 2\.9\.3 is too old; pip install"):
        session().connect()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Ray Serve is missing .*; pip install"):
        session().connect()


def test_a_cluster_that_is_not_there_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    new = types.ModuleType("ray")
    new.__version__, new.serve = "2.60.0", types.ModuleType("ray.serve")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", new)
    with pytest.raises(ConfigError, match=r"no Ray cluster is found at '127\.0\.0\.1:\d+' \(Connection refused\)"):
        session(f"127.0.0.1:{free_port()}").connect()


@pytest.mark.parametrize(("name", "content", "text"), [
    ("m.mar", b"no archive", "m.mar"),
    ("net.pt", b"x", "nodes are sent archives"),
    ("none.mar", None, "none.mar"),
])  # fmt: skip
def test_an_archive_that_cannot_be_read_is_told(tmp_path: Path, name: str, content: bytes | None, text: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ServeError) as raised:
        looked_at(str(tmp_path / name))
    assert text in str(raised.value) and "Traceback" not in str(raised.value)


def test_a_traceback_of_ray_serve_is_told_as_its_reason() -> None:
    text = (
        "Deployment failed\n\x1b[36mTraceback (most recent call last):\n  File x\nRuntimeError: pyserve: a 1: no room\n"
    )
    assert ended(text) == "a 1: no room"
    assert ended("Waiting for\n 2 CPUs") == "Waiting for 2 CPUs"
