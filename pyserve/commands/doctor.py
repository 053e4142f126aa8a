"""``pyserve doctor``: one list of what is well and what is not, of this machine and of an archive on it."""

from __future__ import annotations

import argparse
import getpass
import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from pyserve.archive import versions
from pyserve.archive.archive import Archive
from pyserve.archive.cache import open_cache
from pyserve.archive.given import Given
from pyserve.causes import fix_for
from pyserve.cgroup import groups_around
from pyserve.commands.backend_lines import archive_lines, backend_checks
from pyserve.commands.doctor_check import FAIL, LEVELS, NOTE, PASS, WARN, Check
from pyserve.commands.doctor_devices import device_checks
from pyserve.commands.model_arguments import MODEL_HELP, add_given_arguments, given_in
from pyserve.config.address import Address
from pyserve.config.config import Config, read_config
from pyserve.conversion.torchscript import runs_in_python
from pyserve.cpu_budget import cpu_budget
from pyserve.errors import ConfigError, ServeError
from pyserve.security import tls
from pyserve.security.tokens import KEY_FILE, guarded_scopes, read_keys
from pyserve.server import pid_file

OPTIONAL = {
    "torchvision": "models and transforms of many handlers",
    "captum": "explanations of pictures and text",
    "grpcio": "gRPC (pip install grpcio grpcio-health-checking grpcio-reflection)",
    "onnxruntime": ".onnx models",
    "transformers": "handlers of Hugging Face models",
    "nvidia-ml-py": "the usage of NVIDIA GPUs (pip install nvidia-ml-py); else nvidia-smi is run",
}
_FREE_SIZE_MIN = 1 << 30
_MEMORY_SIZE_MIN = 1 << 30
_FILES_MIN = 4096


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``pyserve doctor``."""
    parser.add_argument("archive", metavar="MODEL", nargs="?", type=Path, help=MODEL_HELP)
    parser.add_argument("--ts-config", metavar="FILE", help="a config.properties, as for `pyserve start`")
    add_given_arguments(parser)


def doctor_command(parsed: argparse.Namespace) -> int:
    """Prints the list. Exit code: 1 if anything FAILs, else 0."""
    counts = dict.fromkeys(LEVELS, 0)
    for check in all_checks(parsed.archive, parsed.ts_config, given_in(parsed)):
        first, *more = check.text.splitlines() or [""]
        print(f"{check.level}  {check.name:<14} {first}", flush=True)
        for line in (*more, *filter(None, [check.fix])):
            print(f"{'':<20} {line}")
        counts[check.level] += 1
    print(", ".join(f"{count} {level}" for level, count in counts.items()))
    return 1 if counts[FAIL] else 0


def all_checks(archive: Path | None, ts_config: str | None, given: Given | None = None) -> Iterator[Check]:
    """Everything, cheap things first."""
    yield from _python()
    try:
        folder = os.getcwd()
    except OSError as error:  # in which torch cannot be imported
        yield Check(FAIL, "folder", f"the current folder is gone: {error.strerror}", "cd to one that exists")
        return
    yield from _torch()
    yield Check(PASS, "folder", folder)
    yield from _surroundings()
    yield from _limits()
    config = Config()
    try:
        config = read_config(ts_config=ts_config)
    except ConfigError as error:
        yield Check(FAIL, "configuration", error.message)
    for warning in config.warnings:
        yield Check(WARN, "configuration", warning)
    yield from _folders(config)
    yield from _addresses(config)
    yield from _strangers(config)
    yield from command_owners()
    yield from _packages()
    yield from backend_checks()
    if archive is not None:
        yield from _archive(archive, ts_config, given)


# --- this machine -----------------------------------------------------------------------------------------------------


def _python() -> Iterator[Check]:
    yield Check(PASS, "python", f"{platform.python_version()}, {sys.executable}")
    yield Check(PASS, "platform", platform.platform())


def _torch() -> Iterator[Check]:
    try:
        import torch
    except ImportError as error:
        yield Check(FAIL, "torch", f"cannot be imported: {error}", fix_for(str(error)))
        return
    yield Check(PASS, "torch", f"{torch.__version__}, {Path(torch.__file__).parent}")
    from pyserve.engine import load_core

    try:
        load_core()
    except (ConfigError, ImportError) as error:
        yield Check(FAIL, "native engine", str(error), fix_for(str(error)))
    else:
        yield Check(PASS, "native engine", f"built for torch {torch.__version__}")
    yield from device_checks()


def _surroundings() -> Iterator[Check]:
    yield Check(PASS, "sys.path", "\n".join(sys.path))
    if os.environ.get("PYTHONPATH"):
        yield Check(PASS, "PYTHONPATH", os.environ["PYTHONPATH"])
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in passwd
        name = "without a name"
    yield Check(PASS, "user", f"{name} (uid {os.getuid()}, gid {os.getgid()})")


def _limits() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_count(soft)}, at most {_count(hard)}"
    if 0 <= hard < _FILES_MIN:
        fix = f"each connection takes one: raise it to {_FILES_MIN} or more with `ulimit -n`"
        yield Check(WARN, "open files", text, fix)
    else:
        yield Check(PASS, "open files", text)
    budget, count = cpu_budget(), os.cpu_count() or 1
    yield Check(PASS, "CPUs", f"{budget} of {count}" + (" (affinity or cgroup)" if budget < count else ""))
    limit = memory_limit()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{_size(min(limit, total))} of {_size(total)}" + (" (cgroup)" if limit < total else "")
    if min(limit, total) < _MEMORY_SIZE_MIN:
        yield Check(WARN, "memory", text, "torch alone takes some hundred MiB in every worker")
    else:
        yield Check(PASS, "memory", text)


def _count(limit: int) -> str:
    return "unlimited" if limit in (-1, resource.RLIM_INFINITY) else str(limit)


def memory_limit(root: Path = Path("/")) -> int:
    """The least of the memory limits of the cgroups around this process, in bytes; a huge number if there is none."""
    limit = 1 << 62
    for group in groups_around("memory", root):
        words = group.words("memory.max" if group.is_v2 else "memory.limit_in_bytes")
        if len(words) == 1 and words[0].isdecimal():
            limit = min(limit, int(words[0]))
    return limit


def _folders(config: Config) -> Iterator[Check]:
    wanted = os.environ.get("PYSERVE_CACHE")
    try:
        cache = open_cache().root
    except (ServeError, OSError) as error:
        yield Check(FAIL, "cache", str(error), "set PYSERVE_CACHE to a folder that can be written")
    else:
        expected = Path(wanted or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pyserve"))
        if cache.resolve() != expected.expanduser().absolute().resolve():
            yield Check(WARN, "cache", f"{expected} cannot be used; archives are unpacked anew at every start",
                        "set PYSERVE_CACHE to a folder that this user owns and can write")  # fmt: skip
        else:
            yield _free("cache", cache)
    log_folder = Path(os.environ.get("LOG_LOCATION") or "logs").absolute()
    if _is_writable(log_folder):
        yield Check(PASS, "logs", str(log_folder))
    else:
        yield Check(WARN, "logs", f"{log_folder} cannot be written: a server in the background keeps no log",
                    "set LOG_LOCATION to a folder that can be written")  # fmt: skip
    temporary = Path(tempfile.gettempdir())
    if _is_writable(temporary):
        yield _free("tmp", temporary)
    else:
        yield Check(FAIL, "tmp", f"{temporary} cannot be written", "set TMPDIR to a folder that can be written")
    if config.model_store:
        store = Path(config.model_store).expanduser()
        if not store.is_dir():
            yield Check(FAIL, "model store", f"{store} is no folder ({config.origin['model_store']})")
        elif not os.access(store, os.R_OK | os.X_OK):
            yield Check(FAIL, "model store", f"{store} cannot be read by this user")
        else:
            kind = "" if os.access(store, os.W_OK) else ", read-only"
            yield Check(PASS, "model store", f"{store}, {len(list(store.iterdir()))} entries{kind}")


def _is_writable(folder: Path) -> bool:
    """Whether files can be made in it, or it can be made."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return False
    try:
        with tempfile.TemporaryFile(dir=existing):
            return True
    except OSError:
        return False


