"""The code base as a test subject: who imports whom, how big things are, and what must not be in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {path.stem: path for path in sorted((ROOT / "pyserve").glob("*.py"))}
HANDLERS = {path.stem: path for path in sorted((ROOT / "handlers").glob("*.py"))}
CSRC = sorted((ROOT / "csrc").iterdir())
# What `import ts` finds in a worker process. Its file names are TorchServe's.
COMPAT = sorted((ROOT / "pyserve" / "compat").rglob("*.py"))
SOURCES = [*MODULES.values(), *HANDLERS.values(), *sorted((ROOT / "bench").glob("*.py")), ROOT / "setup.py"]

# Each module imports only from earlier rows; within a row from the left.
LEVELS = [
    # Ground: no module of another row.
    "__init__ _build_info errors messages log address properties entries failure import_scan versions json_encoding "
    "result_check",
    # What two ways to run one model are compared with.
    "torch_error comparison probe_inputs graph_reads batch_probe native_proof",
    "log_files exposition metric_log",
    "metrics_config load_gauges",
    "host_metrics",
    # Configuration and archives; no torch.
    "archive_url allowed_urls public_address transfer "
    "access_log",
    "config_variables "
    "settings model_source cpu_budget config_keys config pid_file console launch",
    "tokens "
    "snapshot_models snapshot "
    "tls "
    "renewal "
    "server_logs "
    "samples "
    "zip_reader tar_reader folder_reader manifest "
    "input_config "
    "model_config weights archive_formats extract archive_cache archive "
    "conversion archive_inspect trace archiver folder_manifest worker_spec",
    # What archives come through.
    "http_fetch object_fetch archive_sources",
    # The wire.
    "http1_peer "
    "http1_limits http1_errors http1_timer http1_exchange http1_connections http1_head http1_body http1_incoming "
    "http1_direct "
    "http1_answer http1 "
    "http1_tls",
    # What a lane needs.
    "stages "
    "spans "
    "context custom_metrics metrics json_body forms codec handler engine placement",
    # A process that makes TorchScript of an eager model.
    "traced_reads mode_questions eager_answers export_script convert trace_child",
    "open_inference audit_compare "
    "worker_log",
    # Worker processes: their inside, then what looks after them.
    "model_state time_limit sample_requests "
    "streaming entry_point worker_request invoker batch_trial rehearsal reload continuous async_worker worker",
    "restart_policy requirements worker_output worker_handle zygote spawner",
    "client_limit "
    "stage_times "
    "raw_rows "
    "lane_refusals "
    "examples zoo sample package_writes package_rules first_answer loader services model_settings pending lane "
    "row_requests "
    "native_lane python_workers python_lane "
    "sequence_lane audit_lane lane_choice audit audit_choice "
    "self_description gpu_usage checks "
    "model",
    "system_metrics",
    # The server's endpoints.
    "kept_state "
    "registry",
    "grpc_messages grpc_status grpc_streams grpc_call grpc_service",
    "browser_guard cors "
    "parameters openapi_schemas openapi routes "
    "protect "
    "inference management",
    "open_inference_rest protocol_requests tensor_rows open_inference_models kserve_v1 kserve",
    # What looks at an archive without a server.
    "tune_run tune "
    "dry_run debug check_run check config_report doctor",
    # Processes.
    "listeners "
    "grpc_inference grpc_open_inference grpc_management grpc_health grpc_server grpc_site "
    "start_report "
    "site server",
    "api_client "
    "deploy "
    "torch_model_archiver torchserve "
    "supervisor start status stop dev cli __main__",
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
# Never imported when these are: the supervisor, the command line, and the server until its archives are open.
NO_TORCH = [
    "cli", "trace", "supervisor", "start", "status", "stop", "launch", "config", "archive", "archiver", "server",
    "kept_state",
    "deploy",
    "spawner", "zygote", "failure", "dev", "debug", "check", "tune", "dry_run", "config_report",
]  # fmt: skip

BANNED_FILE_NAMES = {"util", "utils", "helper", "helpers", "manager", "misc", "common", "data", "info"}
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 80
PLAIN_CPP = [
    "status.h", "clock.h", "probe.h", "ring.h", "waiter.h", "request.h", "completion.h", "batcher.h", "stats.h",
    "pool.h", "release.h", "result.h", "frame.h", "poller.h", "memory_file.h", "process_worker.h", "process_worker.cpp",
    "process_lane.h", "process_lane.cpp",
    "worker_channel.h", "worker_channel.cpp",
]  # fmt: skip


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports_of(tree: ast.AST, *, everywhere: bool) -> Iterator[str]:
    """Dotted names that a file imports when it is loaded; ``everywhere``: inside of functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        elif everywhere or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports_of(node, everywhere=everywhere)


def neighbours(path: Path, *, everywhere: bool = False) -> set[str]:
    """Modules of pyserve that a file imports; handlers as ``handlers``."""
    found = set()
    for name in imports_of(parse(path), everywhere=everywhere):
        parts = name.split(".")
        if parts[0] != "pyserve":
            continue
        known = len(parts) > 1 and (parts[1] in MODULES or parts[1] in ("handlers", "_core"))
        found.add(parts[1] if known else "__init__")
    return found


def test_every_module_has_its_level() -> None:
    assert set(LEVEL) - {"_build_info"} == set(MODULES) - {"_build_info"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    for other in neighbours(MODULES[name]) - {"_core", "handlers"}:
        assert LEVEL[other] <= LEVEL[name], f"{name} imports {other}, which is above it"


def test_no_module_imports_itself_through_others() -> None:
    edges = {name: neighbours(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    while edges:
        free = {name for name, others in edges.items() if not others & set(edges)}
        assert free, f"an import cycle among {sorted(edges)}"
        edges = {name: others for name, others in edges.items() if name not in free}


@pytest.mark.parametrize("name", MODULES)
def test_the_server_does_without_the_names_of_torchserve(name: str) -> None:
    assert not {each for each in imports_of(parse(MODULES[name]), everywhere=True) if each.split(".")[0] == "ts"}


@pytest.mark.parametrize("name", HANDLERS)
def test_handlers_import_only_the_handler_contract(name: str) -> None:
    contract = {"handler", "context", "handlers", "input_config", "torch_error", "package_rules"}
    assert neighbours(HANDLERS[name], everywhere=True) <= contract


def test_what_runs_without_torch_does_not_import_it() -> None:
    for name in NO_TORCH:
        seen: set[str] = set()
        todo = {name}
        while todo:
            module = todo.pop()
            seen.add(module)
            names = {each.split(".")[0] for each in imports_of(parse(MODULES[module]), everywhere=False)}
            assert "torch" not in names, f"{name} imports torch through {module}"
            todo |= neighbours(MODULES[module]) & set(MODULES) - seen


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


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
