"""Finding the handler that an archive asks for, and whether it can run in the native lane."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from types import ModuleType

from pyserve.archive.archive import Archive
from pyserve.archive.manifest import handler_file, split_handler
from pyserve.errors import ModelLoadError
from pyserve.handler import BUILT_IN, NOT_BUILT_IN, Handler
from pyserve.handlers.source_file import import_file
from pyserve.launch import COMPAT_DIR
from pyserve.worker.failure import describe_failure
from pyserve.worker.frames import keep_source

_TORCHSERVE_PREFIX = "ts.torch_handler."


# What the native lane does itself. A handler that does one of these in its own way needs a process of its own.
_NOT_IN_A_THREAD = (
    "handle", "inference", "initialize", "explain_handle",
    "_load_pickled_model", "_load_torchscript_model", "_load_torch_export_aot_compile",
)  # fmt: skip


def python_lane_reason(archive: Archive, named: str | None = None) -> str:
    """Why the handler must run in worker processes; ``""`` if it can run in the native lane, or does not exist.

    Args:
        named: in place of the handler that the archive's manifest names.
    """
    module, name = _module_and_name(archive, named)
    file = _own_file(archive, named)
    if file is not None:
        return "" if _wants_thread(archive) else f"{file} is handler code of its own"
    if name in BUILT_IN:
        return f"{name} calls the model in Python" if BUILT_IN[name].lane == "python" else ""
    if name in NOT_BUILT_IN:
        return ""
    # Only a module's first part can be looked for without running code.
    package = module.partition(".")[0]
    own_modules = {f"{package}/__init__.py", f"{module.replace('.', '/')}.py"}
    if own_modules & archive.files.keys() or archive.manifest.requirements_file or _is_installed(package):
        return f"{module} is a module, not a built-in handler"
    return ""


def built_in_name(archive: Archive, named: str | None = None) -> str | None:
    """The built-in handler that the archive asks for; None if its handler is code of its own."""
    _, name = _module_and_name(archive, named)
    return None if name not in BUILT_IN or _own_file(archive, named) is not None else name


def load_handler(archive: Archive, named: str | None = None) -> Handler:
    """A new, not yet prepared handler for the native lane: the one ``named``, by default the manifest's.

    Raises:
        ModelLoadError: the archive brings handler code of its own that needs worker processes, or names a handler that
            does not exist.
    """
    _, name = _module_and_name(archive, named)
    # The archive's own file comes first, as in TorchServe, also when it bears a built-in handler's name.
    file = _own_file(archive, named)
    if file is not None:
        if _wants_thread(archive):
            return load_thread_handler(archive, named)
        raise ModelLoadError(
            f"{archive.name} brings handler code of its own ({file}), which runs in worker processes (the python "
            f"lane), not here. Built-in handlers: {_built_in_names()}."
        )
    if name in BUILT_IN:
        handler: Handler = BUILT_IN[name].import_class()()
        return handler
    raise ModelLoadError(_unknown_handler_text(archive.name, named or archive.manifest.handler, name))


def load_thread_handler(archive: Archive, named: str | None = None) -> Handler:
    """A new, not yet prepared handler from the archive's own file, to run in the threads of this process.

    This is what ``isolation: thread`` in model-config.yaml asks for. The file is imported under a name of its own; its
    neighbours can be imported by it while it is loaded, and ``ts`` at any time.

    Raises:
        ModelLoadError: the file cannot be imported, or what it defines needs a process of its own.
    """
    chosen = split_handler(named or archive.manifest.handler)[1]
    file = _own_file(archive, named)
    assert file is not None
    if COMPAT_DIR not in sys.path:
        sys.path.append(COMPAT_DIR)  # last, so that a `ts` that is installed wins
    try:
        module = import_file(archive.own_folder() / file)
        keep_source(str(module.__file__))
        cls = _thread_class(module, file, chosen)
        handler: Handler = cls()
    except ModelLoadError:
        raise
    except Exception as error:
        failure = describe_failure(error, archive.own_folder())
        raise ModelLoadError(f"{archive.name}: {failure.line()}", detail=failure.detail()) from error
    replaced = next((name for name in _NOT_IN_A_THREAD if name in vars(handler)), None)
    if replaced is not None:
        raise ModelLoadError(_not_in_a_thread_text(cls.__name__, file, f"its __init__ replaces {replaced}"))
    return handler


def _thread_class(module: ModuleType, file: str, chosen: str | None) -> type:
    from pyserve.handlers.base_handler import BaseHandler

    classes = [cls for _, cls in inspect.getmembers(module, inspect.isclass) if cls.__module__ == module.__name__]
    if chosen is not None:
        classes = [cls for cls in classes if cls.__name__ == chosen]
    elif callable(getattr(module, "handle", None)):
        raise ModelLoadError(_not_in_a_thread_text("handle", file, "a function is a whole handler"))
    if len(classes) != 1:
        names = ", ".join(cls.__name__ for cls in classes) or "none"
        wanted = f"a class {chosen}" if chosen else "exactly one class"
        raise ModelLoadError(_not_in_a_thread_text(file, file, f"it must define {wanted}, the handler; found: {names}"))
    cls = classes[0]
    if not issubclass(cls, BaseHandler):
        raise ModelLoadError(_not_in_a_thread_text(cls.__name__, file, "it is not derived from BaseHandler"))
    built_in = next(filter(_calls_model_in_python, cls.__mro__), None)
    if built_in is not None:
        reason = f"{built_in.__name__}, which it is derived from, calls the model in Python"
        raise ModelLoadError(_not_in_a_thread_text(cls.__name__, file, reason))
    for name in _NOT_IN_A_THREAD:
        origin = next(each for each in cls.__mro__ if name in vars(each))
        if not _is_ours(origin):
            fix = "; set attributes in prepare(self, context) instead" if name == "initialize" else ""
            raise ModelLoadError(_not_in_a_thread_text(cls.__name__, file, f"it defines {name}{fix}"))
    return cls


def _is_ours(cls: type) -> bool:
    return cls.__module__.startswith("pyserve.handlers.")


def _calls_model_in_python(cls: type) -> bool:
    """Whether it is a class of ours, not of a handler for the native lane, that does what this lane does itself."""
    is_for_native = any(
        (each.module, each.class_name) == (cls.__module__, cls.__name__)
        for each in BUILT_IN.values() if each.lane == "native"
    )  # fmt: skip
    return _is_ours(cls) and not is_for_native and any(name in vars(cls) for name in _NOT_IN_A_THREAD)


def _not_in_a_thread_text(name: str, file: str, reason: str) -> str:
    place = "" if name == file else f" in {file}"
    return (
        f"{name}{place} cannot run with 'isolation: thread', where the model runs in native code: {reason}. Drop "
        "'isolation: thread' from model-config.yaml to run it in worker processes."
    )


def _module_and_name(archive: Archive, named: str | None) -> tuple[str, str]:
    """Of the handler asked for: the module, and the name a built-in handler would have."""
    module = split_handler(named or archive.manifest.handler)[0].removesuffix(".py")
    return module, module.removeprefix(_TORCHSERVE_PREFIX)


def _own_file(archive: Archive, named: str | None) -> str | None:
    """The archive's file with the handler asked for; None if that is none of its own."""
    handler = named or archive.manifest.handler
    for each in (handler, handler.removeprefix(_TORCHSERVE_PREFIX)):
        file = handler_file(each, archive.files.__contains__)
        if file is not None:
            return file
    return None


def _wants_thread(archive: Archive) -> bool:
    return bool(archive.config.raw.get("isolation") == "thread")


def _built_in_names() -> str:
    return ", ".join(sorted(BUILT_IN))


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _unknown_handler_text(archive_name: str, named: str, name: str) -> str:
    if name in NOT_BUILT_IN:
        return (
            f"{archive_name} asks for TorchServe's handler {name!r}, which is not built in: it is a cover of "
            f"{NOT_BUILT_IN[name]}. Install {NOT_BUILT_IN[name]} and pack a handler of your own that calls it. "
            f"Built-in handlers: {_built_in_names()}."
        )
    nearest = difflib.get_close_matches(name, BUILT_IN, n=1)
    fix = f", did you mean {nearest[0]!r}?" if nearest else "."
    repack = nearest[0] if nearest else f"path/to/{name}.py"
    return (
        f"{archive_name} asks for handler {named!r}, but holds no file {name}.py and there is no built-in handler of "
        f"that name{fix} Built-in handlers: {_built_in_names()}. Repack the archive with --handler {repack}."
    )
