"""What differs between two plays of a case, less what DEVIATIONS.md lists."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyserve.config.config import Config
from tests.differential.case import MODES, Call, Case

DEVIATIONS = Path(__file__).parents[2] / "DEVIATIONS.md"
IS_ERROR = re.compile(r"[3-9]\d\d\b")


def differences(case: Case, theirs: list[dict[str, Any]], ours: list[dict[str, Any]], mode: str) -> list[str]:
    """One text per call that is not answered as TorchServe answered it, nor as its case says; empty if all agree.

    Args:
        theirs: what was recorded of TorchServe.
        ours: of pyserve.
        mode: ``default`` or ``strict``.
    """
    if [each["call"] for each in theirs] != [call.title for call in case.calls]:
        return [f"{case.name}: what is recorded of TorchServe is of other calls; record it again"]
    found = []
    for number, (call, their, our) in enumerate(zip(case.calls, theirs, ours, strict=True), 1):
        problem = _problem(call, their, our, mode)
        if problem:
            found.append(f"{case.name} #{number} [{mode}] {call.title}\n{problem}")
    return found


def _problem(call: Call, theirs: dict[str, Any], ours: dict[str, Any], mode: str) -> str:
    expected = call.expect
    for key in expected.keys() & {"status", "body"}:
        if not _holds(key, expected[key], ours):
            return f"  expected {key} {expected[key]!r}\n" + _shown("pyserve", ours)
    lines = _lines(_alike(call, theirs, mode), _alike(call, ours, mode, is_ours=True))
    if theirs.get("body") != ours.get("body"):  # then their lengths say nothing more
        lines = [line for line in lines if not line.startswith("  headers content-length")]
    allowed = call.differs.get(mode)
    if allowed is None:
        return "\n".join(lines)
    if not lines:
        return f"  does not differ any more; take the row {allowed['row']!r} out of the case"
    for key in allowed.keys() & {"status", "body"}:
        if not _holds(key, allowed[key], ours):
            return f"  the case says {key} {allowed[key]!r}\n" + _shown("pyserve", ours)
    return ""


def _holds(key: str, expected: Any, ours: dict[str, Any]) -> bool:
    if key == "status":
        return str(ours["status"]).split(" ")[0] == str(expected).split(" ")[0]
    return str(expected) in ours.get("body", "")


def _alike(call: Call, answer: dict[str, Any], mode: str, *, is_ours: bool = False) -> dict[str, Any]:
    """The answer without what differs in every answer of its kind, and without a length that follows from that."""
    answer = {**answer, "headers": dict(answer.get("headers", {}))}
    body = answer.get("body", "")
    for rule in RULES:
        if mode in rule.modes:
            rule.change(answer, call, is_ours)
    headers = answer["headers"]
    if "<" in body or IS_ERROR.match(answer["status"]):
        headers.pop("content-length", None)
    return answer


@dataclass(frozen=True)
class Rule:
    """What differs in every answer of a kind, by a row of DEVIATIONS.md.

    Attributes:
        change: takes it out of an answer; is given the answer, the call, and whether the answer is pyserve's.
        modes: those in which it differs.
    """

    row: str
    change: Callable[[dict[str, Any], Call, bool], None]
    modes: tuple[str, ...] = MODES


def _date(answer: dict[str, Any], _: Call, is_ours: bool) -> None:
    if is_ours:
        answer["headers"].pop("date", None)


def _connection(answer: dict[str, Any], _: Call, __: bool) -> None:
    if IS_ERROR.match(answer["status"]):
        answer["headers"].pop("connection", None)


def _detail(answer: dict[str, Any], _: Call, is_ours: bool) -> None:
    if is_ours and '"detail"' in answer.get("body", ""):
        _without(answer, "detail")


def _error(answer: dict[str, Any], call: Call, is_ours: bool) -> None:
    if is_ours and IS_ERROR.match(answer["status"]) and call.path.startswith(("/v1", "/v2")):
        _without(answer, "error")


def _grpc_detail(answer: dict[str, Any], call: Call, is_ours: bool) -> None:
    if is_ours and call.text.startswith("GRPC") and answer["status"] != "OK":
        answer["body"] = re.sub(r'\n\{".*\}$', "", answer.get("body", ""))


def _description(answer: dict[str, Any], _: Call, __: bool) -> None:
    if '"openapi"' in answer.get("body", ""):
        answer["body"] = "an OpenAPI description"


def _more_of_a_model(answer: dict[str, Any], _: Call, is_ours: bool) -> None:
    if is_ours and '"lane": ' in answer.get("body", "") and answer["body"].startswith("["):
        models = json.loads(answer["body"])
        for model in models:
            for more in list(model)[list(model).index("lane") :]:
                del model[more]
        answer["body"] = json.dumps(models, indent=2, ensure_ascii=False) + "\n" * answer["body"].endswith("\n")


def _advice(answer: dict[str, Any], _: Call, is_ours: bool) -> None:
    if is_ours and ('"type": ' in answer.get("body", "") or not answer.get("body")):
        answer["headers"].pop({"405": "allow", "503": "retry-after"}.get(answer["status"][:3], ""), None)


def _coding(answer: dict[str, Any], _: Call, is_ours: bool) -> None:
    is_large = len(answer.get("body", "")) >= Config.response_compression_size_min
    if is_ours and is_large and answer["headers"].get("vary") == "Accept-Encoding":
        del answer["headers"]["vary"]


RULES = [
    Rule("`Date` of an answer", _date),
    Rule("answers ≥ 400", _connection),
    Rule("error body", _detail, ("default",)),
    Rule("errors under `/v1` and `/v2`", _error),
    Rule("gRPC error texts", _grpc_detail, ("default",)),
    Rule("`Accept-Encoding` of a request", _coding, ("default",)),
    Rule("OpenAPI descriptions", _description),
    Rule("a model's description", _more_of_a_model),
    Rule("`Allow` of a 405, `Retry-After` of a 503", _advice),
]


def _without(answer: dict[str, Any], member: str) -> None:
    """Takes a member out of an error's body."""
    try:
        written = json.loads(answer["body"])
    except ValueError:
        return
    if isinstance(written, dict) and {"code", "type", "message"} <= written.keys():
        written.pop(member, None)
        answer["body"] = json.dumps(written, indent=2, ensure_ascii=False) + "\n"


def _lines(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    lines = []
    for key in ("status", "headers", "body", "base64", "models"):
        their, our = theirs.get(key), ours.get(key)
        if their == our:
            continue
        if isinstance(their, dict) and isinstance(our, dict):
            for name in sorted(their.keys() | our.keys()):
                # Of an error beside an answer, these say nothing more.
                if theirs["status"] != ours["status"] and name in ("connection", "content-length", "content-type"):
                    continue
                if their.get(name) != our.get(name):
                    lines.append(f"  {key} {name}: TorchServe {their.get(name)!r}, pyserve {our.get(name)!r}")
        else:
            lines.append(f"  {key}:\n    TorchServe {their!r}\n    pyserve    {our!r}")
    return lines


def _shown(who: str, answer: dict[str, Any]) -> str:
    return f"  {who}: {answer['status']} {answer.get('body', '')!r}"


def is_row(text: str) -> bool:
    """Whether a row of the table of DEVIATIONS.md begins with ``text``."""
    rows = re.findall(r"^\| (.*?) \| .* \|$", DEVIATIONS.read_text(), re.MULTILINE)
    return any(row.startswith(text) for row in rows if row != "point")
