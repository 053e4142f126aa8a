"""Cases as they are written in YAML: archives, a server's settings, and calls in an order."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
CASES = HERE / "cases"
ARCHIVES = HERE / "archives"
FIELD = HERE.parent / "field"

CASE_KEYS = {"differs", "name", "about", "source", "with", "archives", "server", "serve", "before", "calls"}
CALL_KEYS = {
    "about", "ask", "base64", "body", "differs", "expect", "form", "grpc", "headers", "json", "raw", "settle",
    "together", "wait_s", "with",
}  # fmt: skip
SERVER_KEYS = {"archives", "config", "flags", "environment", "defaults"}
TITLE_MAX = 300
SENT = ("headers", "body", "json", "form", "base64", "raw")
APIS = ("inference", "management", "metrics")
MODES = ("default", "strict")


@dataclass(frozen=True)
class Setting:
    """How a server is started: cases with equal settings share one.

    Attributes:
        archives: as JSON, those that lie in the store when the server starts; "" for none. With them, a server is
            started for each case, which begins with what the server loaded by itself.
    """

    config: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    archives: str = ""

    @classmethod
    def of(cls, written: dict[str, Any], folder: Path = HERE) -> Setting:
        _check("server", written, SERVER_KEYS)
        config = {"disable_token_authorization": "true", "enable_model_api": "true"}
        if written.get("defaults") is False:
            config = {}
        config |= {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in written.get("config", {}).items()
        }
        environment = {key: str(value) for key, value in written.get("environment", {}).items()}
        archives = _archives(written.get("archives", []), folder)
        return cls(
            tuple(sorted(config.items())),
            tuple(map(str, written.get("flags", []))),
            tuple(sorted(environment.items())),
            json.dumps(archives) if archives else "",
        )


@dataclass
class Call:
    """One call and what may differ.

    Attributes:
        text: ``METHOD api path``, ``GRPC api Method`` or ``RAW api``; it is what reports show.
        differs: by mode (``default``, ``strict``), the row of DEVIATIONS.md and what pyserve answers instead.
        expect: what must happen whatever TorchServe does: ``status``, and ``body`` as a part of the text.
        settle: whether the call is followed by waiting until no worker is being added or ended.
        wait_s: how long an answer is waited for.
        with_next: whether the next call is sent before this one is answered.
    """

    text: str
    written: dict[str, Any]
    differs: dict[str, dict[str, Any]] = field(default_factory=dict)
    expect: dict[str, Any] = field(default_factory=dict)
    wait_s: float = 60.0
    with_next: bool = False

    @property
    def title(self) -> str:
        """``text`` and the beginning of what is sent with it."""
        sent = [
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in (self.written[key] for key in SENT if self.written.get(key, "") != "")
        ]
        return " ".join([self.text, *sent])[:TITLE_MAX]

    @property
    def path(self) -> str:
        """Of an HTTP call; of others ""."""
        return self.text.split(" ", 2)[2] if "ask" in self.written else ""

    @property
    def is_change(self) -> bool:
        """Whether the models of the server are looked at afterwards."""
        method, _, rest = self.text.partition(" ")
        api, _, what = rest.partition(" ")
        if api != "management":
            return False
        return what in ("RegisterModel", "ScaleWorker", "SetDefault", "UnregisterModel") if method == "GRPC" else (
            method not in ("GET", "OPTIONS", "HEAD")
        )  # fmt: skip


@dataclass
class Case:
    """Calls in an order, on a server that serves nothing when they begin."""

    name: str
    setting: Setting
    archives: dict[str, dict[str, Any]]
    before: list[Call]
    calls: list[Call]
    folder: Path

    def __str__(self) -> str:
        return self.name


def all_cases(root: Path = CASES) -> list[Case]:
    """Every case below ``root``, those with equal settings one after the other.

    Raises:
        ValueError: a case has an unknown key or name, or one that is taken.
    """
    cases = [case for path in sorted(root.rglob("*.yaml")) for case in _cases_of(path)]
    names = [case.name for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"two cases have the name {', '.join(sorted(twice))}")
    return sorted(cases, key=lambda case: repr(case.setting))


def _cases_of(path: Path) -> Iterator[Case]:
    written = yaml.safe_load(path.read_text())
    shared = {key: written[key] for key in ("server", "archives", "serve", "before") if key in written}
    topic = f"field/{path.parent.name}" if path.name == "case.yaml" else path.stem
    for each in written.get("cases", [written]):
        _check(f"{path.name}: a case", each, CASE_KEYS)
        for values, suffix in _expanded(each.get("with", {})):
            case = _filled({**shared, **{key: value for key, value in each.items() if key != "with"}}, values)
            calls = list(itertools.chain.from_iterable(map(_calls, case["calls"])))
            for entry in case.get("differs", []):
                _apply(entry, calls, f"{path.name}: {each.get('name')}")
            yield Case(
                name="/".join(filter(None, (topic, each.get("name"), suffix))),
                setting=Setting.of(case.get("server", {}), path.parent),
                archives=_archives(case.get("archives", []), path.parent),
                before=[_call(call) for call in [*map(_register, case.get("serve", [])), *case.get("before", [])]],
                calls=calls,
                folder=path.parent,
            )


def _archives(written: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """By name; a name alone is described in ``archives/``."""
    if isinstance(written, list):
        return {name: shared_archives()[name] for name in written}
    return {name: {"folder": str(folder), **(spec or shared_archives()[name])} for name, spec in written.items()}


@functools.cache
def shared_archives() -> dict[str, dict[str, Any]]:
    """The descriptions in ``archives/``, by name."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(ARCHIVES.glob("*.yaml")):
        for name, spec in yaml.safe_load(path.read_text()).items():
            if name in found:
                raise ValueError(f"two archives have the name {name}")
            found[name] = {"folder": str(ARCHIVES), **spec}
    return found


