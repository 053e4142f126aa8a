"""Writes Postman collections from `calls/*.yaml`: each request with what TorchServe answered to it as its tests.

    python -m tests.newman.record [NAME...]     needs TorchServe: $TORCHSERVE_VENV names its environment

A call is ``name: METHOD api path`` with ``headers``, and ``body``, ``json``, ``form`` or ``urlencoded``; ``wait_s`` is
how long the next call waits, ``only: status`` leaves out what the answer says, ``only: nothing`` its status, too. They
are answered twice, by two servers; what differs between the two (times, pids, ports) is not tested.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from tests.differential.case import Setting
from tests.differential.servers import Running, running
from tests.support.certificates import self_signed

HERE = Path(__file__).parent
SCHEMA = "https://schema.getpostman.com/json/collection/v2.1.0/collection.json"
API_KEYS = ("inference", "management", "metrics")
BOUNDARY = "newman-boundary"
# Members of answers that are about the machine and the moment.
VOLATILE = {"id", "startTime", "memoryUsage", "pid", "gpu", "gpuUsage", "deviceType", "remainingCapacity"}


def main() -> None:
    """Records the collections named on the command line, or all."""
    wanted = sys.argv[1:]
    for path in sorted((HERE / "calls").glob("*.yaml")):
        if path.stem != "archives" and (not wanted or path.stem in wanted):
            written = yaml.safe_load(path.read_text())
            first, second = (answers(written) for _ in range(2))
            collection = collection_of(path.stem, written, first, second)
            (HERE / f"{path.stem}.postman_collection.json").write_text(json.dumps(collection, indent=1) + "\n")
            print(path.stem, len(written["calls"]), "calls")


def setting_of(written: dict[str, Any], certificates: Path) -> Setting:
    """How the server of a collection is started, with all archives in its store.

    ``{certificates}`` in its configuration is a folder with ``server.key`` and ``server.pem``.
    """
    text = json.dumps({**written["server"], "defaults": False})
    if "{certificates}" in text:
        self_signed(certificates)
    setting = Setting.of(json.loads(text.replace("{certificates}", str(certificates))))
    return replace(setting, archives=json.dumps(yaml.safe_load((HERE / "calls/archives.yaml").read_text())))


def answers(written: dict[str, Any]) -> list[dict[str, Any]]:
    """What TorchServe answers to each call."""
    bin_folder = Path(os.environ["TORCHSERVE_VENV"]) / "bin"
    with (
        tempfile.TemporaryDirectory() as folder,
        running("torchserve", setting_of(written, Path(folder)), bin_folder) as server,
    ):
        return [_answer(call, server) for call in written["calls"]]


def _parts(call: dict[str, Any]) -> tuple[str, str, str, str]:
    name, text = next(iter(call.items()))
    method, api, path = text.split(" ", 2)
    return name, method, api, path


def _answer(call: dict[str, Any], server: Running) -> dict[str, Any]:
    _, method, api, path = _parts(call)
    scheme = "https" if server.is_tls else "http"
    body, headers = _body(call)
    request = urllib.request.Request(
        f"{scheme}://127.0.0.1:{server.ports[api]}{path}", body, {"Content-Type": "", **headers}, method=method
    )
    if not request.headers.get("Content-type"):
        request.add_unredirected_header("Content-type", "text/plain" if "body" in call else "application/octet-stream")
    context = ssl._create_unverified_context() if server.is_tls else None
    try:
        with urllib.request.urlopen(request, timeout=120, context=context) as answer:
            found = {"status": answer.status, "headers": dict(answer.headers), "text": answer.read().decode("latin1")}
    except urllib.error.HTTPError as error:
        with error:
            found = {"status": error.code, "headers": dict(error.headers), "text": error.read().decode("latin1")}
    time.sleep(call.get("wait_s", 0))
    return found


def _body(call: dict[str, Any]) -> tuple[bytes | None, dict[str, str]]:
    headers = dict(call.get("headers", {}))
    if "json" in call:
        return json.dumps(call["json"]).encode(), {"Content-Type": "application/json", **headers}
    if "urlencoded" in call:
        text = urllib.parse.urlencode(call["urlencoded"])
        return text.encode(), {"Content-Type": "application/x-www-form-urlencoded", **headers}
    if "form" in call:
        parts = [
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
            for name, value in call["form"].items()
        ]
        text = "".join(parts) + f"--{BOUNDARY}--\r\n"
        return text.encode(), {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}", **headers}
    return (call["body"].encode() if "body" in call else None), headers


def collection_of(name: str, written: dict[str, Any], first: list[Any], second: list[Any]) -> dict[str, Any]:
    """A collection in Postman's form, version 2.1."""
    items = [_item(*each) for each in zip(written["calls"], first, second, strict=True)]
    return {"info": {"name": name, "description": written["about"], "schema": SCHEMA}, "item": items}


