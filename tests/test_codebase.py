"""The code base as a test subject: who imports whom, how big things are, and what must not be in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
CSRC = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
HANDLERS = sorted((ROOT / "handlers").glob("*.py"))
# What `import ts` finds in a worker process. Its file names are TorchServe's.
COMPAT = sorted((ROOT / "pyserve" / "compat").rglob("*.py"))

# The rooms of pyserve/, one floor a line: a room may import those of the lines above it, and the modules of the root.
# Rooms of one line are neighbours that never import each other.
FLOORS = [
    "config request proof load_test",
    "archive telemetry security http1 handlers",
    "fetch worker",
    "conversion lanes",
    "backends",
    "models",
    "api",
    "grpc_api fronts",
    "server",
    "commands",
    "embedding",
    "replicas",
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
# Rooms that may import less than what lies below them. The handlers double as examples: what they import, archives may.
ONLY = {"http1": {"request"}, "handlers": {"proof"}, "archive": {"config", "proof"}, "fetch": {"archive", "config"}}

# What users import: their names come from rooms, and no room imports them.
FACADES = {"pyserve", "pyserve.__main__", "pyserve.asgi", "pyserve.cluster"}

ROOM_PATHS = {room: ROOT / ("handlers" if room == "handlers" else f"pyserve/{room}") for room in FLOOR}
# Dotted name -> file, of the package without compat/.
MODULES = {f"pyserve.{path.stem}".removesuffix(".__init__"): path for path in sorted((ROOT / "pyserve").glob("*.py"))}
MODULES |= {
    f"pyserve.{room}.{path.stem}".removesuffix(".__init__"): path
    for room, folder in ROOM_PATHS.items()
    for path in sorted(folder.glob("*.py"))
}
SOURCES = [
    *MODULES.values(),
    *sorted((ROOT / "bench").glob("*.py")),
    *sorted((ROOT / "bench/gpu_steps").glob("*.py")),
    ROOT / "setup.py",
]

# Import no torch: the supervisor, the command line, and the server until its archives are open.
NO_TORCH = [
    "archive.archive", "archive.packing", "backends.kept", "backends.making", "backends.table", "commands.check",
    "commands.cli", "commands.config", "commands.debug",
    "commands.deploy", "commands.dev", "commands.start", "commands.status", "commands.stop", "commands.trial",
    "commands.tune", "config.config", "conversion.torchscript", "handler", "lanes.spawner", "launch",
    "models.state_file", "server.front_end", "server.main", "server.supervisor", "worker.failure", "worker.zygote",
]  # fmt: skip

BANNED_FILE_NAMES = {"util", "utils", "helper", "helpers", "manager", "misc", "common", "data", "info"}
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 80
PLAIN_CPP = [
    "status.h", "clock.h", "probe.h", "ring.h", "waiter.h", "request.h", "completion.h", "batcher.h", "stats.h",
    "pool.h", "release_reason.h", "result.h", "frame.h", "poller.h", "memory_file.h", "process_worker.h",
    "process_worker.cpp", "process_worker_end.cpp", "reruns.h", "process_lane.h", "process_lane.cpp",
    "worker_channel.h", "worker_channel.cpp", "buckets.h", "batch_report.h", "http/head.h", "front_ring.h",
    "front_ledger.h", "json_item.h", "http/fast_request.h", "json_rows.h", "row_cost.h", "row_frame.h",
    "stage_counts.h",
]  # fmt: skip


class Imported(NamedTuple):
    """A module of pyserve that a file imports, and the line that does."""

    module: str
    line: int


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def names_of(node: ast.AST) -> list[str]:
    """The dotted names that an import statement asks for."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def imports_of(path: Path) -> Iterator[Imported]:
    """What a file imports of pyserve, anywhere in it: in functions and for types too."""
    for node in ast.walk(parse(path)):
        for name in names_of(node):
            module = name if name in MODULES else name.rpartition(".")[0]
            if name.partition(".")[0] == "pyserve" and module in MODULES:
                yield Imported(module, node.lineno)  # type: ignore[attr-defined]


def at_import(tree: ast.AST) -> Iterator[str]:
    """Dotted names that are imported when the file itself is."""
    for node in ast.iter_child_nodes(tree):
        is_for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not is_for_types and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from names_of(node)
            yield from at_import(node)


