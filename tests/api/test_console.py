"""The console's page and files: who gets them, how they are cached, and what they may never do."""

from __future__ import annotations

import re

import pytest

from pyserve.api.console import FOLDER, Console, wants_page
from pyserve.api.page_files import POLICY
from pyserve.api.routes import Router
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Request, Response

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
SIZE_MAX = 300_000
FILES = sorted(path for path in FOLDER.iterdir() if path.is_file())


def alive(exchange: Exchange) -> Response:
    return Response(200, b"alive")


def ask(router: Router, path: str, method: str = "GET", **headers: str) -> Response:
    answers: list[Response] = []

    def deliver(exchange: Exchange) -> None:
        assert exchange.response is not None
        answers.append(exchange.response)

    router(Exchange(Request(method, path, headers=[(k.replace("_", "-"), v) for k, v in headers.items()]), deliver))
    [answer] = answers
    return answer


@pytest.fixture(scope="module")
def inference() -> Router:
    rows = [("GET", "/", alive)]
    return Router([*Console("inference").routes(rows), *rows])


@pytest.fixture(scope="module")
def management() -> Router:
    rows = [("OPTIONS", "/", alive)]
    return Router([*Console("management").routes(rows), *rows])


def test_a_browser_gets_the_page(inference: Router, management: Router) -> None:
    for router, scope in ((inference, b"inference"), (management, b"management")):
        answer = ask(router, "/", accept=BROWSER)
        assert answer.status == 200 and answer.content_type == "text/html; charset=utf-8"
        assert b'data-scope="' + scope + b'" data-both="false"' in bytes(answer.body)
        assert answer.headers["Vary"] == "Accept"


@pytest.mark.parametrize("accept", ["", "*/*", "application/json", "text/*", "text/html;q=0, */*", "text/htmlx"])
def test_other_clients_get_what_they_always_got(inference: Router, management: Router, accept: str) -> None:
    headers = {"accept": accept} if accept else {}
    assert ask(inference, "/", **headers).body == b"alive"
    refused = ask(management, "/", **headers)
    assert refused.status == 405 and refused.headers["Allow"] == "OPTIONS"


def test_html_has_to_be_asked_for_by_name() -> None:
    assert wants_page(Request("GET", "/", headers=[("Accept", "TEXT/HTML")]))
    assert not wants_page(Request("GET", "/", headers=[("Accept", "*/*")]))


def test_a_page_for_both_apis_says_so() -> None:
    router = Router(Console("management", serves_both=True).routes([]))
    assert b'data-scope="management" data-both="true"' in bytes(ask(router, "/", accept="text/html").body)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_is_answered_with_its_type_and_kept_by_the_browser(inference: Router, path: object) -> None:
    name = path.name  # type: ignore[attr-defined]
    answer = ask(inference, f"/console/{name}")
    assert answer.status == 200 and answer.headers["X-Content-Type-Options"] == "nosniff"
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
    assert str(answer.content_type).startswith(kinds["." + name.rpartition(".")[2]])
    tag = answer.headers["ETag"]
    assert re.fullmatch(r'"[0-9a-f]{32}"', tag)
    for known in (tag, f'W/{tag}, "other"'):
        again = ask(inference, f"/console/{name}", if_none_match=known)
        assert again.status == 304 and not again.body and again.headers["ETag"] == tag
    assert ask(inference, f"/console/{name}", if_none_match='"other"').status == 200


@pytest.mark.parametrize("path", ["/console/none.js", "/console/..", "/console/../api/console.py", "/console/"])
def test_nothing_else_is_answered(inference: Router, path: str) -> None:
    assert ask(inference, path).status == 404


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    rules = dict(each.strip().partition(" ")[::2] for each in POLICY.split(";"))
    assert rules["default-src"] == "'self'" and rules["frame-ancestors"] == "'none'"
    assert rules["base-uri"] == rules["form-action"] == rules["object-src"] == "'none'"
    assert "unsafe" not in POLICY and "http" not in POLICY and "*" not in POLICY and "data:" not in POLICY
    assert rules["require-trusted-types-for"] == "'script'"  # text never becomes elements


def test_the_page_and_its_files_are_small() -> None:
    assert sum(path.stat().st_size for path in FILES) <= SIZE_MAX
    assert len(FILES) > 10


def test_the_page_has_no_script_or_style_of_its_own() -> None:
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert not [each for each in re.findall(r"<script\b[^>]*>(.*?)</script>", page, re.S) if each.strip()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_name_no_other_host_and_make_no_elements_of_text(path: object) -> None:
    text = path.read_text()  # type: ignore[attr-defined]
    others = set(re.findall(r"\bhttps?://[\w.-]+", text)) - {"http://www.w3.org"}  # the namespace of SVG
    assert not others
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function", text
    )
    assert len(text.splitlines()) <= 500


def test_every_file_is_used(inference: Router) -> None:
    used = {"index.html"}
    todo = ["index.html"]
    while todo:
        found = re.findall(r'(?:from "\./|console/)([\w-]+\.\w+)"', (FOLDER / todo.pop()).read_text())
        todo += sorted(set(found) - used)
        used |= set(found)
    assert used == {path.name for path in FILES}
