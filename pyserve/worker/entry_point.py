"""A handler made ready for requests: its code imported, its model loaded, to be called with the rows of a batch."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from pyserve.context import Context
from pyserve.errors import ModelLoadError, OutOfMemoryError
from pyserve.worker.failure import Failure, describe_failure
from pyserve.worker.forked import end_process
from pyserve.worker.frames import describe_place
from pyserve.worker.imported_code import ImportedCode, is_importable
from pyserve.worker.spec import WorkerSpec


class HandlerLoadError(ModelLoadError):
    """A handler cannot be loaded.

    Attributes:
        repeats: whether trying again would end in the same way.
        traceback: text, the archive's own frames first.
    """

    repeats = True
    traceback = ""


class HandlerMemoryError(OutOfMemoryError):
    """Memory ran out while a handler was loaded. Attributes as of `HandlerLoadError`."""

    repeats = False
    traceback = ""


def load_error(error: BaseException, model_dir: str | Path) -> HandlerLoadError | HandlerMemoryError:
    """How an exception that came up while a handler was loaded is reported."""
    if isinstance(error, (HandlerLoadError, HandlerMemoryError)):
        return error
    failure = describe_failure(error, model_dir)
    told: HandlerLoadError | HandlerMemoryError
    if failure.status == 507:
        told = HandlerMemoryError("Out of resources while the handler was loaded", detail=failure.detail())
    else:
        told = HandlerLoadError(_load_text(error, failure), detail=failure.detail())
        told.repeats = failure.repeats
    told.traceback = failure.traceback
    return told


def _load_text(error: BaseException, failure: Failure) -> str:
    # Ours already name the thing and the fix.
    return error.message if isinstance(error, ModelLoadError) else failure.line()


class EntryPoint:
    """A handler that was imported; call it with the rows of a batch and their context.

    Args:
        spec: of the model.
        code: imports what is called, see `ImportedCode`.

    Attributes:
        name: ``ModelHandler in handler.py``, for people.
        handler: the instance that is called, None for a function.
    """

    def __init__(self, spec: WorkerSpec, code: ImportedCode):
        self.spec = spec
        self.code = code
        self.name = code.name
        self.handler: Any = code.handler
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        # TorchServe calls what `handle` was before `initialize`.
        is_fixed = spec.lenient and not spec.watch and self.handler is not None
        self._first_handle = self.handler.handle if is_fixed else None
        self._call: Callable[[Any, Context], Any] = self._call_plain
        if spec.envelope:
            self._call = _envelope_class(spec.envelope)(self._call_plain).handle

    def initialize(self, context: Context) -> None:
        """Has the handler load its model: ``initialize(context)``, or ``handle(None, context)`` of a function.

        Raises:
            HandlerLoadError, HandlerMemoryError: whatever the handler raised.
        """
        try:
            returned = self._guarded(self.code.function or self._initialize, None, context)
            if inspect.iscoroutine(returned):
                self.run(returned)
        except (Exception, SystemExit) as error:
            raise load_error(error, self.spec.model_dir) from error

    def __call__(self, data: list[dict[str, Any]], context: Context) -> Any:
        """What the handler answers for ``data``; whatever it raises goes through."""
        return self._guarded(self._call, data, context)

    def _guarded(self, call: Callable[[Any, Context], Any], data: Any, context: Context) -> Any:
        """What ``call`` gives or raises; a process that it forked does not come back."""
        try:
            returned = call(data, context)
        except BaseException as error:
            if os.getpid() != self._pid:
                end_process(error)
            raise
        if os.getpid() != self._pid:
            end_process(None)
        return returned

    def _initialize(self, _: None, context: Context) -> Any:
        return self.handler.initialize(context)

    def _call_plain(self, data: Any, context: Context) -> Any:
        # Looked up each time: handlers replace their `handle` in `initialize`, and `pyserve dev` replaces functions.
        function = self.code.function or self._first_handle
        return function(data, context) if function is not None else self.handler.handle(data, context)

    @property
    def is_built_in(self) -> bool:
        """Whether it comes with pyserve; else it is code of the archive's own, or of a package."""
        return self.code.module is None

    def inherits(self, name: str) -> bool:
        """Whether the handler has method ``name`` from one that comes with pyserve."""
        handler = self.handler
        method = getattr(type(handler), name, None)
        is_own = name in getattr(handler, "__dict__", ())
        return not is_own and str(getattr(method, "__module__", "")).startswith("pyserve.handlers.")

    @property
    def has_side_effects(self) -> bool:
        """Whether no request may be run twice: ``has_side_effects = True`` in the class, or a function's module."""
        owner = self.handler if self.handler is not None else self.code.module
        return getattr(owner, "has_side_effects", False) is True

    @property
    def place(self) -> str:
        """``handler.py:12 in handle``: where what is called is defined."""
        function = self.code.function if self.code.function is not None else getattr(self.handler, "handle", None)
        return describe_place(function, self.spec.model_dir)

    @property
    def is_coroutine(self) -> bool:
        """Whether a call gives an awaitable."""
        function = self.code.function if self.code.function is not None else self.handler.handle
        return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004 - an object with an async __call__
        )

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop of this handler's coroutines, the same one for its whole life."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        return self._loop

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """The result of ``coroutine``, run to its end."""
        task = self.loop.create_task(coroutine)
        try:
            return self.loop.run_until_complete(task)
        finally:
            if not task.done():  # interrupted; it must not go on when the loop runs for the next call
                task.cancel()
                self.loop.run_until_complete(asyncio.wait([task]))

    def unload(self) -> None:
        """Forgets the archive's modules, so that another archive in this process may have files of the same names."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None
        self.code.unload()


def load_entry_point(spec: WorkerSpec) -> EntryPoint:
    """Imports the handler that ``spec`` names. Changes sys.path and sys.modules until `EntryPoint.unload`.

    Raises:
        HandlerLoadError, HandlerMemoryError: it cannot be found or imported, or is no handler.
    """
    code = ImportedCode(spec)
    try:
        code.load()
        return EntryPoint(spec, code)
    except (Exception, SystemExit) as error:
        told = load_error(error, spec.model_dir)
        code.unload()
        raise told from (None if told is error else error)
    except BaseException:
        code.unload()
        raise


def _envelope_class(name: str) -> Any:
    """The class of ``service_envelope=name``."""
    module_name = f"ts.torch_handler.request_envelope.{name}"
    if not is_importable(module_name):
        raise ModelLoadError(f"there is no service envelope {name!r}; known are: body, json, kserve, kservev2")
    module = importlib.import_module(module_name)
    base = importlib.import_module("ts.torch_handler.request_envelope.base").BaseEnvelope
    for _, cls in inspect.getmembers(module, inspect.isclass):
        if issubclass(cls, base) and cls is not base:
            return cls
    raise ModelLoadError(f"{module_name} has no class derived from BaseEnvelope")
