"""How READMEs are followed: what counts as the same output, and that all of the examples are complete and listed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples.readme_run import Step, pattern_of, read_steps
from tests.support.serving import ROOT

EXAMPLES = sorted(path.parent for path in (ROOT / "examples").glob("*/README.md"))

README = """
Text.

```console
$ one \\
    more
printed

$ two
```

```
not a command
```

```console
$ three &
$ four
of four
$ wait
of three
```
"""


def test_commands_and_what_they_print_are_found() -> None:
    assert read_steps(README) == [
        Step("one \\\n    more", "printed\n\n"),
        Step("two", ""),
        Step("three &\nfour\nwait", "of four\nof three\n"),
    ]
    with pytest.raises(ValueError, match="begins with 'printed'"):
        read_steps("```console\nprinted\n```\n")


@pytest.mark.parametrize(
    ("printed", "same", "other"),
    [
        ("took 1.5 s\n", "took 27 s\n", "took long s\n"),
        ("a  b\n", "a b\n", "a c\n"),
        ("log: .../logs\n", "log: /tmp/x/logs\n", "log: /tmp/x\n"),
        ("a\n...\nb\n", "a\n1\n2\nb\n", "a\n1\n2\n"),
        ("", "", "more\n"),
        ("a\n", "a\n", "a\nb\n"),
        ("(x) [1]\n", "(x) [2]\n", "x [2]\n"),
    ],
)
def test_words_count_and_numbers_do_not(printed: str, same: str, other: str) -> None:
    assert pattern_of(printed).fullmatch(same)
    assert not pattern_of(printed).fullmatch(other)


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_complete_listed_and_tested(folder: Path) -> None:
    here = {path.name for path in folder.iterdir()}
    assert {"README.md", "client.py", "make_model.py"} <= here
    assert f"]({folder.name})" in (ROOT / "examples/README.md").read_text()
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert f'example("{folder.name}", ' in tests
    commands = "\n".join(step.commands for step in read_steps((folder / "README.md").read_text()))
    for word in ("python make_model.py", "pyserve archive", "pyserve start", "python client.py", "pyserve stop"):
        assert word in commands
    described = re.findall(r"^\| `([^`]+)` \|", (folder / "README.md").read_text(), re.MULTILINE)
    assert set(described) <= here, "the table of files names what is not there"


def test_none_is_missing() -> None:
    assert len(EXAMPLES) >= 6