def _register(name: str) -> str:
    return f"POST management /models?url={name}&initial_workers=1&synchronous=true"


def _calls(written: Any) -> Iterator[Call]:
    if isinstance(written, dict) and "with" in written:
        for values, _ in _expanded(written["with"]):
            yield from _calls(_filled({key: value for key, value in written.items() if key != "with"}, values))
    elif isinstance(written, dict) and "together" in written:
        *first, last = map(_call, written["together"])
        yield from (dataclasses.replace(call, with_next=True) for call in first)
        yield last
    else:
        yield _call(written)


def _apply(entry: dict[str, Any], calls: list[Call], where: str) -> None:
    """Names the row of a difference for all calls of a case that are meant."""
    _check(f"{where}: `differs`", entry, {"row", "mode", "status", "body", "calls"})
    texts = entry.get("calls", [""])
    for text in texts:
        is_end = text.endswith("$")
        meant = [call for call in calls if (call.title.endswith(text[:-1]) if is_end else text in call.title)]
        if not meant:
            raise ValueError(f"{where}: `differs` means no call with {text!r}")
        for call in meant:
            for mode in [entry["mode"]] if "mode" in entry else MODES:
                call.differs.setdefault(mode, {key: entry[key] for key in ("row", "status", "body") if key in entry})


def _call(written: Any) -> Call:
    if isinstance(written, str):
        written = {"ask": written}
    _check("a call", written, CALL_KEYS)
    text = written.get("ask") or (f"GRPC {written['grpc']}" if "grpc" in written else f"RAW {written['raw']['api']}")
    differs = dict(written.get("differs", {}))
    if differs and not differs.keys() <= {"default", "strict"}:
        differs = {"default": differs, "strict": differs}
    for each in differs.values():
        if not {"row", "status"} <= each.keys():
            raise ValueError(f"{text}: `differs` needs `row` (of DEVIATIONS.md) and `status`")
    return Call(text, written, differs, written.get("expect", {}), float(written.get("wait_s", 60)))


def _expanded(values: dict[str, list[Any]]) -> Iterator[tuple[dict[str, Any], str]]:
    """Each combination of ``values``, and a name for it."""
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True)), ",".join(map(str, combination))


def _filled(written: Any, values: dict[str, Any]) -> Any:
    """``written`` with ``{name}`` replaced wherever a text has it; a text that is only that becomes the value."""
    if isinstance(written, dict):
        return {_filled(key, values): _filled(value, values) for key, value in written.items()}
    if isinstance(written, list):
        return [_filled(value, values) for value in written]
    if not isinstance(written, str):
        return copy.copy(written)
    for name, value in values.items():
        if written == "{" + name + "}":
            return value
        written = written.replace("{" + name + "}", value if isinstance(value, str) else json.dumps(value))
    return written


def _check(what: str, written: dict[str, Any], known: set[str]) -> None:
    unknown = written.keys() - known
    if unknown:
        raise ValueError(f"{what} has unknown keys: {', '.join(sorted(unknown))}; known: {', '.join(sorted(known))}")
