"""The code of one handler: which module holds it, importing that, and what in it is to be called.

The name in the manifest is a file of the archive, a built-in handler, or an installed module, in this order:

    handler.py             the function ``handle`` in it, or else its one class
    handler.py:predict     that function (or that class)
    image_classifier       a handler that comes with pyserve

An ImportError inside the archive's code is an error of the archive: nothing else is tried in its place.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from pyserve.archive.manifest import handler_file, nearest_handler, split_handler
from pyserve.context import Context
from pyserve.errors import ModelLoadError
from pyserve.handler import BUILT_IN, BuiltIn
from pyserve.launch import COMPAT_DIR
from pyserve.worker.frames import describe_place, keep_source, real_path
from pyserve.worker.spec import WorkerSpec

log = logging.getLogger("pyserve.worker")

DEFAULT_FUNCTION = "handle"
TORCHSERVE_PREFIX = "ts.torch_handler."


@functools.cache
def _real_path(file: str) -> str:
    """Of a module's file, looked up once: torch alone has a thousand, a system call per folder above each."""
    return real_path(file)


def _file_of(module: ModuleType) -> str:
    """Where a module was read from, ``/`` if that is not known. Asks no module that imports itself when it is asked."""
    file = vars(module).get("__file__") if isinstance(module, ModuleType) else None
    return file if isinstance(file, str) and file else "/"


class ImportedCode:
    """The imported code of one archive, and what importing it changed in this process.

    Attributes:
        module: the module that the manifest names.
        function: what is called, None if `handler` is.
        handler: an instance of the module's class, None if there is a function.
        built_in: what the handler is, if it comes with pyserve; else None.
        name: for people.
        names_set: names of each module of the archive that had a value once it was imported; for `pyserve dev`.
    """

    def __init__(self, spec: WorkerSpec):
        self._spec = spec
        self.model_dir = os.path.realpath(spec.model_dir)
        file, function = split_handler(spec.handler)
        self.module_name = file.removesuffix(".py")
        self._file = handler_file(spec.handler, lambda name: Path(self.model_dir, name).is_file())
        self.function_name = function
        self.module: ModuleType | None = None
        self.function: Callable[[Any, Context], Any] | None = None
        self.handler: Any = None
        self.built_in: BuiltIn | None = None
        self.name = ""
        self.names_set: dict[str, set[str]] = {}
        self._path_before = list(sys.path)
        self._displaced: dict[str, ModuleType] = {}

    def load(self) -> None:
        """Finds and imports the code, and makes the handler."""
        self._extend_path()
        if self._file is not None:
            self.module = import_file(Path(self.model_dir, self._file), self.module_name)
            self._take(self.module, self._file)
            self._keep_sources()
            if self._spec.watch:
                self.names_set = {
                    name: {key for key, value in vars(module).items() if value is not None}
                    for name, module in self.own_modules().items()
                }
            return
        short = self.module_name.removeprefix(TORCHSERVE_PREFIX)
        self.built_in = BUILT_IN.get(short)
        if self.built_in is not None:
            self.handler = self.built_in.import_class()()
            self.name = f"{self.built_in.class_name}, built in"
            return
        for name in dict.fromkeys([TORCHSERVE_PREFIX + short, self.module_name]):
            if is_importable(name):
                self.module = importlib.import_module(name)
                self._take(self.module, name)
                return
        raise ModelLoadError(
            f"handler {self.module_name!r}: the archive has no {self.module_name}.py, and no handler of that name is "
            f"built in{nearest_handler(self.module_name)}; pack the file with --handler path/to/{self.module_name}.py"
        )

    def _keep_sources(self) -> None:
        prefix = self.model_dir + os.sep
        for module in list(sys.modules.values()):
            file = _file_of(module)
            if file.startswith(prefix):
                keep_source(file)

    def unload(self) -> None:
        """Undoes what `load` did to sys.path and sys.modules."""
        for name in self.own_modules():
            sys.modules.pop(name, None)
        sys.modules.update(self._displaced)
        sys.path[:] = self._path_before
        sys.path_importer_cache.pop(self.model_dir, None)

    def imported_again(self) -> ImportedCode:
        """The same code, imported afresh from its files. If that fails everything is as it was.

        Raises:
            whatever the files raise.
        """
        old = self.own_modules()
        for name in old:
            del sys.modules[name]
        fresh = ImportedCode(self._spec)
        try:
            fresh.load()
        except BaseException:
            fresh.give_way(old)
            raise
        fresh._path_before, fresh._displaced = self._path_before, {**fresh._displaced, **self._displaced}
        return fresh

    def give_way(self, old: dict[str, ModuleType]) -> None:
        """Puts the modules ``old`` in place of this code's."""
        for name in self.own_modules():
            del sys.modules[name]
        sys.modules.update(old)

    def own_modules(self) -> dict[str, ModuleType]:
        """Name -> module, of those whose file is in the archive."""
        prefix = self.model_dir + os.sep
        return {
            name: module
            for name, module in list(sys.modules.items())
            if _real_path(_file_of(module)).startswith(prefix)
        }

    def _extend_path(self) -> None:
        if self.model_dir not in sys.path:
            sys.path.insert(0, self.model_dir)
        if COMPAT_DIR not in sys.path:
            sys.path.append(COMPAT_DIR)
        # Files of the archive go before modules of other origin that happen to be loaded, but for Python's own.
        for file in Path(self.model_dir).glob("*.py"):
            loaded = sys.modules.get(file.stem)
            if loaded is not None and file.stem not in sys.stdlib_module_names and not hasattr(loaded, "__path__"):
                self._displaced[file.stem] = sys.modules.pop(file.stem)
        importlib.invalidate_caches()

    def _take(self, module: ModuleType, label: str) -> None:
        """Finds in ``module`` what is to be called."""
        found = getattr(module, self.function_name or DEFAULT_FUNCTION, None)
        if callable(found) and not inspect.isclass(found):
            self._check_call(found, 2, f"{self.function_name or DEFAULT_FUNCTION} in {label}", "(data, context)")
            self.function = found
            self.name = f"{self.function_name or DEFAULT_FUNCTION} in {label}"
            return
        cls = found if inspect.isclass(found) else None
        if self.function_name is not None and found is None:
            cls = self._class_instead(module, label)
        if self.function_name is not None and cls is None:
            raise ModelLoadError(
                f"{label} has no function {self.function_name!r}; it defines: {_functions(module)}",
                detail={"where": label},
            )
        if cls is None:
            cls = _only_class(module, label)
        self.name = f"{cls.__name__} in {label}"
        self._check_constructor(cls, self.name)
        handler = cls()
        self._check_methods(handler, cls, self.name)
        self.handler = handler

    def _class_instead(self, module: ModuleType, label: str) -> type | None:
        """What TorchServe calls where there is no function of the name that was asked for."""
        classes = _classes(module)
        if len(classes) != 1:
            return None
        log.warning("%s has no %r; its class %s is called", label, self.function_name, classes[0].__name__)
        return classes[0]

    def _check_methods(self, handler: Any, cls: type, label: str) -> None:
        """Asks the instance: its ``__init__`` may have set them, or a descriptor or ``__getattr__`` may give them."""
        methods: dict[str, Any] = {name: getattr(handler, name, None) for name in ("initialize", "handle")}
        missing = [name for name, method in methods.items() if not callable(method)]
        if missing:
            raise ModelLoadError(
                f"{label} has no method {' and no method '.join(missing)}; a handler needs initialize(self, context) "
                "and handle(self, data, context). Derive it from ts.torch_handler.base_handler.BaseHandler to inherit "
                "them.",
                detail={"where": describe_place(cls, self.model_dir)},
            )
        for name, count, wanted in (("initialize", 1, "(self, context)"), ("handle", 2, "(self, data, context)")):
            method = methods[name]
            is_bound = inspect.ismethod(method)
            function = method.__func__ if is_bound else method
            self._check_call(function, count + is_bound, f"{name} of {label}", wanted)

    def _check_constructor(self, cls: type, label: str) -> None:
        try:
            inspect.signature(cls).bind()
        except TypeError as error:
            raise ModelLoadError(
                f"{label} is made without arguments, but its __init__ needs some: {error}",
                detail={"where": describe_place(cls.__init__, self.model_dir)},  # type: ignore[misc]
            ) from None
        except ValueError:
            pass  # no signature to look at

    def _check_call(self, function: Callable[..., Any], count: int, label: str, wanted: str) -> None:
        if not inspect.isfunction(function):
            return
        try:
            inspect.signature(function).bind(*[None] * count)
        except TypeError as error:
            raise ModelLoadError(
                f"{label} takes {inspect.signature(function)}; it is called with {wanted}: {error}",
                detail={"where": describe_place(function, self.model_dir)},
            ) from None


