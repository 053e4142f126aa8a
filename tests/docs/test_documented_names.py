"""What the documents name exists: files, commands and their flags, keys, metrics, variables, targets, identifiers.

Each check takes a text and returns what it names in vain, so that the same checks can be shown a text that is wrong.
"""

from __future__ import annotations

import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from docs import generate
from pyserve.archive.model_config import _KEYS as MODEL_KEYS
from pyserve.config.keys import (
    ACCEPTED_KEYS,
    KINDS,
    MODEL_SETTINGS,
    OWN_VARIABLES,
    SNAPSHOT_KEYS,
    SWITCH_KEYS,
    VARIABLES,
)
from pyserve.config.keys import (
    MODEL_KEYS as MODEL_PARAMETERS,
)
from pyserve.handler import BUILT_IN

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "DEVIATIONS.md", "SECURITY.md", "bench/README.md"]
DOCUMENTS = [ROOT / name for name in NAMES if (ROOT / name).is_file()] + [
    path
    for path in sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*/README.md")])
    if path.name != "correctness.md"  # figures, and not by hand
]
SOURCES = ["pyserve", "handlers", "csrc", "bench", "tests", "deploy", "examples"]
SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cc", ".proto", ".yaml", ".yml", ".properties", ".sh", ".toml", ".cfg"}
FOLDERS = ("pyserve", "handlers", "csrc", "bench", "tests", "deploy", "docs", "examples")

# Between processes of ours.
INTERNAL_VARIABLES = {
    "PYSERVE_SERVER", "PYSERVE_SUPERVISOR", "PYSERVE_WEIGHTS_CACHE", "PYSERVE_CHECK", "PYSERVE_GIVEN",
    "PYSERVE_LIFELINE", "PYSERVE_WORKER", "PYSERVE_OWN_VARIABLES",
}  # fmt: skip

BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")


@cache
def parsers() -> dict[str, ArgumentParser]:
    return generate.parsers()


@cache
def flags() -> frozenset[str]:
    """Of every command, and of the scripts."""
    own = {option for parser in parsers().values() for action in parser._actions for option in action.option_strings}
    scripts = (path.read_text() for folder in ("bench", "docs", "examples") for path in (ROOT / folder).rglob("*.py"))
    return frozenset(own | {flag for text in scripts for flag in re.findall(r'"(--[a-z-]+)"', text)})


@cache
def metrics() -> frozenset[str]:
    return frozenset(name for name, _, _ in generate.own_metrics())


@cache
def source_files() -> tuple[Path, ...]:
    found = [path for folder in SOURCES for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    # Not the folder of this file, which names wrong names; nor what is reached twice, through pyserve/handlers.
    own, link = ROOT / "tests" / "docs", ROOT / "pyserve" / "handlers"
    return tuple(path for path in found if own not in path.parents and link not in path.parents)


@cache
def source_words() -> frozenset[str]:
    """Every word of the code, names of files among them."""
    others = [ROOT / name for name in ("Makefile", "pyproject.toml", "setup.py", "deploy/Dockerfile", "mkdocs.yml")]
    texts = (path.read_text(errors="replace") for path in (*source_files(), *others, *(ROOT / "docs").glob("*.py")))
    stems = {path.stem for path in source_files()}
    return frozenset(stems | {word for text in texts for word in re.findall(r"\w+", text)})


@cache
def file_names() -> frozenset[str]:
    return frozenset(path.name for path in (*source_files(), ROOT / "setup.py"))


# In a document NAME stands for a name.
PLACEHOLDER = "NAME"


def blocks(text: str, language: str | None = None) -> list[str]:
    return [block for found, block in BLOCK.findall(text) if language is None or found == language]


def spans(text: str) -> list[str]:
    return SPAN.findall(BLOCK.sub("", text))


def code(text: str) -> list[str]:
    """All that is set as code, commands that go over several lines in one."""
    return [each.replace("\\\n", " ") for each in (*blocks(text), *spans(text))]


def missing_files(text: str) -> Iterator[str]:
    """Paths below a folder of the repository, and names of source files."""
    for path in re.findall(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./*-]*[\w*/])", text):  # in prose too
        if not any(ROOT.glob(path.replace(PLACEHOLDER, "*"))) and not (ROOT / path).exists():
            yield path
    for span in spans(text):
        if re.fullmatch(r"\w+\.(py|pyi|h|cpp|proto)", span) and span not in file_names():
            yield span


