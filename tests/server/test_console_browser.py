"""The console in a real browser: models are scaled and deployed; and what it must never do."""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.support.browser import confirm, send, watched
from tests.support.handler_archives import write_handler
from tests.support.serving import JSON, Server
from tests.support.serving_models import write_linear

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server

STATE = re.compile(r"/console/state\?")
NASTY = "<img src=x onerror=alert(1)><script>alert(2)</script>"
SLOW = """
import time

def handle(data, context):
    if data is None:
        return None
    time.sleep(float(data[0]["body"]["seconds"]))
    return ["done"] * len(data)
"""
VIEWS = ["#/", "#/models/linear/1.0", "#/models/linear/1.0/overview", "#/models/linear/1.0/manage",
         "#/models/linear/1.0/errors", "#/models/linear/1.0/log", "#/models/pictures/1.0/try", "#/errors", "#/log",
         "#/deploy", "#/models/none/1.0"]  # fmt: skip


@pytest.fixture(scope="module")
def managed(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``linear``, whose version 2.0 is in the model store, and ``slow``."""
    server = Server(tmp_path_factory.mktemp("managed"))
    write_linear(server.store)
    write_linear(server.store, version="2.0", seed=2, file="linear-2")
    write_handler(server.store, "slow", SLOW)
    server.start("--models", "linear.mar", "slow.mar")
    try:
        yield server
    finally:
        server.kill()


def simulate(page: Any, change: Callable[[dict[str, Any], dict[str, str]], None]) -> None:
    """Has ``change`` change what the data endpoint answers, given the query."""

    def answer(route: Any) -> None:
        told = route.fetch().json()
        query = {name: values[0] for name, values in parse_qs(urlsplit(route.request.url).query).items()}
        change(told, query)
        route.fulfill(json=told)

    page.route(STATE, answer)


def test_a_server_that_hangs_is_said_to_give_no_answer(browser: Any, site: Server) -> None:
    with watched(browser, site.url()) as seen:
        page = seen.page
        page.clock.install()
        page.goto(site.url())
        page.clock.run_for(100)
        page.locator(".health.good").wait_for()
        page.route(STATE, lambda route: None)
        page.clock.run_for(2_500)
        assert page.locator(".health").inner_text() == "Live"  # it may be slow
        page.clock.run_for(10_500)
        page.locator(".health.bad").wait_for()
        assert page.locator(".health").inner_text() == "No answer"
        page.get_by_role("link", name="linear").first.wait_for()  # what was known is still shown
        page.unroute(STATE)
        page.clock.run_for(5_500)
        page.locator(".health.good").wait_for()


def test_workers_are_scaled_and_seen(browser: Any, managed: Server) -> None:
    base = managed.url("management")
    with watched(browser, base) as seen:
        page = seen.page
        page.goto(f"{base}/#/models/linear/1.0/manage")
        page.get_by_label("At least").fill("2")
        page.get_by_role("button", name="Scale").click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        assert len(managed.describe("linear")["workers"]) == 1  # not without a yes
        confirm(page, "Scale")
        page.locator(".outcome.good").wait_for()
        assert "Workers scaled to 2" in page.locator(".outcome.good").inner_text()
        assert len(managed.describe("linear")["workers"]) == 2
        page.get_by_role("link", name="Overview").click()
        page.locator(".workers tbody tr").nth(1).wait_for()
        assert page.locator(".workers .badge.good").count() == 2
        managed.manage("PUT", "/models/linear?min_worker=1&synchronous=true")


def test_batching_is_changed_and_a_refusal_shown(browser: Any, managed: Server) -> None:
    base = managed.url("management")
    with watched(browser, base) as seen:
        page = seen.page
        page.goto(f"{base}/#/models/linear/1.0/manage")
        page.get_by_label("Batch size").fill("8")
        page.get_by_label("Delay").fill("25")
        confirm(page, "Apply")
        page.locator(".outcome.good").wait_for()
        described = managed.describe("linear")
        assert (described["batchSize"], described["maxBatchDelay"]) == (8, 25)
        page.get_by_label("Batch size").fill("999999999")
        confirm(page, "Apply")
        page.locator(".outcome.bad").wait_for()
        assert "batch_size cannot be" in page.locator(".outcome.bad").inner_text()
        seen.expected.append("400")


def test_a_version_is_deployed_made_default_and_unregistered(browser: Any, managed: Server) -> None:
    base = managed.url("management")
    with watched(browser, base) as seen:
        page = seen.page
        page.goto(f"{base}/#/models/linear/1.0/manage")
        page.locator("#store option").first.wait_for(state="attached")
        assert page.locator("#store option").evaluate_all("all => all.map(each => each.value)") == ["linear-2.mar"]
        page.get_by_label("Archive").fill("linear-2.mar")
        page.get_by_label("Keep the old version").check()
        confirm(page, "Deploy")
        page.get_by_role("link", name="Look at it").click()
        assert managed.describe("linear")["modelVersion"] == "2.0"
        # Back to the old one, and the new one away.
        page.goto(f"{base}/#/models/linear/1.0/manage")
        confirm(page, "Make default")
        page.get_by_text("go to this one").wait_for()
        assert managed.describe("linear")["modelVersion"] == "1.0"
        page.goto(f"{base}/#/models/linear/2.0/manage")
        confirm(page, "Unregister")
        page.wait_for_url(f"{base}/#/")
        assert [each["modelVersion"] for each in managed.manage("GET", "/models/linear/all")] == ["1.0"]


def test_a_deployment_that_fails_changes_nothing_and_says_why(browser: Any, managed: Server) -> None:
    base = managed.url("management")
    with watched(browser, base) as seen:
        page = seen.page
        page.goto(f"{base}/#/deploy")
        page.get_by_label("Archive").fill("nothing.mar")
        confirm(page, "Deploy")
        page.locator(".outcome.bad").wait_for()
        assert "nothing.mar" in page.locator(".outcome.bad").inner_text()
        assert page.locator(".steps .bad").count() == 1
        seen.expected.append("404")
    assert managed.manage("GET", "/models/linear/all")[0]["modelVersion"] == "1.0"


def test_a_page_of_another_site_manages_nothing(browser: Any, managed: Server) -> None:
    base = managed.url("management")

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(b"<!doctype html><title>Elsewhere</title>")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        other = f"http://127.0.0.1:{elsewhere.server_port}"
        with watched(browser, base, other) as seen:
            seen.page.goto(other)
            results = seen.page.evaluate(
                """async (base) => {
                    const tell = (work) => work().then((answer) => String(answer.status), () => "refused");
                    const found = {};
                    found.put = await tell(() => fetch(base + "/models/linear?min_worker=3", {method: "PUT"}));
                    const blind = {method: "POST", mode: "no-cors"};
                    found.post = await tell(() => fetch(base + "/models?url=linear-2.mar", blind));
                    found.remove = await tell(() => fetch(base + "/models/linear", {method: "DELETE"}));
                    found.read = await tell(() => fetch(base + "/console/state"));
                    const frame = document.createElement("iframe");
                    frame.src = base + "/";
                    const loaded = new Promise((done) => { frame.onload = done; });
                    document.body.append(frame);
                    await loaded;
                    found.frame = frame.contentDocument === null ? "refused" : "read";
                    return found;
                }""",
                base,
            )  # fmt: skip
            assert results == {
                "put": "refused",
                "post": "0",
                "remove": "refused",
                "read": "refused",
                "frame": "refused",
            }
            frame = seen.page.frames[-1]
            assert "Models" not in frame.content()  # the browser shows its own page in its place
            seen.expected += ["CORS", "ERR_FAILED", "frame-ancestors", "403", "Framing", "BLOCKED_BY"]
        elsewhere.shutdown()
    assert len(managed.describe("linear")["workers"]) == 1
    assert [each["modelVersion"] for each in managed.manage("GET", "/models/linear/all")] == ["1.0"]


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1280, "dark")])
def test_nothing_stands_over_the_edge_and_nothing_is_serious(
    browser: Any, site: Server, width: int, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    for port in ("inference", "management"):
        base = site.url(port)
        with watched(browser, base, width=width, scheme=scheme) as seen:
            for view in VIEWS:
                seen.page.goto(f"{base}/{view}")
                seen.page.locator("main[aria-busy=false] > *").first.wait_for()
                seen.page.locator("main", has_not_text="Loading …").wait_for()
                over = seen.page.evaluate("document.documentElement.scrollWidth - innerWidth")
                assert over <= 0, f"{port} {view}: {over} px too wide"
                found = axe.run(seen.page).response["violations"]
                serious = [each for each in found if each["impact"] in ("serious", "critical")]
                told = [(each["id"], [node["html"] for node in each["nodes"]][:3]) for each in serious]
                assert not told, f"{port} {view}: {told}"


def test_the_keyboard_is_enough(browser: Any, site: Server) -> None:
    with watched(browser, site.url()) as seen:
        page = seen.page
        page.goto(site.url())
        page.get_by_role("link", name="linear").wait_for()

        def go_to(selector: str) -> None:
            for _ in range(60):
                page.keyboard.press("Tab")
                if page.evaluate(f"document.activeElement.matches({json.dumps(selector)})"):
                    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                    assert outline != "none", f"one does not see that {selector} has the focus"
                    return
            raise AssertionError(f"no way to {selector} by Tab")

        go_to(".skip")
        go_to("#search")
        page.keyboard.type("lin")
        page.get_by_text("1 model", exact=True).wait_for()
        go_to('tbody a[href*="linear"]')
        page.keyboard.press("Enter")
        page.locator("#try-text").wait_for()
        go_to("#try-text")
        page.keyboard.press("Control+A")
        page.keyboard.type("[0, 0, 0, 1]")
        go_to("#try-send")
        page.keyboard.press("Enter")
        page.locator(".answer-box .badge.good").wait_for()


def test_names_and_texts_with_html_are_text(browser: Any, managed: Server) -> None:
    def change(told: dict[str, Any], query: dict[str, str]) -> None:
        row = (
            {**told["models"]["rows"][0], "name": NASTY, "reason": NASTY, "state": "FAILED"}
            if told["models"]["rows"]
            else None
        )
        if row:
            told["models"]["rows"] = [row]
        if told.get("model"):
            told["model"] |= {"name": query["model"], "reason": NASTY, "version": NASTY, "versions": [NASTY, "1.0"]}
        error = {"at": 1, "request_id": NASTY, "method": "GET", "path": NASTY, "model": NASTY, "version": NASTY,
                 "status": 503, "type": "", "message": NASTY, "log": NASTY,
                 "detail": {"text": NASTY, "fix": NASTY}}  # fmt: skip
        if "errors" in told:
            told["errors"] = [error]
        if "log" in told:
            told["log"] = [{"at": 1, "level": "ERROR", "source": NASTY, "request_ids": "", "text": NASTY}]

    base = managed.url("management")
    with watched(browser, base) as seen:
        page = seen.page
        simulate(page, change)
        for view in ("#/", "#/errors", "#/log", f"#/models/linear/{'%3C'}"):
            page.goto(f"{base}/{view}")
            page.locator("main", has_not_text="Loading …").wait_for()
        page.goto(f"{base}/#/errors")
        page.get_by_text(NASTY).first.wait_for()
        assert page.locator("main script, main img").count() == 0


def test_ten_thousand_models_are_a_page_at_a_time(browser: Any, site: Server) -> None:
    def change(told: dict[str, Any], query: dict[str, str]) -> None:
        like = {**site_row, "state": "READY"}
        names = [name for name in (f"model-{number:05}" for number in range(10_000)) if query.get("search", "") in name]
        start, end = int(query.get("offset", 0)), int(query.get("offset", 0)) + int(query["limit"])
        told["counts"] = {"READY": 10_000}
        told["models"] = {
            "offset": start,
            "match": len(names),
            "rows": [{**like, "name": name} for name in names[start:end]],
        }

    site_row = site.ask("GET", "/console/state?limit=1").json["models"]["rows"][0]
    with watched(browser, site.url()) as seen:
        page = seen.page
        simulate(page, change)
        page.goto(site.url())
        page.get_by_text("1–50 of 10,000").wait_for()
        assert page.locator("tbody tr").count() == 50
        page.get_by_role("button", name="Next").click()
        page.get_by_text("51–100 of 10,000").wait_for()
        assert page.locator("tbody tr").first.locator("a").inner_text() == "model-00050"
        page.get_by_label("Search models by name").fill("09999")
        page.get_by_text("1 model", exact=True).wait_for()
        assert page.locator("tbody a").all_inner_texts() == ["model-09999"]


def test_a_browser_that_goes_away_costs_only_its_own_request(browser: Any, managed: Server) -> None:
    base = managed.url()
    before = managed.metric("pyserve_requests_aborted_total", model="slow")
    with watched(browser, base) as seen:
        seen.page.goto(f"{base}/#/models/slow/1.0/try")
        seen.page.locator("#try-text").fill('{"seconds": 3}')
        with seen.page.expect_request("**/predictions/slow"):
            send(seen.page)
        seen.page.get_by_role("button", name="Cancel").wait_for()

    def is_aborted() -> bool:
        return managed.metric("pyserve_requests_aborted_total", model="slow") == before + 1

    managed.wait_for(is_aborted, "the end of it")
    assert managed.ask("POST", "/predictions/slow", b'{"seconds": 0}', JSON).body == b"done"


def test_a_request_can_be_cancelled(browser: Any, managed: Server) -> None:
    base = managed.url()
    with watched(browser, base) as seen:
        seen.page.goto(f"{base}/#/models/slow/1.0/try")
        send(seen.page, '{"seconds": 3}')
        seen.page.get_by_role("button", name="Cancel").click()
        seen.page.get_by_text("Cancelled.").wait_for()
        assert seen.page.get_by_role("button", name="Send").is_visible()


def test_a_server_that_does_not_answer_is_said_to_and_seen_again(browser: Any, site: Server) -> None:
    with watched(browser, site.url()) as seen:
        page = seen.page
        page.goto(site.url())
        page.get_by_role("link", name="linear").wait_for()
        page.route(STATE, lambda route: route.abort())
        page.get_by_text("The server does not answer").wait_for()
        assert page.get_by_role("link", name="linear").is_visible()  # what was known stays
        page.unroute(STATE)
        page.get_by_role("button", name="Try again").click()
        page.get_by_text("Live", exact=True).wait_for()
        assert page.get_by_text("The server does not answer").count() == 0
        seen.expected.append("ERR_FAILED")


def test_the_page_asks_for_the_key_that_the_server_wants(browser: Any, server: Server) -> None:
    write_linear(server.store)
    (server.folder / "config.properties").write_text("disable_token_authorization=false\n")
    server.start("--models", "linear.mar")
    with watched(browser, server.url()) as seen:
        page = seen.page
        page.goto(server.url())
        field = page.get_by_label("Inference key")
        field.fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Enter the key").click()
        field.fill(server.key("inference")["Authorization"].removeprefix("Bearer "))
        page.get_by_role("dialog").get_by_role("button", name="Use").click()
        page.get_by_role("link", name="linear").click()
        send(page)
        page.locator(".answer-box .badge.good").wait_for()
        assert "$PYSERVE_TOKEN" in page.locator(".code pre").inner_text()
        seen.expected.append("401")


def test_refreshing_keeps_focus_text_and_places(browser: Any, site: Server) -> None:
    base = site.url("management")
    with watched(browser, base) as seen:
        page = seen.page
        page.goto(f"{base}/#/models/linear/1.0/manage")
        page.get_by_label("At least").fill("7")
        places = """[...document.querySelectorAll("main h2, main button, main input")]
            .map((each) => each.getBoundingClientRect().top)"""
        before = page.evaluate(places)
        for _ in range(3):
            with page.expect_response(STATE):
                pass
        page.wait_for_function(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
        )
        assert page.get_by_label("At least").input_value() == "7"
        assert page.evaluate("document.activeElement.id") == "workers-min"
        assert page.evaluate(places) == before