def _free(name: str, folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    if free < _FREE_SIZE_MIN:
        return Check(WARN, name, f"{folder}, only {_size(free)} free", "archives are unpacked there: make room")
    return Check(PASS, name, f"{folder}, {_size(free)} free")


def _addresses(config: Config) -> Iterator[Check]:
    running = pid_file.read(pid_file.default_path())
    seen: set[Address] = set()
    for name, address in config.addresses().items():
        if address in seen:
            continue
        seen.add(address)
        problem = _cannot_listen(address)
        if not problem:
            yield Check(PASS, name, f"{address} is free")
        elif running is not None and str(address) in running.addresses.values():
            yield Check(PASS, name, f"{address}: pyserve is running (pid {running.pid})")
        else:
            yield Check(FAIL, name, f"{address}: {problem}",
                        f"stop what listens there, or set {name}_address")  # fmt: skip
    for name in ("grpc_inference", "grpc_management") if config.enable_grpc != "false" else ():
        address = Address(getattr(config, f"{name}_address"), getattr(config, f"{name}_port"))
        shown = str(address).removeprefix("http://")
        what = f"{name.removeprefix('grpc_')} {shown}"
        problem = _cannot_listen(address)
        if not problem:
            yield Check(PASS, "gRPC", f"{what} is free")
        elif running is not None and shown in running.addresses.values():
            yield Check(PASS, "gRPC", f"{what}: pyserve is running (pid {running.pid})")
        else:
            yield Check(FAIL if config.enable_grpc == "true" else WARN, "gRPC", f"{what}: {problem}",
                        f"stop what listens there, set {name}_port, or enable_grpc=false")  # fmt: skip
    address = config.inference_address
    if is_container() and address.is_loopback and not address.is_unix:
        yield Check(WARN, "container", f"listening on {address.host} inside a container: not reachable from outside",
                    f"set inference_address=http://0.0.0.0:{address.port}")  # fmt: skip


def _strangers(config: Config) -> Iterator[Check]:
    """What keeps them out: certificates and keys."""
    if tls.is_wanted(config) and not tls.has_certificate(config):
        yield Check(WARN, "certificate", "none is given: one is made at start, which clients cannot check",
                    "set private_key_file and certificate_file, or keystore")  # fmt: skip
    elif tls.is_wanted(config):
        try:
            kind, text = tls.examine(config)
            yield Check(PASS if kind == "note" else WARN, "certificate", text)
        except ConfigError as error:
            yield Check(FAIL, "certificate", error.message)
    scopes = " and ".join(sorted(guarded_scopes(config)))
    if config.token_file:
        try:
            read_keys(Path(config.token_file))
            yield Check(PASS, "keys", f"in {config.token_file}")
        except ConfigError as error:
            yield Check(FAIL, "keys", error.message)
    elif scopes and not _is_writable(Path.cwd()):
        yield Check(FAIL, "keys", f"{scopes} calls need keys, and {Path.cwd()} cannot be written",
                    "start in another folder, or set token_file, or disable_token_authorization=true")  # fmt: skip
    elif scopes:
        yield Check(PASS, "keys", f"{scopes} calls will need keys, written to {Path.cwd() / KEY_FILE}")
    elif not config.management_is_local:
        yield Check(WARN, "keys", "management is not on loopback and needs no key: who reaches it can change models",
                    "leave out disable_token_authorization")  # fmt: skip


def _cannot_listen(address: Address) -> str:
    """Why nothing can listen there, ``""`` if it can."""
    if address.is_unix:
        return "" if _is_writable(Path(address.path).parent) else f"{Path(address.path).parent} cannot be written"
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def is_container() -> bool:
    """Whether this looks like the inside of a container."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return True
    return any(Path(path).exists() for path in ("/.dockerenv", "/run/.containerenv"))


def command_owners() -> Iterator[Check]:
    """Whose the commands are that TorchServe's packages have too: whatever was installed last has them."""
    for command in ("torchserve", "torch-model-archiver"):
        path = shutil.which(command, path=str(Path(sys.executable).parent)) or shutil.which(command)
        if path is None:
            yield Check(NOTE, "command", f"{command} is not installed as a command; `pyserve {command}` is the same")
            continue
        try:
            is_ours = "pyserve" in Path(path).read_text("utf-8", "replace")
        except OSError as error:
            yield Check(WARN, "command", f"{path} cannot be read: {error.strerror}")
            continue
        if is_ours:
            yield Check(PASS, "command", f"{path} is pyserve's")
            continue
        owners = {
            f"{each.name} {each.version}" for each in distributions() for point in each.entry_points
            if (point.group, point.name) == ("console_scripts", command) and not point.value.startswith("pyserve.")
        }  # fmt: skip
        owner = ", ".join(sorted(owners)) or "another package"
        yield Check(WARN, "command", f"{path} is of {owner}, not pyserve's",
                    f"`pyserve {command} ...` is ours; or uninstall {owner} and install pyserve again")  # fmt: skip


def _packages() -> Iterator[Check]:
    for name, purpose in OPTIONAL.items():
        found = versions.installed(name)
        yield Check(PASS if found else NOTE, name, found or f"not installed; needed for {purpose}")


# --- an archive -------------------------------------------------------------------------------------------------------


def _archive(path: Path, ts_config: str | None, given: Given | None) -> Iterator[Check]:
    from pyserve.commands import check
    from pyserve.commands import trial as dry_run

    try:
        subject = dry_run.open_subject(path, ts_config=ts_config, given=given)
    except (ServeError, OSError) as error:
        yield Check(FAIL, "archive", str(error))
        return
    with subject.archive as archive:
        yield Check(PASS, "archive", f"{subject.label}, handler {archive.manifest.handler}, {len(archive.files)} files")
        for text in subject.notes:
            yield Check(NOTE, "archive", text)
        for text in archive.warnings:
            yield Check(WARN, "archive", text)
        yield from _recorded(archive)
        if not runs_in_python(archive):
            for line in archive_lines(archive):
                yield Check(NOTE, "backend", line)
        yield from _requirements(archive, subject.config)
        try:
            report = check.examine(subject, [], calls=False)
        except (ServeError, OSError) as error:
            yield Check(FAIL, "handler", str(error))
            return
        for finding in report.findings:
            place = f" ({finding.where})" if finding.where and finding.where not in finding.what else ""
            yield Check(FAIL, "handler", finding.what + place, finding.fix)
        if not report.findings:
            yield Check(PASS, "handler", "its code can be imported; `pyserve check` also loads and calls it")


def _recorded(archive: Archive) -> Iterator[Check]:
    recorded = archive.manifest.extra.get(versions.MANIFEST_KEY)
    if not isinstance(recorded, dict):
        yield Check(PASS, "versions", "none are recorded in the archive; `pyserve archive` does that")
        return
    found = versions.differences(recorded)
    for each in found:
        yield Check(WARN, "versions", f"packed with {each}",
                    "if it does not work, install the version that it was packed with")  # fmt: skip
    if not found:
        yield Check(PASS, "versions", f"as it was packed: torch {recorded.get('torch')}, "
                    f"python {recorded.get('python')}")  # fmt: skip


def _requirements(archive: Archive, config: Config) -> Iterator[Check]:
    file = archive.manifest.requirements_file
    if file is None:
        return
    if config.install_py_dep_per_model or archive.config.use_venv:
        yield Check(PASS, "requirements", f"{file}: installed for this model when it is loaded")
        return
    unmet = versions.unmet_requirements((archive.model_dir / file).read_text("utf-8", "replace"))
    for each in unmet:
        yield Check(WARN if each.found else FAIL, "requirements", f"{file} wants {each}",
                    "install it, or set install_py_dep_per_model=true")  # fmt: skip
    if not unmet:
        yield Check(PASS, "requirements", f"{file}: all are installed")


def _size(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