def missing_commands(text: str) -> Iterator[str]:
    """``pyserve start --flag``: the command, and each flag of it."""
    programs = {name.split()[0] for name in parsers()}
    for line in (line for each in code(text) for line in typed_lines(each)):
        words = line.split("#")[0].split()
        for index, word in enumerate(words):
            program = word.removeprefix(".venv/bin/")
            if program not in programs or (index and words[index - 1] not in ("&", "&&", "|", "$")):
                continue
            rest = words[index + 1 :]
            if program == "pyserve":
                if not rest or rest[0].startswith("-") or rest[0].isupper():  # `pyserve COMMAND --help`
                    continue
                # `pyserve torchserve` is the program of that name.
                program, rest = rest[0] if rest[0] in programs else f"pyserve {rest[0]}", rest[1:]
            if program not in parsers():
                yield program
                continue
            options = {option for action in parsers()[program]._actions for option in action.option_strings}
            yield from (f"{program} {flag}" for flag in flags_of(rest) if flag not in options)


def typed_lines(block: str) -> list[str]:
    """The lines of a block that are typed: of a terminal's those behind its prompt, else all."""
    lines = block.splitlines()
    return [line for line in lines if line.startswith("$ ")] or lines


def flags_of(words: list[str]) -> Iterator[str]:
    for word in words:
        if word in ("|", "&", "&&", ";", ">"):
            return
        flag = re.match(r"--?[a-z][a-z-]*", word)
        if flag:
            yield flag[0]


def missing_flags(text: str) -> Iterator[str]:
    """A flag that stands alone, or with its value: of any command, or of any script."""
    for span in spans(text):
        flag = re.match(r"--[a-z][a-z-]*", span)
        if flag and flag[0] not in flags():
            yield flag[0]


def missing_config_keys(text: str) -> Iterator[str]:
    """``key=value``: of config.properties, or a parameter of the management API."""
    known = {*KINDS, *MODEL_PARAMETERS, *ACCEPTED_KEYS, *SWITCH_KEYS, *SNAPSHOT_KEYS}
    for span in spans(text):
        key = re.fullmatch(r"([a-z][a-z0-9]*(?:_[a-z0-9]+)+)=.*", span)
        if key and key[1] not in known:
            yield key[1]
    for block in blocks(text, "") + blocks(text, "properties"):
        for key in re.findall(r"(?:^|(?<=[ ']))([a-z][a-z0-9]*(?:_[a-z0-9]+)+)=(?=\S)", block):
            if key not in known:
                yield key


def missing_model_keys(text: str) -> Iterator[str]:
    """The keys of blocks of YAML, which are all of model-config.yaml; and spans such as ``conversion: python``."""
    handler_keys = generate.descriptions("model-config")["handler_keys"]["keys"]
    for block in blocks(text, "yaml"):
        yield from (key for key in yaml.safe_load(block) if key not in {*MODEL_KEYS, *handler_keys})
    for span in spans(text):
        key = re.fullmatch(r"([a-z]+[A-Z]\w*): \S.*", span)
        if key and key[1] not in {*MODEL_KEYS, *handler_keys, *MODEL_SETTINGS}:
            yield key[1]


def missing_metrics(text: str) -> Iterator[str]:
    for each in code(text):
        for name in re.findall(r"(?<![\w/.-])pyserve_[a-z_]+[a-z](?![\w.])", each):
            if re.sub(r"_(bucket|sum|count)$", "", name) not in metrics():
                yield name


def missing_variables(text: str) -> Iterator[str]:
    """Environment variables."""
    for name in re.findall(r"\b(?:PYSERVE|TS|OTEL|FSSPEC)_[A-Z0-9_]*[A-Z0-9]\b", text):
        known = name in {*OWN_VARIABLES.values(), *VARIABLES.values()} or name in source_words()
        if not known and not name.startswith("FSSPEC_") and not name.endswith(PLACEHOLDER):
            yield name


