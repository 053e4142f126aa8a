"""`EmbeddedServer`: the engine in the caller's process and event loop.

async with pyserve.embedded(models=["a.mar"]) as engine:
    scores = await engine.predict("a", np.zeros((1, 4), np.float32))
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyserve.client import AnswerError, Client
from pyserve.client_calls import (
    JSON_SIZE_HEADER,
    arrays_in,
    by_name,
    input_names,
    json_or_bytes,
    plain_call,
    tensor_answer,
    tensor_call,
    tensor_path,
)
from pyserve.embedding.given_models import AnyModel, Model, source_of
from pyserve.embedding.local_call import LocalAnswer, error_of
from pyserve.embedding.running import Running
from pyserve.embedding.settings import engine_config
from pyserve.errors import ServeError
from pyserve.fetch.sources import Obtained
from pyserve.serving import ServingError

if TYPE_CHECKING:
    from pyserve.client_calls import Answer

T = TypeVar("T")

log = logging.getLogger("pyserve.embedded")

_WORDS = {"workers": "initial_workers"}


class EmbeddedServer:
    """A server without sockets: the models, batching, worker processes and limits of ``pyserve start``, called from
    Python. A context; or `start` and `stop` it. One that was stopped can be started again.

    Its coroutines may be awaited on other event loops than the one it was started on, too; they run on that.

    Args:
        models: paths, names of the model store, URLs, or `Model` for a module or what a file does not say.
        config: keys of config.properties with values of Python, such as ``{"job_queue_size": 20}``; those of a server
            process, such as addresses, are refused.
        config_file: a config.properties; none is looked for.

    Raises:
        ConfigError: at start: the configuration cannot be used.
    """

    def __init__(
        self, models: Sequence[AnyModel] = (), *, config: Mapping[str, Any] | None = None,
        config_file: str | os.PathLike[str] | None = None,
    ):  # fmt: skip
        if isinstance(models, str | os.PathLike | Model):
            models = [models]
        self._models = list(models)
        self._values = dict(config or {})
        self._config_file = config_file
        self._starting = asyncio.Lock()
        self._running: Running | None = None

    # --- its life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Loads the models and returns when all of them answer. On a server that runs it does nothing.

        Raises:
            ServingError: a model cannot be loaded; names each with its reason. Nothing is left running.
            ConfigError: the configuration cannot be used.
        """
        async with self._starting:
            if self._running is None:
                config = engine_config(self._values, self._config_file)
                self._running = await Running.start(self._models, config)

    async def stop(self) -> None:
        """Answers what was accepted, for ``drain_timeout_s`` at most, and ends the worker processes. On a server that
        does not run it does nothing."""  # fmt: skip
        async with self._starting:
            running, self._running = self._running, None
            if running is not None:
                await _on(running.loop, running.stop)

    async def __aenter__(self) -> EmbeddedServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def running(self) -> Running:
        """What there is while it runs.

        Raises:
            ServingError: it does not.
        """
        if self._running is None:
            raise ServingError("the engine does not run; start it: `async with engine:`, or `await engine.start()`")
        return self._running

    @property
    def is_started(self) -> bool:
        return self._running is not None

    @property
    def problem(self) -> str:
        """Why this process should be replaced: a device is lost, or threads are stuck. ``""`` if nothing is wrong."""
        return self.running.problem

    @property
    def keys(self) -> dict[str, str]:
        """What callers of the ASGI applications send behind ``Authorization: Bearer``, by API: ``management``,
        ``inference`` and ``api``, which changes the others. Empty if no call needs one. Calls from Python need none.
        """
        return {str(scope): key for scope, key in self.running.server.keys.items()}

    # --- predictions ----------------------------------------------------------------------------------------------

    async def predict(
        self, model: str, inputs: Any, *, version: str | None = None, outputs: Sequence[str] = ()
    ) -> Answer:
        """The model's answer. A caller that is cancelled cancels the request, too.

        Args:
            inputs: arrays, a file as a `pathlib.Path`, bytes, or what fits JSON, as of `pyserve.Client.predict`.
            outputs: names of those that are wanted of arrays; by default all.

        Returns:
            In kind, as `pyserve.Client.predict` does.

        Raises:
            AnswerError: with the status that a server would answer with.
        """
        arrays = arrays_in(inputs)
        if arrays is None:
            is_file = isinstance(inputs, Path)
            call = await asyncio.to_thread(plain_call, model, inputs, version) if is_file else plain_call(
                model, inputs, version
            )  # fmt: skip
            return json_or_bytes((await self._ask("POST", *call)).body)
        path = tensor_path(model, version)
        if isinstance(arrays, dict):
            named = arrays
        else:  # asked for each time: whoever deploys another version may change their order
            description = await self._ask("GET", path)
            named = by_name(path, input_names(description.body, len(arrays)), arrays)
        answer = await self._ask("POST", *tensor_call(path, named, outputs))
        return tensor_answer(answer.body, answer.headers.get(JSON_SIZE_HEADER.lower(), ""), named)

    async def _ask(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> LocalAnswer:
        running = self.running
        return await _on(running.loop, lambda: running.calls.ask(method, path, body, headers or {}))

    async def is_ready(self) -> bool:
        """Whether it runs, and all of its models have workers."""
        if self._running is None:
            return False
        try:
            await self._ask("GET", "/v2/health/ready")
        except AnswerError:
            return False
        return True

    # --- management -----------------------------------------------------------------------------------------------

    async def models(self) -> dict[str, list[dict[str, Any]]]:
        """Every model by name, with the descriptions of its versions, the default one first."""
        return await asyncio.to_thread(self._client().models)

    async def versions(self, model: str) -> list[dict[str, Any]]:
        """The descriptions of a model's versions, the default one first."""
        return await asyncio.to_thread(self._client().versions, model)

    async def register(
        self, model: AnyModel, *, name: str | None = None, workers: int = 1, **parameters: Any
    ) -> tuple[str, str]:
        """Loads a model beside the others; returns when it can be asked.

        Args:
            model: as of the constructor: a path, a name of the model store, a URL, a `Model`.
            parameters: others of ``POST /models``, such as ``batch_size=8``.

        Returns:
            Its name and version.

        Raises:
            AnswerError, ServingError: it cannot be; nothing has changed.
        """
        return await asyncio.to_thread(self._client().register, model, name=name, workers=workers, **parameters)

    async def deploy(
        self, model: AnyModel, *, name: str | None = None, workers: int | None = None, **parameters: Any
    ) -> str:
        """Replaces the served version of a model: loads the new one, makes it the default, removes the old one. While
        it loads, and if it cannot be loaded, nothing changes.

        Args:
            workers: of the new version; by default as many as the old one has.

        Returns:
            The new version.
        """
        return await asyncio.to_thread(self._client().deploy, model, name=name, workers=workers, **parameters)

    async def scale(self, model: str, workers: int, *, version: str | None = None, **parameters: Any) -> str:
        """Gives a model so many workers, and returns when they are there. What a server says."""
        return await asyncio.to_thread(self._client().scale, model, workers, version=version, **parameters)

    async def set_default(self, model: str, version: str) -> str:
        """Requests without a version go to this one from now on. What a server says."""
        return await asyncio.to_thread(self._client().set_default, model, version)

    async def unregister(self, model: str, version: str | None = None) -> str:
        """Finishes what a version has accepted, and removes it. What a server says."""
        return await asyncio.to_thread(self._client().unregister, model, version)

    def _client(self) -> _EngineClient:
        return _EngineClient(self.running)


def embedded(
    models: Sequence[AnyModel] = (), *, config: Mapping[str, Any] | None = None,
    config_file: str | os.PathLike[str] | None = None,
) -> EmbeddedServer:  # fmt: skip
    """An engine in this process and event loop, to be used as ``async with``; see `EmbeddedServer`."""
    return EmbeddedServer(models, config=config, config_file=config_file)


class _EngineClient(Client):
    """`Client`, whose calls reach an engine of this process. Used in threads, which wait for the engine's loop."""

    def __init__(self, running: Running):
        super().__init__("http://localhost", management="http://localhost")
        self._running = running

    def _ask(
        self, method: str, url: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, dict[str, str]]:
        return self._result(self._running.calls.ask(method, path, body or b"", headers or {}))

    def register(
        self, url: AnyModel, *, name: str | None = None, workers: int = 1, **parameters: Any
    ) -> tuple[str, str]:
        running = self._running
        source = source_of(url, running.config.model_store, running.folder)
        if source.path_or_file == url or not source.exists:  # a URL, or what only the server can say is not there
            return super().register(str(url), name=name or source.name, workers=workers, **parameters)
        name = name or source.name
        path = Path(source.path_or_file)
        if set(parameters) - _SETTINGS:
            unknown = ", ".join(sorted(set(parameters) - _SETTINGS))
            raise TypeError(f"register has no parameter {unknown}; there are {', '.join(sorted(_SETTINGS))}")
        return self._result(self._register(Obtained(path, path.name), name, workers, parameters))

    async def _register(
        self, file: Obtained, name: str | None, workers: int, settings: dict[str, int]
    ) -> tuple[str, str]:
        try:
            model = await self._running.server.registry.register(
                file, model_name=name, handler=None, initial_workers=workers, settings=settings
            )
        except ServeError as error:
            raise error_of(error) from error
        return model.name, model.version

    def _result(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._running.loop).result()


_SETTINGS = {"batch_size", "max_batch_delay", "response_timeout", "startup_timeout"}


async def _on(loop: asyncio.AbstractEventLoop, call: Callable[[], Awaitable[T]]) -> T:
    """What ``call`` returns, run on ``loop``, whichever is the running one."""
    if asyncio.get_running_loop() is loop:
        return await call()

    async def called() -> T:
        return await call()

    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(called(), loop))
