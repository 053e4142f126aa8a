"""examples/versions_and_deploy: no request fails or is answered wrongly while a version takes another's place."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.examples.readme_run import Example, example

pytestmark = pytest.mark.server

RULE_OF_THUMB, EXACT = 230.0, 212.0  # boiling water: twice 100 plus 30; 1.8 times 100 plus 32


def boiling(fahrenheit: Example, version: str = "") -> float:
    """What boils at 100 degrees Celsius, as the server says, by its default version or the one asked for."""
    path = f"/predictions/fahrenheit{version and '/'}{version}"
    answer = fahrenheit.server.ask("POST", path, b"[100]", {"Content-Type": "application/json"})
    assert answer.status == 200, answer.body
    [value] = answer.json
    return float(value)


def versions(fahrenheit: Example) -> set[str]:
    return {each["modelVersion"] for each in fahrenheit.server.manage("GET", "/models/fahrenheit/all")}


def test_a_version_takes_anothers_place_while_clients_ask(tmp_path: Path) -> None:
    with example("versions_and_deploy", tmp_path) as fahrenheit:
        fahrenheit.follow(until="pyserve deploy releases/2.0")
        assert boiling(fahrenheit) == json.loads(fahrenheit.printed_by("curl"))[0] == RULE_OF_THUMB

        fahrenheit.follow(until="pyserve deploy releases/3.0")
        printed = fahrenheit.printed_by("pyserve deploy releases/2.0")
        counted = {what: int(count) for what, count in re.findall(r"^(.*): (\d+)$", printed, re.MULTILINE)}
        assert counted.pop("answers of version 1.0") > 0
        assert counted.pop("answers of version 2.0") == 4 * 200
        assert counted == {"wrong answers": 0, "failed requests": 0, "threads that saw 1.0 again after 2.0": 0}
        assert boiling(fahrenheit) == pytest.approx(EXACT)
        assert versions(fahrenheit) == {"2.0"}
        assert fahrenheit.server.ask("POST", "/predictions/fahrenheit/1.0", b"[100]").status == 404

        fahrenheit.follow(until="/models?url=")
        assert versions(fahrenheit) == {"2.0"}
        assert boiling(fahrenheit) == pytest.approx(EXACT)

        fahrenheit.follow(until="1.0/set-default")
        assert versions(fahrenheit) == {"1.0", "2.0"}
        assert boiling(fahrenheit) == boiling(fahrenheit, "2.0") == pytest.approx(EXACT)
        assert boiling(fahrenheit, "1.0") == RULE_OF_THUMB
        fahrenheit.follow(until="2.0/set-default")
        assert boiling(fahrenheit) == RULE_OF_THUMB
        fahrenheit.follow(until="pyserve stop")
        assert versions(fahrenheit) == {"2.0"}

        fahrenheit.follow()
        [restored] = json.loads(fahrenheit.printed_by("curl"))  # the same command again, which was answered last
        assert restored == pytest.approx(EXACT)
        assert not fahrenheit.server.pid_path.exists()


def test_the_client_counts_what_fails_and_what_is_wrong(tmp_path: Path) -> None:
    client = Example("versions_and_deploy", tmp_path).module("client")
    assert client.version_of(100, 230) == "1.0"
    assert client.version_of(100, 212.00001) == "2.0"
    assert client.version_of(100, 211) == "neither"
    asker = client.Asker("127.0.0.1:1", 0)  # nobody listens there
    assert asker._ask(client.http.client.HTTPConnection("127.0.0.1:1")) == "failed"
