"""Trying models in the console, in a real browser: what is sent, and how the answer is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyserve.models.sample import write_sample_picture
from tests.support.browser import send, watched
from tests.support.handler_archives import write_handler
from tests.support.serving import Server
from tests.support.serving_models import write_pair, write_words

pytest_plugins = ["tests.support.serving_fixtures"]
pytestmark = pytest.mark.server

DRAWS = """
import base64
import io
from PIL import Image

def handle(data, context):
    if data is None:
        return None
    file = io.BytesIO()
    Image.new("RGB", (24, 16), data[0]["body"]["color"]).save(file, "PNG")
    if data[0]["body"].get("in_json"):
        return [{"mask": base64.b64encode(file.getvalue()).decode(), "name": "/9j/ is no picture"}] * len(data)
    context.set_response_content_type(0, "image/png")
    return [file.getvalue()] * len(data)
"""


@pytest.fixture(scope="module")
def tried(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """``words`` of texts, ``pair`` of two inputs, ``draws``, which answers a picture."""
    server = Server(tmp_path_factory.mktemp("tried"))
    write_words(server.store)
    write_pair(server.store)
    write_handler(server.store, "draws", DRAWS)
    server.start("--models", "all")
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return write_sample_picture(tmp_path / "sample.jpg")


def test_a_picture_is_dropped_and_its_label_read(browser: Any, site: Server, picture: Path) -> None:
    expected = site.ask("POST", "/predictions/pictures", picture.read_bytes(), {"Content-Type": "image/jpeg"}).json
    best = max(expected, key=expected.get)
    with watched(browser, site.url()) as seen:
        page = seen.page
        page.goto(site.url())
        page.get_by_role("link", name="pictures").click()
        page.evaluate(
            """async (bytes) => {
                const carried = new DataTransfer();
                carried.items.add(new File([new Uint8Array(bytes)], "cat.jpg", {type: "image/jpeg"}));
                const drop = new DragEvent("drop", {dataTransfer: carried, bubbles: true});
                document.querySelector(".drop").dispatchEvent(drop);
            }""",
            list(picture.read_bytes()),
        )
        first = page.locator(".bars li").first
        first.wait_for()
        assert first.locator(".label").inner_text() == best
        assert first.locator(".value").inner_text() == f"{expected[best] * 100:.1f} %"
        assert page.locator(".bars li").count() == 5
        assert page.locator(".preview img").evaluate("each => each.complete && each.naturalWidth > 0")
        assert "inference" in page.locator(".answer-box .stages").inner_text()
        assert "-T cat.jpg" in page.locator(".code pre").inner_text()


def test_numbers_are_filled_in_and_sent(browser: Any, site: Server) -> None:
    with watched(browser, site.url()) as seen:
        page = seen.page
        page.goto(f"{site.url()}/#/models/linear/1.0/try")
        page.get_by_role("button", name="random numbers").click()
        sent = json.loads(page.locator("#try-text").input_value())
        assert len(sent) == 4 and len(set(sent)) > 1
        send(page)
        shown = page.locator(".answer-box .leaf")
        shown.wait_for()
        assert json.loads(shown.inner_text()) == site.predict("linear", sent).json
        send(page, "[1, 2")
        page.locator(".answer-box .badge.warn").wait_for()
        assert page.locator(".answer-box .badge").inner_text() == "400"
        seen.expected.append("400")  # which the browser itself notes


def test_a_text_is_typed_and_its_label_read(browser: Any, tried: Server) -> None:
    with watched(browser, tried.url()) as seen:
        page = seen.page
        page.goto(f"{tried.url()}/#/models/words/1.0/try")
        for way, text in (("Text", "Good, good!"), ("JSON", '{"data": "worse"}')):
            page.get_by_label(way, exact=True).check()
            written = page.locator("#try-text").input_value()
            assert written == "The weather is lovely today." if way == "Text" else json.loads(written)["data"]
            send(page, text)
            label = {"Text": "praise", "JSON": "blame"}[way]
            page.locator(".bars li").first.get_by_text(label).wait_for()
            assert page.locator(".bars li").count() == 2
        page.get_by_label("Text", exact=True).check()
        assert page.locator("#try-text").input_value() == "Good, good!"  # each way keeps its own


def test_several_named_inputs_are_filled_in_as_the_model_allows(browser: Any, tried: Server) -> None:
    with watched(browser, tried.url()) as seen:
        page = seen.page
        page.goto(f"{tried.url()}/#/models/pair/1.0/try")
        for filler in ("zeros", "random numbers"):
            page.get_by_role("button", name=filler).click()
            sent = json.loads(page.locator("#try-text").input_value())
            assert list(sent) == ["ids", "mask"] and len(sent["ids"]) == len(sent["mask"]) >= 8
            assert all(5 <= each <= 9 for each in sent["ids"]) and set(sent["mask"]) == {1}
            send(page)
            page.locator(".answer-box .leaf").get_by_text(f"[{sum(sent['ids'])}]", exact=True).wait_for()
            assert page.locator(".answer-box .badge.good").is_visible()
        page.locator(".code").get_by_role("button", name="Python", exact=True).click()
        run: dict[str, Any] = {"answers": []}
        exec(page.locator(".code pre").inner_text().replace("print(", "answers.append("), run)
        assert run["answers"] == [[sum(sent["ids"])]]


def test_a_picture_as_the_answer_is_shown(browser: Any, tried: Server) -> None:
    with watched(browser, tried.url()) as seen:
        page = seen.page
        page.goto(f"{tried.url()}/#/models/draws/1.0/try")
        for body in ('{"color": "teal"}', '{"color": "red", "in_json": true}'):
            with page.expect_response("**/predictions/draws"):
                send(page, body)
            page.locator(".answer-box[aria-busy]").wait_for(state="detached")
            shown = page.locator(".answer-box img")
            assert shown.evaluate("async each => { await each.decode(); return each.naturalWidth; }") == 24
        assert page.get_by_text("The whole answer").is_visible()


def test_each_snippet_makes_the_same_call(browser: Any, site: Server) -> None:
    with watched(browser, site.url()) as seen:
        page = seen.page
        page.goto(f"{site.url()}/#/models/linear/1.0/try")
        page.locator("#try-text").fill("[1, 2, 3, 4.5]")
        code = {}
        for name in ("curl", "Python", "requests", "JavaScript"):
            page.locator(".code").get_by_role("button", name=name, exact=True).click()
            code[name] = page.locator(".code pre").inner_text()
        run = {"json": json, "answers": []}
        exec(code["Python"].replace("print(", "answers.append("), run)
        expected = site.predict("linear", [1, 2, 3, 4.5]).json
        assert run["answers"] == [expected]
        answered = page.evaluate(f"(async () => {{ {code['JavaScript'].replace('console.log(', 'return (')} }})()")
        assert answered == expected
        assert code["curl"].startswith(f"curl -X POST {site.url()}/predictions/linear")
        assert f'"{site.url()}/predictions/linear"' in code["requests"]
