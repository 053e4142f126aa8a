"""The pages of the documentation: the generated ones are up to date, links lead somewhere, and each page is reached."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml

from docs import assemble, generate
from pyserve.handler import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
README_LINES_MAX = 150
PAGES = ["config-properties.md", "model-config.md", "commands.md", "metrics.md", "pyserve.1"]


@cache
def pages() -> dict[str, str]:
    return generate.pages()


def slugs(text: str) -> set[str]:
    """The anchors that the headings of a page have, as GitHub and the site make them."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(text: str, document: str) -> list[str]:
    """Links of a document that lead to no file, or to no heading of it."""
    broken = []
    for link in assemble.local_links(text):
        target, heading = assemble.target_of(link, document), link.partition("#")[2]
        if target.startswith(".."):  # of the host of the repository
            continue
        path = ROOT / target
        if not path.exists():
            broken.append(link)
        elif heading:
            page = text if target == document else path.read_text()
            broken += [link] * (heading not in slugs(page))
    return broken


def test_all_pages_are_compared() -> None:
    assert sorted(pages()) == sorted(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_a_reference_page_is_up_to_date(name: str) -> None:
    text = (ROOT / "docs" / "reference" / name).read_text()
    assert text == pages()[name], "run python docs/generate.py"


def test_a_key_needs_one_text_and_a_text_one_key() -> None:
    generate.check_same("keys", ["a", "b"], {"b", "a"})
    for described, existing, problem in (
        (["a"], {"a", "b"}, "no text for b"),
        (["a", "b"], {"a"}, "no such b"),
        (["a", "a"], {"a"}, "two texts for a"),
    ):
        with pytest.raises(generate.DocumentationError, match=problem):
            generate.check_same("keys", described, existing)


def test_a_flag_and_its_help_are_in_the_page_of_commands() -> None:
    page = pages()["commands.md"]
    assert "| `--foreground` | " in page.partition("## pyserve start\n")[2].partition("\n## ")[0]
    assert "## torchserve\n" in page and "## torch-model-archiver\n" in page
    assert "| `--interval S` | between two looks (default 2) |" in page and "%(" not in page
    assert "%(" not in (ROOT / "docs/reference/pyserve.1").read_text()


@pytest.mark.parametrize("document", sorted(assemble.documents()))
def test_links_lead_somewhere(document: str) -> None:
    assert broken_links((ROOT / document).read_text(), document) == []


def test_a_broken_link_is_found() -> None:
    text = "# Here\n[a](nowhere.md) [b](grpc.md#no-such-heading) [c](#here) `[d](code.md)` [e](../README.md#x)"
    assert broken_links(text, "docs/grpc.md") == ["nowhere.md", "grpc.md#no-such-heading", "../README.md#x"]


def test_links_are_right_in_the_site_too() -> None:
    known = {"README.md": "index.md", "docs/grpc.md": "grpc.md", "docs/api/index.md": "api/index.md"}
    assert assemble.rewritten("[a](docs/grpc.md#x) [b](#y)", "README.md", known) == "[a](grpc.md#x) [b](#y)"
    assert assemble.rewritten("[a](../../README.md)", "docs/api/index.md", known) == "[a](../index.md)"
    assert assemble.rewritten("[code](../Makefile) [s](../../../issues)", "docs/grpc.md", known) == "code s"
    assert assemble.rewritten("```\n[a](docs/grpc.md)\n```", "README.md", known) == "```\n[a](docs/grpc.md)\n```"
    with pytest.raises(assemble.BrokenLinkError, match=r"README\.md: docs/none\.md"):
        assemble.rewritten("[a](docs/none.md)", "README.md", known)


def test_every_page_is_in_the_navigation() -> None:
    def leaves(node: object) -> list[str]:
        if isinstance(node, str):
            return [node]
        values = node.values() if isinstance(node, dict) else node
        return [leaf for each in values for leaf in leaves(each)]  # type: ignore[attr-defined]

    nav = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = assemble.documents().values()
    assert sorted(nav) == sorted(page for page in pages if not page.startswith("examples/"))


def test_every_example_is_in_the_page_of_examples() -> None:
    links = assemble.local_links((ROOT / "docs/examples.md").read_text())
    examples = {f"../examples/{path.parent.name}/README.md" for path in (ROOT / "examples").glob("*/README.md")}
    assert examples and set(links) == examples


def test_the_api_has_every_built_in_handler() -> None:
    page = (ROOT / "docs/api/handlers.md").read_text()
    shown = re.findall(r"^::: (.+)$", page, re.MULTILINE)
    assert {built_in.module for built_in in BUILT_IN.values()} <= set(shown)
    for api_page in (ROOT / "docs" / "api").glob("*.md"):
        for module in re.findall(r"^::: (.+)$", api_page.read_text(), re.MULTILINE):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), module


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES_MAX


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
def test_the_manual_page_is_good_roff() -> None:
    path = ROOT / "docs/reference/pyserve.1"
    # mandb's own variable for what groff finds fault with; no pager, and a width that does not depend on a window.
    done = subprocess.run(["man", "--warnings", "--local-file", str(path)], capture_output=True, text=True, check=True,
                          env={**os.environ, "MANWIDTH": "100", "LC_ALL": "C.UTF-8", "MANPAGER": "cat"})  # fmt: skip
    assert done.stderr == ""
    plain = re.sub(r".\x08|\x1b\[[0-9;]*m", "", done.stdout)
    for text in ("pyserve - serve PyTorch models", "--model-store DIR", "pyserve top"):
        assert text in plain