def missing_targets(text: str) -> Iterator[str]:
    """``make target``."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for each in code(text):
        yield from (name for name in re.findall(r"(?:^|\s)make ([a-z]+)", each) if name not in targets)


def missing_identifiers(text: str) -> Iterator[str]:
    """Names with an underscore or of several cases, and dotted ones: each part is a word of the code."""
    for span in spans(text):
        if not re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", span) or "/" in span:
            continue
        name = span.partition("(")[0]
        if (
            name.isupper()
            or PLACEHOLDER in name
            or not re.search(r"_|\.|[a-z][A-Z]", name)
            or re.search(r"\.(mar|pth|pt2?|jpg|so|log|p12|md|json|txt)$", name)
        ):
            continue
        yield from (part for part in name.split(".") if part and part not in source_words() | metrics())


CHECKS: list[Callable[[str], Iterator[str]]] = [
    missing_files, missing_commands, missing_flags, missing_config_keys, missing_model_keys, missing_metrics,
    missing_variables, missing_targets, missing_identifiers,
]  # fmt: skip


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
@pytest.mark.parametrize("check", CHECKS)
def test_what_a_document_names_exists(path: Path, check: Callable[[str], Iterator[str]]) -> None:
    assert sorted(set(check(path.read_text()))) == []


@pytest.mark.parametrize(
    ("check", "text", "named"),
    [
        (missing_files, "`pyserve/http1.py`", "pyserve/http1.py"),
        (missing_files, "see `nowhere.cpp`", "nowhere.cpp"),
        (missing_files, "the ring (csrc/rings.h)", "csrc/rings.h"),
        (missing_files, "```\npython bench/nothing.py --all\n```", "bench/nothing.py"),
        (missing_commands, "`pyserve begin`", "pyserve begin"),
        (missing_commands, "```\n$ pyserve start --model-stor x\n```", "pyserve start --model-stor"),
        (missing_commands, "```\npyserve start --models a \\\n    --forground\n```", "pyserve start --forground"),
        (missing_commands, "```\ntorchserve --begin\n```", "torchserve --begin"),
        (missing_commands, "```console\n$ pyserve stop --slowly\npyserve has stopped.\n```", "pyserve stop --slowly"),
        (missing_flags, "with `--nonsense FILE`", "--nonsense"),
        (missing_config_keys, "`job_queue_sise=3`", "job_queue_sise"),
        (missing_config_keys, "```\nprintf '%s\\n' enable_grcp=true 'allowed_url=x' > f\n```", "allowed_url"),
        (missing_model_keys, "```yaml\nbatchsize: 3\n```", "batchsize"),
        (missing_model_keys, "`minBatches: 3`", "minBatches"),
        (missing_metrics, "`pyserve_queue_length`", "pyserve_queue_length"),
        (missing_metrics, "```\ncurl x?name[]=pyserve_queue_siz\n```", "pyserve_queue_siz"),
        (missing_variables, "`PYSERVE_JOB_QUEUE`", "PYSERVE_JOB_QUEUE"),
        (missing_variables, "TS_NOTHING_AT_ALL", "TS_NOTHING_AT_ALL"),
        (missing_targets, "`make everything`", "everything"),
        (missing_identifiers, "`context.remaining_seconds(idx)`", "remaining_seconds"),
        (missing_identifiers, "`Lane._admitted_once`", "_admitted_once"),
    ],
)
def test_a_wrong_name_is_found(check: Callable[[str], Iterator[str]], text: str, named: str) -> None:
    assert named in set(check(text))


def test_each_check_was_shown_a_wrong_name() -> None:
    shown = next(mark for mark in test_a_wrong_name_is_found.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    assert {check for check, _, _ in shown.args[1]} == set(CHECKS)


def test_the_documents_are_not_read_past() -> None:
    """What the checks look for is there: patterns that match nothing would find nothing wrong."""
    readme, reference = (ROOT / "README.md").read_text(), (ROOT / "docs/reference/metrics.md").read_text()
    assert sum("pyserve" in line for block in blocks(readme) for line in block.splitlines()) >= 4
    assert len(spans(readme)) > 40 and len(blocks(readme, "yaml")) >= 1
    assert len(re.findall(r"pyserve_[a-z_]+", reference)) > 20


def test_every_built_in_handler_is_described() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/models.md").read_text(), re.MULTILINE))
    assert described == set(BUILT_IN)


def test_every_environment_variable_of_ours_is_described() -> None:
    read = {
        name
        for path in source_files()
        if path.is_relative_to(ROOT / "pyserve") or path.is_relative_to(ROOT / "handlers")
        for name in re.findall(r"\"(PYSERVE_[A-Z_]+)\"", path.read_text())
    }
    reference = (ROOT / "docs/reference/config-properties.md").read_text()
    assert len(read) >= 4
    assert {name for name in read - INTERNAL_VARIABLES if f"`{name}`" not in reference} == set()