def room_of(module: str) -> str:
    """The room of a module; empty for those of the root."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else ""


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def may_import(room: str, other: str) -> bool:
    if other in (room, ""):
        return True
    return room != "" and FLOOR[other] < FLOOR[room] and other in ONLY.get(room, FLOOR)


def test_every_folder_of_the_package_is_a_room() -> None:
    folders = {path.name for path in (ROOT / "pyserve").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(FLOOR) | {"api_docs", "compat", "console", "protos"}


@pytest.mark.parametrize("room", [room for room in FLOOR if room != "handlers"])
def test_a_rooms_init_is_its_charter(room: str) -> None:
    [only] = parse(ROOM_PATHS[room] / "__init__.py").body
    assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant), "a docstring, and nothing else"


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_has_tests(room: str) -> None:
    assert list((ROOT / "tests" / room).glob("test_*.py")), f"tests/{room} holds no tests"


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_only_what_lies_below(module: str) -> None:
    room = room_of(module)
    for other, line in imports_of(MODULES[module]):
        is_allowed = may_import(room, room_of(other)) or module in FACADES
        assert is_allowed, f"{named(MODULES[module])}:{line}: {room or 'the root'} may not import {other}"


def test_no_room_imports_what_is_for_users_alone() -> None:
    for name, path in MODULES.items():
        assert not {each.module for each in imports_of(path)} & (FACADES - {"pyserve"}), name


def test_the_rule_of_rooms_refuses_what_it_should() -> None:
    for room, other in [("lanes", "models"), ("config", "request"), ("", "config"), ("http1", "config")]:
        assert not may_import(room, other)
    for room, other in [("models", "lanes"), ("http1", "request"), ("http1", ""), ("api", "api")]:
        assert may_import(room, other)


def test_no_module_imports_itself_through_others() -> None:
    lines = {name: dict(imports_of(path)) for name, path in MODULES.items()}
    edges = {name: set(others) - {name, "pyserve"} for name, others in lines.items()}
    while edges:
        free = {name for name, others in edges.items() if not others & set(edges)}
        shown = [f"{named(MODULES[a])}:{lines[a][b]} imports {b}" for a in edges for b in edges[a] & set(edges)]
        assert free, "an import cycle:\n" + "\n".join(shown)
        edges = {name: others for name, others in edges.items() if name not in free}


@pytest.mark.parametrize("module", MODULES)
def test_the_server_does_without_the_names_of_torchserve(module: str) -> None:
    names = {name.split(".")[0] for node in ast.walk(parse(MODULES[module])) for name in names_of(node)}
    assert "ts" not in names


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_what_only_stands_beside(module: str) -> None:
    names = {name for node in ast.walk(parse(MODULES[module])) for name in names_of(node)}
    assert not {name for name in names if re.match(r"(tests|bench|pyserve\.compat)\b", name)}


def test_what_runs_without_torch_does_not_import_it() -> None:
    for start in NO_TORCH:
        seen: set[str] = set()
        todo = {f"pyserve.{start}"}
        while todo:
            module = todo.pop()
            seen.add(module)
            names = set(at_import(parse(MODULES[module])))
            assert "torch" not in {name.split(".")[0] for name in names}, f"{start} imports torch through {module}"
            ours = {name if name in MODULES else name.rpartition(".")[0] for name in names}
            # Whatever imports a module of a room imports the room first.
            ours |= {name.rpartition(".")[0] for name in ours}
            todo |= ours & set(MODULES) - seen


@pytest.mark.parametrize("path", [*SOURCES, *CSRC], ids=named)
def test_files_are_small_and_named_after_what_they_hold(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= FILE_LINES_MAX
    assert path.stem == "_build_info" or not set(path.stem.split("_")) & BANNED_FILE_NAMES
    assert path.stem != "process"  # alone it says nothing; a process_lane is a lane of processes


@pytest.mark.parametrize("path", [*SOURCES, *COMPAT], ids=named)
def test_functions_are_short_and_files_say_what_they_are(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree) or not tree.body, "no docstring"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", [*SOURCES, *COMPAT], ids=named)
def test_nothing_runs_text_or_unpickles_what_it_reads(path: Path) -> None:
    tree = parse(path)
    safe_loaders = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "yaml"
        for alias in node.names
        if alias.name in ("SafeLoader", "CSafeLoader")
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        where = f"{path.name}:{node.lineno}: {called}"
        assert called not in ("eval", "exec", "os.system", "os.popen", "tempfile.mktemp"), where
        assert not re.match(r"(pickle|cPickle|marshal|shelve|dill|joblib)\.", called), where
        assert keywords.get("shell") != "True", where
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", where
        if called in ("yaml.load", "yaml.load_all"):
            loader = keywords.get("Loader") or ast.unparse(node.args[1])
            assert loader in ("yaml.SafeLoader", "yaml.CSafeLoader", *safe_loaders), where
        assert not called.startswith(("yaml.unsafe", "yaml.full")), where


@pytest.mark.parametrize("path", CSRC, ids=named)
def test_python_enters_the_native_code_in_the_bindings_only(path: Path) -> None:
    if not path.name.startswith("bindings"):
        assert not re.search(r"pybind11|Python\.h|PyObject|torch/extension\.h|\bpy::", path.read_text())


@pytest.mark.parametrize("name", PLAIN_CPP)
def test_the_concurrency_half_needs_neither_torch_nor_python(name: str) -> None:
    text = (ROOT / "csrc" / name).read_text()
    assert not re.search(r"#include [<\"](torch|ATen|c10|caffe2)/", text)
    for included in re.findall(r'#include "([^"]+)"', text):
        assert included in PLAIN_CPP, included


@pytest.mark.parametrize("path", [*SOURCES, *COMPAT, *CSRC], ids=named)
def test_nothing_is_left_to_do(path: Path) -> None:
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text())
