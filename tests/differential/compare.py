"""What differs between two plays of a case, less what DEVIATIONS.md lists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tests.differential.case import Call, Case

DEVIATIONS = Path(__file__).parents[2] / "DEVIATIONS.md"
IS_ERROR = re.compile(r"[45]\d\d\b")


def differences(case: Case, theirs: list[dict[str, Any]], ours: list[dict[str, Any]], mode: str) -> list[str]:
    """One text per call that is not answered as TorchServe answered it, nor as its case says; empty if all agree.

    Args:
        theirs: what was recorded of TorchServe.
        ours: of pyserve.
        mode: ``default`` or ``strict``.
    """
    if [each["call"] for each in theirs] != [call.text for call in case.calls]:
        return [f"{case.name}: what is recorded of TorchServe is of other calls; record it again"]
    found = []
    for call, their, our in zip(case.calls, theirs, ours, strict=True):
        problem = _problem(call, their, our, mode)
        if problem:
            found.append(f"{case.name} [{mode}] {call.text}\n{problem}")
    return found


def _problem(call: Call, theirs: dict[str, Any], ours: dict[str, Any], mode: str) -> str:
    expected = call.expect
    for key in expected.keys() & {"status", "body"}:
        if not _holds(key, expected[key], ours):
            return f"  expected {key} {expected[key]!r}\n" + _shown("pyserve", ours)
    lines = _lines(_alike(theirs, mode), _alike(ours, mode, is_ours=True))
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


def _alike(answer: dict[str, Any], mode: str, *, is_ours: bool = False) -> dict[str, Any]:
    """The answer without what differs in every answer of its kind, each by a row of DEVIATIONS.md."""
    answer = dict(answer)
    headers = dict(answer.get("headers", {}))
    if is_ours:
        headers.pop("date", None)  # row: `Date` of an answer
    if IS_ERROR.match(answer["status"]):
        headers.pop("connection", None)  # row: answers ≥ 400
        if is_ours and mode == "default":
            answer["body"] = _without_detail(answer.get("body", ""))  # row: error body
            headers.pop("content-length", None)
    if "headers" in answer:
        # Lengths that follow from what was replaced, such as a path.
        if "<" in answer.get("body", "") or IS_ERROR.match(answer["status"]):
            headers.pop("content-length", None)
        answer["headers"] = headers
    return answer


def _without_detail(body: str) -> str:
    try:
        written = json.loads(body)
    except ValueError:
        return body
    if not isinstance(written, dict) or "detail" not in written:
        return body
    del written["detail"]
    return json.dumps(written, indent=2, ensure_ascii=False) + "\n"


def _lines(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    lines = []
    for key in ("status", "headers", "body", "base64", "models"):
        their, our = theirs.get(key), ours.get(key)
        if their == our:
            continue
        if isinstance(their, dict) and isinstance(our, dict):
            for name in sorted(their.keys() | our.keys()):
                if their.get(name) != our.get(name):
                    lines.append(f"  {key} {name}: TorchServe {their.get(name)!r}, pyserve {our.get(name)!r}")
        else:
            lines.append(f"  {key}:\n    TorchServe {their!r}\n    pyserve    {our!r}")
    return lines


def _shown(who: str, answer: dict[str, Any]) -> str:
    return f"  {who}: {answer['status']} {answer.get('body', '')!r}"


def deviation_rows() -> set[str]:
    """The first column of the table of DEVIATIONS.md."""
    rows = re.findall(r"^\| (.*?) \| .* \|$", DEVIATIONS.read_text(), re.MULTILINE)
    return set(rows) - {"point"}
