"""Writes the reference pages in docs/reference: what the code's own tables say, beside the texts of docs/descriptions.

    python docs/generate.py            writes the pages, and the site's sources into build/site-sources
    python docs/generate.py --check    writes nothing; exits with 1 if a page is not up to date

A key, a command or a flag without a text is an error, and so is a text for something that does not exist.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from docs.assemble import assemble
from docs.man_page import man_page
from pyserve.commands.completion import help_text

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTE = "<!-- Written by docs/generate.py; change docs/descriptions/{name}.yaml or the code, and run it again. -->"


class DocumentationError(Exception):
    """The texts and the code do not fit together; the message names what is missing or too much."""


def descriptions(name: str) -> dict[str, Any]:
    """The texts of ``docs/descriptions/NAME.yaml``."""
    texts: dict[str, Any] = yaml.safe_load((DOCS / "descriptions" / f"{name}.yaml").read_text())
    return texts


def check_same(what: str, described: Iterable[str], existing: Iterable[str]) -> None:
    """Raises DocumentationError unless the two have the same names, each once."""
    names = list(described)
    twice = {name for name in names if names.count(name) > 1}
    missing, unknown = set(existing) - set(names), set(names) - set(existing)
    for problem, found in (("no text for", missing), ("no such", unknown), ("two texts for", twice)):
        if found:
            raise DocumentationError(f"{what}: {problem} {', '.join(sorted(found))}")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; ``|`` in cells is escaped, also within code, as GitHub and the site both want."""
    lines = [list(head), *[list(row) for row in rows]]
    lines.insert(1, ["---"] * len(lines[0]))
    escaped = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def code(text: object) -> str:
    return f"`{text}`" if str(text) else ""


def prose(text: object) -> str:
    """Text that was not written as Markdown, such as a flag's help: words that Markdown would read become code."""
    parts = re.split(r"(`[^`]*`)", str(text))
    word = r"(?<![^\s(])([^\s(]*[\[\]<>*_\\]\S*?)(?=[),;:.]*(?:\s|$))"
    return "".join(part if part.startswith("`") else re.sub(word, r"`\1`", part) for part in parts)


def page(name: str, texts: Mapping[str, Any], *sections: str) -> str:
    """A page: heading, introduction, sections."""
    parts = [f"# {texts['title']}", NOTE.format(name=name), str(texts["about"]).strip(), *sections]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- config.properties ----------------------------------------------------------------------------------------------


def config_page() -> str:
    """Every key of config.properties: text, allowed values, default, environment variables and flag."""
    from pyserve.config import keys

    texts = descriptions("config-properties")
    described = [key for group in texts["groups"] for key in group["keys"]]
    check_same("config.properties", described, set(keys.KINDS) - keys.FLAG_ONLY)
    check_same("config.properties switches", texts["switches"], keys.SWITCH_KEYS)
    sections = [f"## {group['title']}\n\n" + _config_rows(group["keys"]) for group in texts["groups"]]
    switches = table(("key", "meaning"), ((code(key), text) for key, text in texts["switches"].items()))
    ignored = table(("key", "why"), ((code(key), prose(why)) for key, why in sorted(keys.ACCEPTED_KEYS.items())))
    variables = texts["environment"]
    return page(
        "config-properties", texts, *sections,
        f"## Which environment variables are read\n\n{switches}",
        f"## Keys of TorchServe without effect\n\nThey are accepted, and named once in the log at start.\n\n{ignored}",
        f"## Other environment variables\n\n{variables['about']}\n\n"
        + table(("variable", "meaning"), ((code(name), text) for name, text in variables["keys"].items())),
    )  # fmt: skip


def _config_rows(texts: Mapping[str, str]) -> str:
    from pyserve.config import keys

    flags = config_flags()
    rows = []
    for key, text in texts.items():
        others = [flags.get(key, ""), keys.VARIABLES.get(key, ""), keys.OWN_VARIABLES[key]]
        rows.append((code(key), text, prose(keys.KINDS[key].allowed), _config_default(key),
                     "<br>".join(code(each) for each in others if each)))  # fmt: skip
    return table(("key", "meaning", "allowed", "default", "flag and variables"), rows)


