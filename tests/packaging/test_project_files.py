"""What stands at the door agrees with itself: Makefile, CI, pre-commit, pyproject.toml, the container."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = {
    name for line in re.findall(r"^\.PHONY:((?:.*\\\n)*.*)$", MAKEFILE, re.M) for name in line.replace("\\", "").split()
}
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
MADE = ("build/", "dist/", "site/")  # what a fresh clone has not
TOOLS = {"ruff", "mypy", "clang-format"}


def made_by(commands: str) -> list[str]:
    """The targets that ``make`` is called with."""
    return [
        word
        for line in re.findall(r"\bmake\b([^\n|&;`]*)", commands)
        for word in line.split()
        if re.fullmatch("[a-z]+", word)
    ]


def test_make_prints_every_target_with_a_sentence() -> None:
    plain = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    said = dict(re.findall(r"^make (\S+) +(\S.*)$", plain, re.M))
    assert set(said) == TARGETS
    assert plain == subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_ci_runs_targets_of_the_makefile_and_nothing_else() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    action = yaml.safe_load((ROOT / ".github" / "actions" / "set-up" / "action.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]] + action["runs"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    made = {name for command in commands for name in made_by(command)}
    assert made == {"build", "lint", "fast", "test", "wheel", "docs"}
    assert made <= TARGETS
    assert {command.split()[0] for command in commands} <= {"make", "sudo"}


def test_workflows_read_only_and_name_actions_by_commit() -> None:
    for path in (ROOT / ".github").rglob("*.yml"):
        text = path.read_text()
        for used in re.findall(r"uses: (\S+)", text):
            assert used.startswith("./") or re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", used), f"{path}: {used}"
        if path.parent.name == "workflows":
            assert yaml.safe_load(text)["permissions"] == {"contents": "read"}
        # .gitignore has names that also stand elsewhere: a file it hides is missing from a clone.
        assert subprocess.run(["git", "check-ignore", "--quiet", str(path)], cwd=ROOT, check=False).returncode != 0


def test_the_tools_that_change_files_are_pinned_once() -> None:
    dev = PROJECT["project"]["optional-dependencies"]["dev"]
    pinned = {each.partition("==")[0] for each in dev if re.fullmatch(r"[\w-]+==[\d.]+", each)}
    assert pinned >= TOOLS
    for name, extra in PROJECT["project"]["optional-dependencies"].items():
        if name != "dev":
            assert not TOOLS & {re.split(r"[^\w-]", each)[0] for each in extra}


def test_before_a_commit_runs_what_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert all(hook["entry"].startswith(".venv/bin/") for hook in hooks)
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    assert lint is not None
    called = set(re.findall(r"\$\(BIN\)/([\w-]+)", lint[1]))
    assert {hook["entry"].split()[0].removeprefix(".venv/bin/") for hook in hooks} == called == TOOLS


def test_documents_at_the_door_name_targets_and_files_that_exist() -> None:
    for name in ("CONTRIBUTING.md", "SECURITY.md", ".github/PULL_REQUEST_TEMPLATE.md"):
        text = (ROOT / name).read_text()
        assert set(made_by("\n".join(re.findall(r"`(make [^`]*)`", text)))) <= TARGETS, name
        for link in re.findall(r"\]\((?!https?:|\.\./\.\.)([^)#]+)", text):
            assert (ROOT / name).parent.joinpath(link).exists(), f"{name}: {link}"
        for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text):
            assert (ROOT / path).exists() or "NAME" in path or path.startswith(MADE), f"{name}: {path}"


def test_the_container_is_built_from_all_that_the_package_needs() -> None:
    project = PROJECT["project"]
    needed = {"pyproject.toml", "setup.py", "csrc", "pyserve", "handlers", project["readme"], *project["license-files"]}
    copied = {name for line in re.findall(r"^COPY (?!--)(.*) \S+$", (ROOT / "deploy/Dockerfile").read_text(), re.M)
              for name in line.split()}  # fmt: skip
    assert copied == needed
    shown = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {line[1:] for line in shown if line.startswith("!")} >= needed


def test_the_licence_is_the_one_that_is_named() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
