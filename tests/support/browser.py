"""Headless Chromium for the console's tests: a page that notes whatever a console must never do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

LIMIT_MS = 120_000
NAMES = ("chromium", "chromium-browser", "google-chrome")


def open_browser() -> Iterator[Any]:
    """A browser, for a fixture; skips, in words that nobody misses, where there is none."""
    missing = "THE CONSOLE WAS NOT TRIED IN A BROWSER: "
    executable = next((found for name in NAMES if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"{missing}there is no Chromium; apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.skip(f"{missing}pip install playwright")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


class Watched:
    """A page and what went wrong on it.

    Attributes:
        page: of playwright.
        problems: errors and warnings of its console, exceptions, dialogs, requests to other hosts.
        expected: parts of problems that a test provokes.
    """

    def __init__(self, page: Any, hosts: set[str]):
        self.page = page
        self.problems: list[str] = []
        self.expected: list[str] = []
        page.set_default_timeout(LIMIT_MS)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("request", lambda request: self._on_request(request.url, hosts))
        page.on("dialog", self._on_dialog)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"{message.type}: {message.text} {message.location}")

    def _on_request(self, url: str, hosts: set[str]) -> None:
        if not url.startswith("blob:") and urlsplit(url).netloc not in hosts:
            self.problems.append(f"asked another host: {url}")

    def _on_dialog(self, dialog: Any) -> None:
        self.problems.append(f"a dialog: {dialog.message}")
        dialog.dismiss()

    def check(self) -> None:
        """Fails if anything went wrong that no test provoked."""
        unexpected = [each for each in self.problems if not any(part in each for part in self.expected)]
        assert not unexpected, unexpected


@contextmanager
def watched(
    browser: Any, *bases: str, width: int = 1280, height: int = 900, scheme: str = "light"
) -> Iterator[Watched]:
    """A page that may ask ``bases`` only; at the end nothing may have gone wrong."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    try:
        made = Watched(context.new_page(), {urlsplit(base).netloc for base in bases})
        yield made
        made.check()
    finally:
        context.close()


def confirm(page: Any, name: str) -> None:
    """Presses a button, and the one of that name in the question that comes."""
    page.get_by_role("button", name=name).click()
    page.get_by_role("dialog").get_by_role("button", name=name).click()


def send(page: Any, text: str | None = None) -> None:
    """Sends the request that the form has, or ``text`` in its place."""
    if text is not None:
        page.locator("#try-text").fill(text)
    page.get_by_role("button", name="Send").click()