def _item(call: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    name, method, api, path = _parts(call)
    headers = dict(call.get("headers", {}))
    body: dict[str, Any] | None = None
    if "json" in call:
        headers.setdefault("Content-Type", "application/json")
        body = {"mode": "raw", "raw": json.dumps(call["json"])}
    elif "body" in call:
        headers.setdefault("Content-Type", "text/plain")
        body = {"mode": "raw", "raw": call["body"]}
    elif "urlencoded" in call or "form" in call:
        mode = "urlencoded" if "urlencoded" in call else "formdata"
        pairs = call.get("urlencoded") or call["form"]
        body = {"mode": mode, mode: [{"key": key, "value": value, "type": "text"} for key, value in pairs.items()]}
    request = {
        "method": method, "header": [{"key": key, "value": value} for key, value in headers.items()],
        "url": "{{" + api + "}}" + path, **({"body": body} if body else {}),
    }  # fmt: skip
    script = _script(call, first, second)
    return {"name": name, "event": [{"listen": "test", "script": {"exec": script}}], "request": request}


def _script(call: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Lines of JavaScript: the tests of one answer, and the pause behind it."""
    if call.get("only") == "nothing":
        return []
    if first["status"] != second["status"]:
        raise SystemExit(f"{next(iter(call))}: {first['status']}, then {second['status']}: {first['text'][:200]}")
    lines = [f"pm.test('status', () => pm.response.to.have.status({first['status']}));"]
    if call.get("only") != "status":
        try:
            pairs = _stable(json.loads(first["text"]), json.loads(second["text"]))
        except ValueError:
            if first["text"] == second["text"]:
                text = json.dumps(first["text"])
                lines.append(f"pm.test('text', () => pm.expect(pm.response.text()).to.eql({text}));")
        else:
            lines += [
                f"pm.test({json.dumps('body' + where)}, () => pm.expect(pm.response.json(){where}).to.eql({value}));"
                for where, value in pairs
            ]
        kind = first["headers"].get("content-type")
        expected = "undefined" if kind is None else json.dumps(kind)
        lines.append(f"pm.test('type', () => pm.expect(pm.response.headers.get('content-type')).to.eql({expected}));")
    if call.get("wait_s"):
        lines.append(f"setTimeout(() => {{}}, {int(call['wait_s'] * 1000)});")
    return lines


def _stable(first: Any, second: Any, where: str = "") -> list[tuple[str, str]]:
    """Paths into an answer and what is there as JSON, but for what is about the moment."""
    if isinstance(first, dict) and isinstance(second, dict) and first and first.keys() == second.keys():
        return [
            pair
            for key in first
            if key not in VOLATILE
            for pair in _stable(first[key], second[key], f"{where}[{json.dumps(key)}]")
        ]
    if isinstance(first, list) and isinstance(second, list) and first and len(first) == len(second):
        pairs = [pair for index, each in enumerate(first) for pair in _stable(each, second[index], f"{where}[{index}]")]
        return [(f"{where}.length", str(len(first))), *pairs]
    return [(where, json.dumps(first))] if first == second else []


if __name__ == "__main__":
    main()