def import_file(path: Path, name: str) -> ModuleType:
    """Imports the file ``path`` as module ``name``.

    Raises:
        whatever the file raises; then no module of that name stays behind.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelLoadError(f"{path.name} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return sys.modules.get(name, module)


def is_importable(name: str) -> bool:
    """Whether there is such a module; finding out imports the packages that it is in."""
    parts = name.split(".")
    return all(_has_spec(".".join(parts[:count])) for count in range(1, len(parts) + 1))


def _has_spec(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return False  # what it should be in is no package


def _classes(module: ModuleType) -> list[type]:
    """Those that it defines, each once, whatever names it has."""
    members = inspect.getmembers(module, inspect.isclass)
    return list(dict.fromkeys(cls for _, cls in members if cls.__module__ == module.__name__))


def _only_class(module: ModuleType, label: str) -> type:
    classes = _classes(module)
    if len(classes) == 1:
        return classes[0]
    if not classes:
        raise ModelLoadError(
            f"{label} defines neither a function handle(data, context) nor a class; define one of them, or name "
            f"another function with --handler {label}:function. It defines: {_functions(module)}",
            detail={"where": label},
        )
    names = ", ".join(cls.__name__ for cls in classes)
    handlers = [cls for cls in classes if callable(getattr(cls, "handle", None))]
    if len(handlers) == 1:
        chosen = handlers[0].__name__
        others = ", ".join(cls.__name__ for cls in classes if cls is not handlers[0])
        fix = f"{chosen} is the one with a handle method: repack with --handler {label}:{chosen}, or move {others} to "
        fix += "another file, packed with --extra-files"
    else:
        fix = "keep the handler's class there and move the others to another file, packed with --extra-files"
    raise ModelLoadError(
        f"{label} defines {len(classes)} classes ({names}); the handler must be the only one. {fix}",
        detail={"where": label},
    )


def _functions(module: ModuleType) -> str:
    names = [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    return ", ".join(names) or "no function"
