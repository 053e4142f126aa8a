"""Plays a case on a running server and gives what was observed, without what differs between any two runs."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

from tests.differential.archives import build
from tests.differential.case import Call, Case
from tests.differential.servers import Running
from tests.differential.wire import Answer, exchange, send

SETTLE_S = 8.0
START_S = 60.0  # for the workers of models that a server loads when it starts
ARRIVE_S = 0.1  # between calls that are sent together, so that they arrive in their order
SHOWN = (
    "minWorkers", "maxWorkers", "batchSize", "maxBatchDelay", "responseTimeout", "startupTimeout", "loadedAtStartup"
)  # fmt: skip
# What no two runs have in common, and what stands for it.
VOLATILE = [
    (r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "<uuid>"),
    (r"/models/[0-9a-f]{32,64}", "/models/<hash>"),
    (r'("startTime": )"[^"]*"', r'\1"<time>"'),
    (r'("id": )"\d+"', r'\1"<worker>"'),
    (r'("memoryUsage": )\d+', r'\1"<bytes>"'),
    (r'("pid": )[1-9]\d*', r'\1"<pid>"'),
    (r"\b20\d\d-\d\d-\d\d[T ]\d\d:\d\d:\d\d[.,]\d+Z?", "<time>"),
]


def play(case: Case, server: Running) -> list[dict[str, Any]]:
    """One entry per call: ``call``, the answer, and after a change ``models``: those changed, None if removed."""
    if not case.setting.archives:
        shutil.rmtree(server.store)
        server.store.mkdir()
    for name, spec in case.archives.items():
        build(server.store, name, spec)
    for call in case.before:
        answer = send(call, server)
        if not answer["status"].startswith("20") and answer["status"] != "OK":
            raise AssertionError(f"{case.name}: before it, {call.text} answered {answer}")
        _settle(_settle_s(call), server)
    known = _settle(START_S if server.name == "torchserve" else SETTLE_S, server)
    seen = []
    together: list[Call] = []
    for call in case.calls:
        together.append(call)
        if call.with_next:
            continue
        for each, sent in zip(together, _sent(together, server), strict=True):
            answer = without_volatile(sent, server)
            if each.is_change:
                models = _settle(_settle_s(each), server)
                answer["models"] = {
                    name: models.get(name)
                    for name in sorted(models.keys() | known.keys())
                    if models.get(name) != known.get(name)
                }
                known = models
            seen.append({"call": each.title, **answer})
        together = []
    return seen


def _sent(calls: list[Call], server: Running) -> list[Answer]:
    """The answers of calls that are all sent before the first is answered, in the order in which they arrive."""
    if len(calls) == 1:
        return [send(calls[0], server)]
    with ThreadPoolExecutor(len(calls)) as pool:
        answers = []
        for call in calls:
            answers.append(pool.submit(send, call, server))
            time.sleep(ARRIVE_S)
        return [answer.result() for answer in answers]


def clean(server: Running) -> bool:
    """Unregisters every model; False when some stay."""
    for name in _names(server):
        rows = sorted(_rows(server, name), key=lambda row: row["modelVersion"])
        for _ in range(2):  # the default version goes last, and which that is no answer says
            for row in rows:
                _ask(server, "DELETE", f"/models/{quote(name, safe='')}/{quote(row['modelVersion'], safe='')}")
        _ask(server, "DELETE", f"/models/{quote(name, safe='')}")
    return not _names(server)


def without_volatile(answer: Answer, server: Running) -> Answer:
    """The answer with paths, ids, times and keys replaced by what they are."""
    text = json.dumps(answer)
    known = {
        str(server.store): "<store>", str(server.folder): "<folder>", socket.gethostname(): "<host>",
        **{key: "<key>" for scope in ("management", "inference") if (key := server.key(scope))},
    }  # fmt: skip
    for found, name in known.items():
        text = text.replace(json.dumps(found)[1:-1], name)
    for api, port in server.ports.items():
        text = re.sub(rf"(?<!\d){port}(?!\d)", f"<{api} port>", text)
    clean_answer: Answer = json.loads(text)
    if clean_answer.get("headers", {}).get("content-type", "").startswith("text/plain; version=0.0.4"):
        clean_answer["body"] = _in_order(clean_answer["body"])
    for key in ("body", "status"):
        for pattern, name in VOLATILE:
            if key in clean_answer:
                clean_answer[key] = re.sub(pattern, name, clean_answer[key])
    headers = clean_answer.get("headers", {})
    if "content-length" in headers and clean_answer.get("body") != answer.get("body"):
        headers["content-length"] = "<length>"
    for name in ("x-request-id", "date"):
        if name in headers:
            headers[name] = f"<{name}>"
    return clean_answer


def _in_order(metrics: str) -> str:
    """The samples of each metric in the order of the alphabet: theirs is that of a hash table."""
    lines = metrics.splitlines(keepends=True)
    groups = itertools.groupby(lines, key=lambda line: line.startswith("#"))
    return "".join(line for is_head, group in groups for line in (group if is_head else sorted(group)))


def _settle_s(call: Call) -> float:
    wanted = call.written.get("settle", True)
    return SETTLE_S if wanted is True else float(wanted)


def _settle(limit_s: float, server: Running) -> dict[str, Any]:
    """The models and their versions, once no worker is being added or ended, or the time for that is over."""
    deadline = time.monotonic() + limit_s
    while True:
        models = {name: _rows(server, name) for name in _names(server)}
        if all(_is_settled(row) for rows in models.values() for row in rows) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return {
        name: {
            row["modelVersion"]: {
                **{key: row.get(key) for key in SHOWN},
                "workers": sorted(worker["status"] for worker in row["workers"]),
            }
            for row in rows
        }
        for name, rows in models.items()
    }


def _is_settled(row: dict[str, Any]) -> bool:
    if row.get("state") == "FAILED":  # pyserve's word for a model that it tries no more
        return True
    workers = row["workers"]
    enough = row["minWorkers"] <= len(workers) <= max(row["maxWorkers"], row["minWorkers"])
    return enough and all(worker["status"] == "READY" for worker in workers)


def _names(server: Running) -> list[str]:
    return [each["modelName"] for each in _json(server, "/models?limit=100").get("models", [])]


def _rows(server: Running, name: str) -> list[dict[str, Any]]:
    rows = _json(server, f"/models/{quote(name, safe='')}/all")
    return rows if isinstance(rows, list) else []


def _json(server: Running, path: str) -> Any:
    try:
        return json.loads(_ask(server, "GET", path).get("body", "{}"))
    except ValueError:
        return {}


def _ask(server: Running, method: str, path: str) -> Answer:
    key = server.key("management")
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n"
    head += f"Authorization: Bearer {key}\r\n" if key else ""
    return exchange(server, "management", (head + "\r\n").encode(), method, 60)


def keep_logs(server: Running) -> str:
    """The end of what the server wrote, for a report."""
    texts = []
    for name in ("output.log", "errors.log"):
        path = server.folder / name
        if path.exists() and os.path.getsize(path):
            texts.append(path.read_text(errors="replace")[-1500:])
    return "\n".join(texts)
