"""The console of a real server: what its data endpoint tells on each port, to whom, and how much of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

from pyserve.api.console_state import compact
from tests.support.handler_archives import write_handler
from tests.support.ports import free_port
from tests.support.serving import JSON, Server
from tests.support.serving_models import write_linear

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server

PAGE = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
FAILING = """
def handle(data, context):
    if data is None:
        return None
    print("it was asked")
    raise ValueError("no such <b>thing</b>")
"""


def state(server: Server, port: str = "inference", headers: dict[str, str] | None = None, **asked: Any) -> Any:
    answer = server.ask("GET", f"/console/state?{urlencode(asked)}", headers=headers, port=port)
    assert answer.status == 200, answer.body
    assert answer.headers["cache-control"] == "no-store"
    return answer.json


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``linear``, ``failing``, whose every request fails, and a file that is no archive."""
    server = Server(tmp_path_factory.mktemp("failing"))
    write_linear(server.store)
    write_handler(server.store, "failing", FAILING)
    (server.store / "junk.mar").write_bytes(b"junk")
    server.start("--models", "linear.mar", "failing.mar", "junk.mar")
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.parametrize("port", ["inference", "management"])
def test_browsers_get_the_page_and_its_files_on_both_ports(site: Server, port: str) -> None:
    page = site.ask("GET", "/", headers=PAGE, port=port)
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert page.headers["x-frame-options"] == "DENY" and page.headers["referrer-policy"] == "no-referrer"
    head = site.ask("HEAD", "/", headers=PAGE, port=port)
    assert head.status == 200 and not head.body
    assert head.headers["content-length"] == page.headers["content-length"]
    script = site.ask("GET", "/console/app.js", port=port)
    assert script.status == 200 and script.headers["content-type"].startswith("text/javascript")
    again = site.ask("GET", "/console/app.js", headers={"If-None-Match": script.headers["etag"]}, port=port)
    assert again.status == 304 and not again.body


def test_api_clients_get_at_the_door_what_they_always_got(site: Server) -> None:
    for headers in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        assert site.ask("GET", "/", headers=headers).json == {"status": "alive"}
        refused = site.ask("GET", "/", headers=headers, port="management")
        assert refused.status == 405 and refused.json["type"] == "MethodNotAllowedException"
    assert site.ask("GET", "/", headers=PAGE, port="metrics").status == 405


def test_the_inference_port_tells_no_more_than_its_api_does(site: Server) -> None:
    site.predict("linear", [1, 2, 3, 4])
    told = state(site, model="linear", errors="true", log="true", store="true")
    assert told["scope"] == "inference" and not told["server"]["asks_key"]
    assert not {"errors", "log", "store"} & told.keys()
    assert {row["name"] for row in told["models"]["rows"]} >= {"linear", "burn", "pictures"}
    hidden = {
        "histograms",
        "description",
        "queue_size",
        "in_flight",
        "url",
        "memory",
        "backend",
        "weights_size",
        "busy_s",
    }
    for each in (told["model"], *told["models"]["rows"]):
        assert not hidden & each.keys()
    # All that is counted is in the statistics, which anybody may ask for who may ask for this.
    statistics = site.ask("GET", "/v2/models/linear/versions/1.0/stats").json["model_stats"][0]["inference_stats"]
    assert told["model"]["succeeded"] == statistics["success"]
    assert told["model"]["stages"]["inference"] == statistics["compute_infer"]


def test_a_model_says_what_a_request_to_it_is_made_of(site: Server) -> None:
    linear = state(site, model="linear")["model"]
    assert linear["kind"] == "tensor"
    assert linear["inputs"] == [{"name": "input0", "datatype": "FP32", "shape": [4], "sizes": [[4, 4]], "values": None}]
    assert state(site, model="pictures")["model"]["kind"] == "picture"
    assert state(site, model="none")["model"] is None and state(site, model="linear", version="9")["model"] is None


