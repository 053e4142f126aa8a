"""What a URL that is not fetched is answered, by pyserve and, with `compat=strict`, as TorchServe was measured to."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pyserve.config.config import Config
from pyserve.errors import ServeError
from pyserve.fetch import refusals
from pyserve.fetch.sources import ArchiveSources

FAILED = (400, "DownloadArchiveException", "Failed to download archive from: {}")
NOT_ALLOWED = (404, "ModelNotFoundException", "Given URL {} does not match any allowed URL(s)")
NOT_FOUND = (404, "ModelNotFoundException", "Model not found at: {}")
EXISTS = (500, "InternalServerException", "Model file already exists there.mar")


def refusal(store: Path, url: str, *, compat: str, allowed_urls: str = "") -> tuple[int, str, str]:
    config = Config(model_store=str(store), compat=compat, allowed_urls=allowed_urls)
    with pytest.raises(ServeError) as caught:
        asyncio.run(ArchiveSources(config).obtain(url))
    return caught.value.status, caught.value.type, caught.value.message


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "there.mar").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    "url, strict",
    [
        ("http://127.0.0.1:1/x.mar", FAILED),  # a host that refuses
        ("http://no.such.host.invalid/x.mar", FAILED),
        ("https://example.org/x.mar", FAILED),
        ("http:///x.mar", FAILED),
        ("http://a b/x.mar", FAILED),
        ("file:///nowhere/x.mar", FAILED),
        ("file://host/x.mar", FAILED),
        ("http://127.0.0.1:1/there.mar", EXISTS),
        ("http://127.0.0.1:1/there.mar?x=1", EXISTS),
        ("file:///nowhere/there.mar", EXISTS),
        ("s3://bucket/x.mar", NOT_FOUND),
        ("ftp://127.0.0.1/x.mar", NOT_FOUND),
        ("x://y", NOT_FOUND),
    ],
)
def test_with_nothing_allowed(store: Path, url: str, strict: tuple[int, str, str]) -> None:
    told = url.replace("x=1", "x=***")
    assert refusal(store, url, compat="strict") == (*strict[:2], strict[2].format(told))
    assert refusal(store, url, compat="default") == (*NOT_ALLOWED[:2], NOT_ALLOWED[2].format(told))
    assert [path.name for path in store.iterdir()] == ["there.mar"]


@pytest.mark.parametrize("compat", ["strict", "default"])
def test_what_the_patterns_leave_out_is_not_found(store: Path, compat: str) -> None:
    url = "https://example.org/x.mar"
    refused = refusal(store, url, compat=compat, allowed_urls=r"https://other\.org/.*")
    assert refused == (*NOT_ALLOWED[:2], NOT_ALLOWED[2].format(url))


def test_strict_mode_does_not_fetch_what_only_torchserves_patterns_allow(store: Path) -> None:
    """In TorchServe `.*` may stand for a host and a path alike, and for addresses of this machine."""
    url = "https://127.0.0.1:1/other.org/x.mar"
    assert refusal(store, url, compat="strict", allowed_urls=r"https://.*other\.org/.*") == (
        *FAILED[:2], FAILED[2].format(url),
    )  # fmt: skip


@pytest.mark.parametrize("url", ["s3://bucket/folder/there.mar", "ftp://127.0.0.1/there.mar", "x://y/there.mar"])
def test_of_schemes_that_torchserve_does_not_know_strict_mode_takes_the_name(store: Path, url: str) -> None:
    obtained = asyncio.run(ArchiveSources(Config(model_store=str(store), compat="strict")).obtain(url))
    assert (obtained.path, obtained.url, obtained.is_fetched) == (store / "there.mar", "there.mar", False)
    assert refusal(store, url, compat="default")[0] == 404


def test_the_log_says_what_strict_answers_do_not(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(refusals.log, "warning", lambda text, *values: said.append(text % values))
    refusal(store, "http://127.0.0.1:1/x.mar", compat="strict")
    assert any("http://127.0.0.1:1/x.mar is not fetched: allowed_urls is empty" in each for each in said)
