"""The Postman collections are those that the calls describe. `make newman` runs them; it needs node."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.differential.compare import is_row

HERE = Path(__file__).parent
CALLS = sorted(path for path in (HERE / "calls").glob("*.yaml") if path.stem != "archives")


def collection(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / f"{name}.postman_collection.json").read_text())
    return found


@pytest.mark.parametrize("path", CALLS, ids=lambda path: path.stem)
def test_a_collection_has_the_calls_and_tests_each(path: Path) -> None:
    calls = yaml.safe_load(path.read_text())["calls"]
    items = collection(path.stem)["item"]
    assert [item["name"] for item in items] == [next(iter(call)) for call in calls], "record it again"
    for call, item in zip(calls, items, strict=True):
        method, api, target = next(iter(call.values())).split(" ", 2)
        assert (item["request"]["method"], item["request"]["url"]) == (method, "{{" + api + "}}" + target)
        assert bool(item["event"][0]["script"]["exec"]) == (call.get("only") != "nothing"), item["name"]
    assert len({item["name"] for item in items}) == len(items)


def test_every_difference_is_of_a_request_and_a_row() -> None:
    for name, requests in yaml.safe_load((HERE / "differs.yaml").read_text()).items():
        assert requests.keys() <= {item["name"] for item in collection(name)["item"]}
        assert [row for row in requests.values() if not is_row(row)] == []