def test_the_management_port_tells_workers_device_backend_and_histograms(site: Server) -> None:
    before = state(site, "management", model="linear")["model"]
    for _ in range(3):
        site.predict("linear", [1, 2, 3, 4])
    told = state(site, "management", model="linear", store="true")
    model = told["model"]
    assert told["scope"] == "management" and "linear-2.mar" in told["store"] and "linear.mar" not in told["store"]
    assert (model["ready_workers"], model["device"], model["precision"]) == (1, "cpu", "fp32")
    assert model["backend"] == "torchscript" and model["weights_size"] > 0 and model["url"] == "linear.mar"
    assert model["description"] == site.describe("linear") | {"workers": model["description"]["workers"]}
    for name in ("request", "queue", "inference", "batch_size"):
        bounds, counts, _ = model["histograms"][name]
        assert len(counts) == len(bounds) + 1
        assert sum(counts) - sum(before["histograms"][name][1]) == 3


def test_errors_come_with_ids_causes_and_what_was_logged(failing: Server) -> None:
    answer = failing.ask("POST", "/predictions/failing", b"{}", JSON | {"x-request-id": "mine-1"})
    assert answer.status == 503
    failing.ask("POST", "/predictions/nobody", b"{}", JSON | {"x-request-id": "mine-2"})
    told = state(failing, "management", errors="true")
    found = {each["request_id"]: each for each in told["errors"]}
    mine = found["mine-1"]
    assert (mine["status"], mine["model"], mine["version"]) == (503, "failing", "1.0")
    assert mine["detail"]["text"] == "no such <b>thing</b>" and "handler.py" in mine["detail"]["where"]
    assert "raise ValueError" in mine["log"]
    assert (found["mine-2"]["status"], found["mine-2"]["path"]) == (404, "/predictions/nobody")
    ids = {each["request_id"] for each in state(failing, "management", errors="true", model="failing")["errors"]}
    assert "mine-1" in ids and "mine-2" not in ids


def test_workers_lines_are_told_to_management(failing: Server) -> None:
    failing.ask("POST", "/predictions/failing", b"{}", JSON)

    def has_line() -> bool:
        lines = state(failing, "management", model="failing", log="true")["log"]
        return any(line["text"] == "it was asked" for line in lines)

    failing.wait_for(has_line, "the worker's line")


def test_an_archive_that_could_not_be_opened_is_among_the_models(failing: Server) -> None:
    told = state(failing)
    assert told["counts"]["FAILED"] == 1
    [row] = [row for row in told["models"]["rows"] if row["state"] == "FAILED"]
    assert row["never_loaded"] and "junk.mar" in row["name"] + row["reason"]
    assert state(failing, state="FAILED")["models"]["match"] == 1
    assert state(failing, search="JUNK", offset=1)["models"] == {"offset": 1, "match": 1, "rows": []}


def test_pages_and_searches_are_bounded(site: Server) -> None:
    names = [row["name"] for row in state(site)["models"]["rows"]]
    assert [row["name"] for row in state(site, offset=1, limit=1)["models"]["rows"]] == names[1:2]
    found = state(site, search="ICTUR")["models"]
    assert found["match"] == 1 and found["rows"][0]["name"] == "pictures"
    for wrong in ("limit=101", "limit=x", "offset=-1", "unknown=1", "errors=perhaps"):
        assert site.ask("GET", f"/console/state?{wrong}").status == 400


def test_keys_are_asked_for_as_by_the_api(server: Server, session_store: Any) -> None:
    write_linear(server.store)
    (server.folder / "config.properties").write_text("disable_token_authorization=false\n")
    server.start("--models", "linear.mar")
    for port, other in (("inference", "management"), ("management", "inference")):
        assert server.ask("GET", "/", headers=PAGE, port=port).status == 200  # the page, to type the key into
        assert server.ask("GET", "/console/app.js", port=port).status == 200
        refused = server.ask("GET", "/console/state", port=port)
        assert refused.status == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert server.ask("GET", "/console/state", headers=server.key(other), port=port).status == 401
        told = state(server, port, server.key(port))
        assert told["scope"] == port and told["server"]["asks_key"]