def config_flags() -> dict[str, str]:
    """Key of config.properties -> the flag of ``pyserve start`` that sets it: those of the same name, and these."""
    from pyserve.config import keys

    flags = {"load_models": "--models", "disable_token_authorization": "--disable-token-auth", "enable_grpc": "--grpc"}
    options = {option for action in parsers()["pyserve start"]._actions for option in action.option_strings}
    same = {key: f"--{key.replace('_', '-')}" for key in keys.KINDS if key != "models"}  # that flag sets load_models
    flags |= {key: flag for key, flag in same.items() if flag in options}
    check_same("flags of settings", [flag for flag in flags.values() if flag not in options], [])
    return flags


def _config_default(key: str) -> str:
    from pyserve.config.config import Config

    field = next(each for each in fields(Config) if each.name == key)
    value = field.default if field.default is not MISSING else None
    if value is None or value == "":
        return ""
    return code({True: "true", False: "false"}[value] if isinstance(value, bool) else value)


# --- model-config.yaml ----------------------------------------------------------------------------------------------


def model_config_page() -> str:
    """Every key of model-config.yaml: text, allowed values and default."""
    from pyserve.archive import model_config

    texts = descriptions("model-config")
    check_same("model-config.yaml", [key for group in texts["groups"] for key in group["keys"]], model_config._KEYS)
    own = texts["handler_keys"]
    sections = [
        f"## {group['title']}\n\n" + _join(group.get("about"), _model_rows(group["keys"])) for group in texts["groups"]
    ]
    rows = table(("key", "meaning"), ((code(key), text) for key, text in own["keys"].items()))
    return page("model-config", texts, *sections, f"## Keys of handlers\n\n{_join(own['about'], rows)}")


def _join(*parts: str | None) -> str:
    return "\n\n".join(part.strip() for part in parts if part)


def _model_rows(texts: Mapping[str, str]) -> str:
    return table(
        ("key", "meaning", "allowed", "default"),
        ((code(key), text, model_config_allowed(key), _model_default(key)) for key, text in texts.items()),
    )


def model_config_allowed(key: str) -> str:
    """What a value of ``key`` may be, from the function that reads it."""
    from pyserve.archive import model_config
    from pyserve.config.bounds import BOUNDS

    attribute, read = model_config._KEYS[key]
    if read is model_config._integer:
        bounds = BOUNDS[attribute]
        return f"a whole number from {bounds.least} to {bounds.most} {bounds.unit}".strip()
    choices = inspect.getclosurevars(read).nonlocals.get("choices")
    if choices:
        return " or ".join(choices)
    if "example" in inspect.getclosurevars(read).nonlocals:
        return "0% to 100%, or 0 to 1"
    others: dict[Any, str] = {
        model_config._boolean: "true or false",
        model_config._device_type: " or ".join(model_config.DEVICE_TYPES),
        model_config._device_ids: "a list of device numbers",
        model_config._buckets: "true, false or a list of batch sizes",
        model_config._mapping: "a mapping",
        model_config._inputs: "a mapping, or a list of them",
        model_config._positive: "a number above 0",
    }
    return others[read]


def _model_default(key: str) -> str:
    from pyserve.archive import model_config
    from pyserve.lanes.settings import ModelSettings

    server_keys = {"responseTimeout": "default_response_timeout", "startupTimeout": "default_startup_timeout",
                   "jobQueueSize": "job_queue_size"}  # fmt: skip
    if key in server_keys:
        return code(server_keys[key])
    value = getattr(ModelSettings(), model_config._KEYS[key][0], "")
    return code({True: "true", False: "false"}[value] if isinstance(value, bool) else value)


# --- commands -------------------------------------------------------------------------------------------------------


def parsers() -> dict[str, argparse.ArgumentParser]:
    """``pyserve start`` and the like -> its parser, caught at the moment when it would print its help."""
    programs = dict(re.findall(r'^([a-z-]+) = "(pyserve[\w.]*:\w+)"$', (ROOT / "pyproject.toml").read_text(), re.M))
    found: dict[str, argparse.ArgumentParser] = {}
    for program, target in programs.items():
        parser = _parser_of(target, [])
        names = [name for action in parser._actions if isinstance(action, argparse._SubParsersAction)
                 for name in action.choices]  # fmt: skip
        found |= {f"{program} {name}": _parser_of(target, [name]) for name in names} or {program: parser}
    return found


def _parser_of(target: str, arguments: list[str]) -> argparse.ArgumentParser:
    module, _, function = target.partition(":")
    main = getattr(importlib.import_module(module), function)
    caught: list[argparse.ArgumentParser] = []
    original = argparse.ArgumentParser.print_help
    argparse.ArgumentParser.print_help = lambda self, file=None: caught.append(self)  # type: ignore[method-assign]
    try:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            main([*arguments, "--help"])
    finally:
        argparse.ArgumentParser.print_help = original  # type: ignore[method-assign]
    return caught[0]


