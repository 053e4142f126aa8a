"""Runs the Postman collections of this folder with newman against pyserve, and prints what fails.

    python -m tests.newman.run [--newman PATH] [--servers strict,default,torchserve] [NAME...]

newman is a package of npm (`npm install newman`); by default the one on the path is run. The exit code is 1 if a test
fails that is not in `differs.yaml`, which names those that pyserve answers otherwise in default mode, each with its row
of DEVIATIONS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.differential.servers import Running, running
from tests.newman.record import API_KEYS, HERE, setting_of

TIMEOUT_MS = 120_000


def main() -> int:
    """Runs them and returns the exit code."""
    parser = argparse.ArgumentParser(description="Runs Postman collections against pyserve.")
    parser.add_argument("--newman", default="newman", help="newman's command")
    parser.add_argument("--servers", default="strict,default", help="of strict, default, torchserve")
    parser.add_argument("names", nargs="*", help="collections; all by default")
    args = parser.parse_args()
    known = yaml.safe_load((HERE / "differs.yaml").read_text())
    is_bad = False
    for path in sorted(HERE.glob("*.postman_collection.json")):
        name = path.name.partition(".")[0]
        if args.names and name not in args.names:
            continue
        written = yaml.safe_load((HERE / f"calls/{name}.yaml").read_text())
        for server_name in args.servers.split(","):
            count, failed = run(path, written, server_name, args.newman)
            expected = known.get(name, {}) if server_name == "default" else {}
            new = {each: text for each, text in failed.items() if each not in expected}
            gone = sorted(expected.keys() - failed.keys())
            is_bad = is_bad or bool(new or gone)
            print(f"{name} [{server_name}]: {count - len(failed)} of {count} requests as TorchServe's")
            for each, text in new.items():
                print(f"  {each}: {text}")
            for each in gone:
                print(f"  {each}: is as TorchServe's by now; take it out of differs.yaml")
    return int(is_bad)


def run(path: Path, written: dict[str, Any], server_name: str, newman: str) -> tuple[int, dict[str, str]]:
    """How many requests there are, and what failed: name of the request -> the failed tests."""
    bin_folder = Path(os.environ["TORCHSERVE_VENV"]) / "bin" if server_name == "torchserve" else None
    with (
        tempfile.TemporaryDirectory() as folder,
        running(server_name, setting_of(written, Path(folder)), bin_folder) as server,
    ):
        report = Path(folder, "report.json")
        command = [newman, "run", str(path), "--insecure", "--timeout-request", str(TIMEOUT_MS), "--reporters", "json",
                   "--reporter-json-export", str(report), *_variables(server)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not report.exists():
            raise SystemExit(f"newman made no report: {done.stdout}{done.stderr}")
        return _read(json.loads(report.read_text()))


def _variables(server: Running) -> list[str]:
    scheme = "https" if server.is_tls else "http"
    pairs = [f"{api}={scheme}://127.0.0.1:{server.ports[api]}" for api in API_KEYS]
    return [word for pair in pairs for word in ("--env-var", pair)]


def _read(report: dict[str, Any]) -> tuple[int, dict[str, str]]:
    failed: dict[str, str] = {}
    executions = report["run"]["executions"]
    for each in executions:
        errors = [f"{test['assertion']}: {test['error']['message']}" for test in each.get("assertions", [])
                  if test.get("error")]  # fmt: skip
        if each.get("requestError"):
            errors.append(str(each["requestError"].get("code") or each["requestError"]))
        if errors:
            failed[each["item"]["name"]] = "; ".join(errors)[:600]
    return len(executions), failed


if __name__ == "__main__":
    sys.exit(main())