def test_pages_of_other_sites_read_nothing_and_change_nothing(site: Server) -> None:
    rebound = {"Host": "evil.example:8081"}
    for path in ("/", "/console/app.js", "/console/state"):
        assert site.ask("GET", path, headers=PAGE | rebound, port="management").status == 403
    foreign = {"Origin": "https://evil.example"}
    assert (
        "access-control-allow-origin"
        not in site.ask("GET", "/console/state", headers=foreign, port="management").headers
    )
    assert site.ask("PUT", "/models/linear?min_worker=2", headers=foreign, port="management").status == 403
    # The other port's page is another site, too.
    inference = {"Origin": site.url("inference")}
    assert site.ask("PUT", "/models/linear?min_worker=2", headers=inference, port="management").status == 403
    assert len(site.describe("linear")["workers"]) == 1


def test_it_can_be_turned_off_and_is_under_strict(server: Server) -> None:
    write_linear(server.store)
    for lines, alive in (("console=false\n", 200), ("compat=strict\n", 405)):
        (server.folder / "config.properties").write_text(lines)
        server.start("--models", "linear.mar")
        assert server.ask("GET", "/", headers=PAGE).status == alive
        assert "html" not in server.ask("GET", "/", headers=PAGE).headers["content-type"]
        assert server.ask("GET", "/", headers=PAGE, port="management").status == 405
        for port in ("inference", "management"):
            assert server.ask("GET", "/console/app.js", port=port).status == 404
        server.run("stop")


def test_several_front_ends_answer_the_same(server: Server) -> None:
    write_linear(server.store)
    (server.folder / "config.properties").write_text("front_ends=2\n")
    server.start("--models", "linear.mar")
    for port in ("inference", "management"):
        page = server.ask("GET", "/", headers=PAGE, port=port)
        assert page.status == 200 and "default-src 'self'" in page.headers["content-security-policy"]
        script = server.ask("GET", "/console/app.js", port=port)
        assert (
            server.ask("GET", "/console/app.js", headers={"If-None-Match": script.headers["etag"]}, port=port).status
            == 304
        )
        assert state(server, port)["models"]["match"] == 1
    server.ask("POST", "/predictions/linear", b"[1]", JSON | {"x-request-id": "too-short"})
    assert [each["request_id"] for each in state(server, "management", errors="true")["errors"]] == ["too-short"]


def test_one_port_for_both_apis_has_all_of_it_under_managements_key(server: Server) -> None:
    write_linear(server.store)
    (server.folder / "config.properties").write_text("disable_token_authorization=false\n")
    address = f"http://127.0.0.1:{free_port()}"
    server.start("--models", "linear.mar", "--inference-address", address, "--management-address", address)
    page = server.ask("GET", "/", headers=PAGE)
    assert b'data-scope="management" data-both="true"' in page.body
    assert server.ask("GET", "/", headers={"Accept": "*/*"}).json == {"status": "alive"}
    assert server.ask("GET", "/console/state", headers=server.key("inference")).status == 401
    assert state(server, headers=server.key("management"))["server"]["serves_both"] is True


def test_what_was_logged_is_for_this_machine_and_for_holders_of_the_key(server: Server) -> None:
    write_handler(server.store, "failing", FAILING)
    for lines, has_key, is_told in (("", True, True), ("disable_token_authorization=true\n", False, False)):
        (server.folder / "config.properties").write_text(lines)
        server.start("--models", "failing.mar", "--management-address", "http://0.0.0.0:0")
        headers = server.key() if has_key else {}
        server.ask("POST", "/predictions/failing", b"{}", JSON | {"x-request-id": "mine"})
        told = state(server, "management", headers, errors="true", log="true", model="failing")
        [error] = told["errors"]
        assert error["request_id"] == "mine" and error["message"]
        assert ("log" in told) is is_told and told["server"]["tells_errors"] is is_told
        assert bool(error["detail"]) is is_told and ("log" in error) is is_told
        server.run("stop")


def test_numbers_that_are_none_are_null() -> None:
    assert json.loads(compact({"a": [float("nan"), 1.5, {"b": float("inf")}]})) == {"a": [None, 1.5, {"b": None}]}