def commands_page() -> str:
    """Every command with all its arguments."""
    texts = descriptions("commands")
    found = parsers()
    check_same("commands", texts["commands"], found)
    sections = [
        f"## {name}\n\n{text.strip()}\n\n{_argument_table(found[name])}" for name, text in texts["commands"].items()
    ]
    return page("commands", texts, *sections)


def _argument_table(parser: argparse.ArgumentParser) -> str:
    actions = [action for action in parser._actions if not isinstance(action, argparse._HelpAction)]
    return table(("argument", "meaning"), [_argument_row(action) for action in actions]) if actions else ""


def _argument_row(action: argparse.Action) -> tuple[str, str]:
    """``--flag VALUE`` and its help; of a value with choices these."""
    value = action.dest.upper() if action.option_strings else action.dest
    if isinstance(action.metavar, str):
        value = action.metavar
    elif action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if action.nargs == "+":
        value += " ..."
    about = prose(help_text(action))
    if not action.option_strings:
        return code(value), about
    return ", ".join(code(name if action.nargs == 0 else f"{name} {value}") for name in action.option_strings), about


# --- metrics --------------------------------------------------------------------------------------------------------


def metrics_page() -> str:
    """Every metric of ``/metrics``."""
    texts = descriptions("metrics")
    sections = texts["sections"]
    kinds: dict[str, list[tuple[str, str, str]]] = {"pyserve": [], "process": []}
    for name, kind, about in own_metrics():
        kinds["pyserve" if name.startswith("pyserve_") else "process"].append((code(name), kind, prose(about)))
    head = ("metric", "kind", "meaning")
    rows = (
        (code(each.name), each.kind, each.unit, ", ".join(map(code, each.dimensions))) for each in torchserve_metrics()
    )
    return page(
        "metrics", texts,
        f"## {sections['pyserve']}\n\n{table(head, kinds['pyserve'])}",
        f"## TorchServe's metrics\n\n{sections['torchserve'].strip()}\n\n"
        + table(("metric", "kind", "unit", "labels"), rows),
        f"## The process\n\n{sections['process'].strip()}\n\n{table(head, kinds['process'])}",
    )  # fmt: skip


def own_metrics() -> Iterator[tuple[str, str, str]]:
    """(name as it is scraped, kind, text) of what the server shows beside TorchServe's metrics."""
    from pyserve.fronts.counts import front_end_families
    from pyserve.telemetry.device_metrics import loss_family
    from pyserve.telemetry.loop_watch import empty_families
    from pyserve.telemetry.metrics import Metrics

    declared = {each.name.removesuffix("_total") for each in torchserve_metrics()}
    for family in (*Metrics().collect(), *empty_families(), loss_family({}), *front_end_families(())):
        if family.name.removesuffix("_total") not in declared:
            yield family.name + ("_total" if family.type == "counter" else ""), family.type, family.documentation


def torchserve_metrics() -> list[Any]:
    """TorchServe's metrics, as `pyserve.telemetry.metrics_config` declares them."""
    from pyserve.telemetry.metrics_config import MODEL_METRICS, SERVER_METRICS

    return [*SERVER_METRICS.values(), *MODEL_METRICS]


def pages() -> dict[str, str]:
    """File name in docs/reference -> text."""
    return {
        "config-properties.md": config_page(),
        "model-config.md": model_config_page(),
        "commands.md": commands_page(),
        "metrics.md": metrics_page(),
        "pyserve.1": man_page(descriptions("commands")["commands"], parsers()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Writes the reference pages, and the sources of the site.")
    parser.add_argument("--check", action="store_true", help="only say which pages are not up to date")
    parsed = parser.parse_args()
    folder = DOCS / "reference"
    try:
        texts = pages()
    except DocumentationError as error:
        print(f"docs/generate.py: error: {error}", file=sys.stderr)
        return 1
    old = [name for name, text in texts.items() if not (folder / name).is_file() or (folder / name).read_text() != text]
    if parsed.check:
        for name in old:
            print(f"docs/reference/{name} is not up to date; run python docs/generate.py")
        return 1 if old else 0
    for name in old:
        (folder / name).write_text(texts[name])
    assemble(ROOT / "build" / "site-sources")
    return 0


if __name__ == "__main__":
    sys.exit(main())
