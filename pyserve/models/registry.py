"""The table of models: what is served, under which names and versions, and how that changes.

Loop thread only. A change that answers success has been written down before (`models.state_file`), so that a server
that is started again after a crash serves the same models.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

from pyserve.archive.archive import Archive
from pyserve.background import Background
from pyserve.config.archive_url import is_url
from pyserve.config.model_source import ModelSource
from pyserve.conversion.torchscript import Tracing
from pyserve.errors import (  # fmt: skip
    ConflictError,
    DefaultVersionError,
    InvalidModelError,
    JsonObject,
    ModelLoadError,
    ModelNotFoundError,
    ServeError,
    is_of_machine,
)
from pyserve.fetch.sources import ArchiveSources, Obtained, open_obtained
from pyserve.lanes.resources import Services
from pyserve.lanes.settings import first_settings, first_workers
from pyserve.models.absence import fix_of
from pyserve.models.changes import Changes, a_change
from pyserve.models.ending import end
from pyserve.models.model import Model
from pyserve.models.opening import opened_now, taken
from pyserve.models.placement import allowed_devices, gpu_count, ordered_devices
from pyserve.models.recovery import Recovery, may_pass
from pyserve.models.served_names import no_such_version, served_name, what_was_meant, without_manifest
from pyserve.models.snapshot import CHANGE, SHUTDOWN, STARTUP, SnapshotFolder
from pyserve.models.state_file import LoadFailure, StateKeeper, snapshot_of, state_of

log = logging.getLogger(__name__)

ProgressOf = Callable[[str, str], None]  # model name, text


class Registry:
    """All served versions by name.

    Args:
        keep_state: see `StateKeeper`.
        snapshots: where snapshots go; None writes none.
        progress: told what a loading model is doing; any thread.

    Attributes:
        on_names: called when a name, or a version of one, stands for another model than before.
    """

    def __init__(
        self, services: Services, *, keep_state: Callable[[bytes], str] | None = None,
        snapshots: SnapshotFolder | None = None,
        progress: ProgressOf | None = None,
    ):  # fmt: skip
        self.changes = Changes()
        self._services = services
        self._sources = ArchiveSources(services.config)
        self._keeper = StateKeeper(keep_state, snapshots, self._capture)
        self._progress = progress or (lambda name, text: None)
        self._models: dict[str, dict[str, Model]] = {}
        self._defaults: dict[str, str] = {}
        self._background = Background()
        self._recovery = Recovery(self)
        self.failures: list[LoadFailure] = []
        self.on_names: Callable[[], object] = bool  # nobody
        # A server that is still loading, or is being stopped, has no state worth keeping.
        self._keeps_state = False

    # --- looking up -----------------------------------------------------------------------------------------------

    def get(self, name: str, version: str | None = None) -> Model:
        """The default version of ``name``, or ``version``.

        Raises:
            ModelNotFoundError: no such name.
            VersionNotFoundError: no such version of it.
        """
        versions = self._models.get(name)
        if versions is None:
            raise ModelNotFoundError(f"Model not found: {name}", detail=what_was_meant(name, self._models))
        model = versions.get(self._defaults[name] if version is None else version)
        if model is None:
            raise no_such_version(f"Model version: {version} does not exist for model: {name}", versions)
        return model

    def default_models(self) -> list[Model]:
        return [self._models[name][self._defaults[name]] for name in sorted(self._models)]

    def versions(self, name: str) -> list[Model]:
        self.get(name)
        return list(self._models[name].values())

    def default_version(self, name: str) -> str:
        return self.get(name).version

    def all_models(self) -> list[Model]:
        return [model for name in sorted(self._models) for model in self._models[name].values()]

    # --- changing -------------------------------------------------------------------------------------------------

    @a_change
    async def register(
        self, url: str | Obtained, *, model_name: str | None, handler: str | None, initial_workers: int | None,
        settings: dict[str, int], runtime: str | None = None, waits: bool = True,
    ) -> Model:  # fmt: skip
        """Finds or fetches an archive, then loads and warms it; returns when it is READY.

        It may take the place of a version that FAILED at start, and keeps that place as FAILED if it fails too.

        Args:
            url: name in the model store, path or URL; see `ArchiveSources`. Or a file that is there already.
            initial_workers: None for as many as at the start of the server.
            settings: management parameters; what is left out comes from model-config.yaml, then the ``models``
                block, then the defaults.
            runtime: told in descriptions in place of the manifest's.
            waits: for the workers. Otherwise they start in the background, and a failure of that is logged.

        Raises:
            ServeError: nothing was registered, and nothing that was fetched is left.
        """
        source = url if isinstance(url, Obtained) else await self._sources.obtain(
            url, in_use=[model.archive.path for model in self.all_models()]
        )  # fmt: skip
        try:
            archive = await asyncio.to_thread(open_obtained, source)
            if self._services.config.compat == "strict" and archive.manifest.has_odd_runtime and runtime is None:
                archive.close()
                raise InvalidModelError("Runtime is not defined or invalid.")
            failed = {(model.name, model.version) for model in self.all_models() if model.state == "FAILED"}
            model = self._add(
                archive, model_name, source.url, handler=handler, settings=settings, workers=initial_workers,
                at_startup=False,
            )  # fmt: skip
        except BaseException:
            await self._discard(source.path, source.url)
            raise
        model.runtime = runtime or model.runtime
        # Without workers TorchServe loads nothing, so that nothing can fail.
        may_fail = self._services.config.compat == "strict" and not model.workers_min
        loading = self._finish_register(model, stays=(model.name, model.version) in failed, may_fail=may_fail)
        if waits or not model.workers_min:
            await loading
        else:
            self._background.begin(loading, f"registering {source.url}")
            await asyncio.sleep(0)  # it has begun, and whoever asks for the model from now on can wait for that
        return model

    @a_change
    async def _finish_register(self, model: Model, *, stays: bool, may_fail: bool) -> None:
        try:
            await self._load_or_remove(model, stays=stays or may_fail)
        except BaseException as error:
            is_of_archive = isinstance(error, ModelLoadError | InvalidModelError)
            if may_fail and is_of_archive and model in self.all_models():
                log.warning("%s %s is registered, and cannot be loaded: %s", model.name, model.version, model.error)
            else:
                await self._discard(model.archive.path, model.url)
                if is_of_archive and self._services.config.compat == "strict":  # there it comes from a worker
                    raise model.starting_error(model.error) from error
                raise
        self.failures = [failure for failure in self.failures if failure.url != model.url]
        await self.changed()

    @a_change
    async def unregister(self, name: str, version: str | None) -> None:
        """Finishes what a version has admitted and removes it; without ``version`` the default one. An archive that was
        fetched from a URL goes with it.

        Of an archive that could not be opened the failure is forgotten.

        Raises:
            DefaultVersionError: it is the default while there are others.
        """
        forgotten = [
            each for each in self.failures if each.name == name and (version is None or each.version in ("", version))
        ]
        if name not in self._models and forgotten:
            self.failures = [each for each in self.failures if each not in forgotten]
            await self.changed()
            return
        model = self.get(name, version)
        if model.version == self._defaults[name] and len(self._models[name]) > 1:
            raise DefaultVersionError(f"Cannot remove default version for model {name}")
        self._remove(model)
        draining = asyncio.get_running_loop().create_task(end(model))
        try:
            await self.changed()
        finally:
            await draining
        await self._discard(model.archive.path, model.url)

    async def _discard(self, path: Path, url: str) -> None:
        """Removes an archive that was fetched from a URL, unless a model is served from it."""
        if is_url(url) and all(model.archive.path != path for model in self.all_models()):
            await asyncio.to_thread(self._sources.remove, path)

    @a_change
    async def set_default(self, name: str, version: str) -> None:
        """Requests without a version go to ``version`` from now on. One that is loading is waited for.

        Raises:
            ConflictError: it FAILED; the default stays as it was.
        """
        model = self._version(name, version)
        await model.loaded()
        if self._version(name, version) is not model:
            raise ConflictError(f"Model version {version} of model {name} was replaced meanwhile")
        if model.state == "FAILED" and model.version != self._defaults[name]:
            raise ConflictError(
                f"Model version {version} of model {name} cannot be the default version: it FAILED",
                detail={"text": model.error, "fix": fix_of(model.error, self._services.error_format)},
            )
        self._defaults[name] = version
        self.on_names()
        await self.changed()

    def _version(self, name: str, version: str) -> Model:
        if name not in self._models:
            raise ModelNotFoundError(f"Model not found: {name}", detail=what_was_meant(name, self._models))
        versions = self._models[name]
        if version not in versions:
            raise no_such_version(f"Model version {version} does not exist for model {name}", versions)
        return self._models[name][version]

    @property
    def not_kept(self) -> str:
        """What of the last change could not be written down, and why, as a sentence; ``""`` if all was."""
        return self._keeper.problem

    async def changed(self, kind: str = CHANGE) -> None:
        """To be called after a model's workers or settings were changed; returns when that is written down, or could
        not be (``not_kept``).

        Args:
            kind: of the snapshot.
        """
        if self._keeps_state and not self.changes.are_frozen:
            await self._keeper.save(kind)

    async def load_at_start(
        self, sources: Iterable[ModelSource], archives: dict[str, Archive | ServeError], tracings: dict[str, Tracing]
    ) -> None:
        """Loads what the server was started with, all at once. A failure is kept as a FAILED model or in ``failures``.

        Args:
            archives, tracings: by path; what was opened and begun before torch was imported.
        """
        sources = list(sources)
        opened = [await taken(archives, source.path_or_file) for source in sources]
        await asyncio.gather(*(
            self._load_source(source, archive, tracings.get(source.path_or_file))
            for source, archive in zip(sources, opened, strict=True)
        ))  # fmt: skip
        self._prefer_what_loaded()
        self._keeps_state = True
        await self.changed(STARTUP)

    def _prefer_what_loaded(self) -> None:
        """Nobody chose the defaults of a start: of several versions the first that could be loaded is it."""
        for name, versions in self._models.items():
            if versions[self._defaults[name]].state != "FAILED":
                continue
            loaded = next((version for version, model in versions.items() if model.state != "FAILED"), None)
            if loaded is not None:
                log.warning("%s: version %s FAILED; %s is the default version", name, self._defaults[name], loaded)
                self._defaults[name] = loaded

    async def _load_source(self, source: ModelSource, archive: Archive | ServeError, tracing: Tracing | None) -> None:
        file = source.shown
        if isinstance(archive, ServeError):
            failure = self._note_failure(source.name or file, file, archive)
            if is_of_machine(archive):
                self._open_again(
                    failure, archive, source.path_or_file, lambda found: self._load_source(source, found, None)
                )
            return
        try:
            model = self._add(archive, source.name, file, at_startup=True)
        except ServeError as error:
            self._note_failure(source.name or file, file, error)
            return
        workers = model.workers_min
        try:
            await model.load(workers, lambda text: self._progress(model.name, text), tracing)
        except Exception as error:
            # The model stays in the table as FAILED, so that whoever asks for it reads why.
            log.error("%s", model.error or error)
            if may_pass(error):
                self._recovery.load_again(model, error, workers, model.workers_min)

    def _open_again(
        self, failure: LoadFailure, error: ServeError, path: str, load: Callable[[Archive], Awaitable[object]]
    ) -> None:
        """Opens an archive again that could not be, until it is, or its failure is forgotten."""

        async def open_and_load() -> None:
            archive = await opened_now(path)
            if isinstance(archive, ServeError):
                raise archive
            self.failures = [each for each in self.failures if each is not failure]
            await load(archive)
            await self.changed()

        self._recovery.begin(
            failure.url, error, open_and_load, is_wanted=lambda: any(each is failure for each in self.failures)
        )

    def _note_failure(self, name: str, url: str, error: ServeError) -> LoadFailure:
        log.error("cannot be loaded: %s", error.message)  # the message names the file
        fix = error.detail.get("fix", "") if isinstance(error, ConflictError) else ""
        self.failures.append(LoadFailure(name, url, f"{error.message}; {fix}" if fix else error.message))
        return self.failures[-1]

    async def restore(
        self, state: JsonObject, archives: dict[str, Archive | ServeError] | None = None,
        tracings: dict[str, Tracing] | None = None,
    ) -> None:  # fmt: skip
        """Brings back what the state file or a snapshot says.

        Args:
            archives, tracings: by path; what was opened and begun before torch was imported.
        """
        archives = {} if archives is None else archives
        opened = [await taken(archives, path) for path in (entry["path"] for entry in state["models"])]
        versions = await asyncio.gather(*(
            self._restore_model(entry, archive, (tracings or {}).get(entry["path"]))
            for entry, archive in zip(state["models"], opened, strict=True)
        ))  # fmt: skip
        actual = {(entry["name"], entry["version"]): version
                  for entry, version in zip(state["models"], versions, strict=True)}  # fmt: skip
        for name, wanted in state["defaults"].items():
            version = actual.get((name, wanted))
            if version is not None:
                self._defaults[name] = version
            elif name in self._models:
                log.error("%s: the default version %s could not be restored; %s is it now", name, wanted,
                          self._defaults[name])  # fmt: skip
        self.failures += [LoadFailure(**failure) for failure in state["failures"]]
        self._keeps_state = True
        await self.changed(STARTUP)

    async def _restore_model(
        self, entry: JsonObject, archive: Archive | ServeError, tracing: Tracing | None
    ) -> str | None:
        """The version that it is; None if there is no model of it."""
        try:
            if isinstance(archive, ServeError):
                raise archive
            model = self._add(
                archive, entry["name"], entry["url"],
                handler=entry["handler"], at_startup=entry["loaded_at_startup"],
            )  # fmt: skip
        except ServeError as error:
            failure = self._note_failure(entry["name"], entry["url"], error)
            failure.version, failure.entry = entry["version"], entry.get("entry")
            if error is archive:  # which could be opened before: it will be there again
                self._open_again(failure, error, entry["path"], lambda found: self._restore_model(entry, found, None))
            return None
        if model.version != entry["version"]:
            log.warning("%s: its archive has version %s, not %s", model.name, model.version, entry["version"])
        elif entry.get("content", archive.sha256) != archive.sha256:
            model.note = f"{archive.name} has changed since it was loaded, with the same version; it is served as it is"
            log.warning("%s %s: %s", model.name, model.version, model.note)
        for attribute, value in entry["settings"].items():
            setattr(model.settings, attribute, value)
        model.wanted_workers = entry["workers"]
        if entry.get("endless"):
            model.fail(entry["endless"])
            return model.version
        try:
            await model.load(entry["workers"], lambda text: self._progress(model.name, text), tracing)
        except Exception as error:
            log.error("%s", model.error or error)
            if not model.endless and (may_pass(error) or entry["workers"]):  # it has been served
                self._recovery.load_again(model, error, entry["workers"], entry["settings"]["workers_min"])
        # It may have had more workers than its least, and loading took their number for that.
        model.settings.workers_min = entry["settings"]["workers_min"]
        return model.version

    def stop_fetching(self) -> None:
        """Registrations from URLs that are under way fail; the server is stopping."""
        self._sources.stop()

    async def drain(self) -> None:
        """Finishes what all models have admitted and stops them."""
        await self.changed(SHUTDOWN)
        self._keeps_state = False
        self._background.cancel()
        await self._recovery.stop()
        await asyncio.gather(*(model.drain() for model in self.all_models()))

    def _add(
        self, archive: Archive, name: str | None, url: str, *, at_startup: bool, handler: str | None = None,
        settings: dict[str, int] | None = None, workers: int | None = None,
    ) -> Model:  # fmt: skip
        """A new row of the table, LOADING. Closes the archive if there cannot be one."""
        try:
            return self._new_row(
                archive, name, url, handler=handler, settings=settings or {}, workers=workers, at_startup=at_startup
            )
        except ServeError:
            archive.close()
            raise

    def _new_row(
        self, archive: Archive, name: str | None, url: str, *, at_startup: bool, handler: str | None,
        settings: dict[str, int], workers: int | None,
    ) -> Model:  # fmt: skip
        name = served_name(archive, name, is_named_by_file=at_startup)
        archive.use_handler(handler or archive.manifest.handler or self._services.config.default_service_handler)
        if archive.manifest.raw is None and not archive.manifest.handler:
            raise without_manifest(archive)
        version = archive.manifest.model_version
        existing = self._models.get(name, {}).get(version)
        if existing is not None and existing.state != "FAILED":
            raise ConflictError(
                f"Model version {version} is already registered for model {name}",
                detail={"fix": "give it another name (name=FILE, model_name=), or pack it with another --version"},
            )
        config = self._services.config
        if config.compat == "strict":
            archive.config.leave_out_quoted()
        block = config.models.get(name, {}).get(version, {})
        first = first_settings(config, archive.config, block, settings, archive.name)
        gpus = gpu_count(config.number_of_gpu)
        allowed = allowed_devices(archive.config, gpus, label=archive.name, is_lenient=config.compat == "strict")
        count = gpus if config.compat == "strict" else len(allowed)
        first.workers_min, first.workers_max = first_workers(config, archive.config, block, workers, gpus=count)
        residents = [other.resident for other in self.all_models()]
        model = Model(
            self._services,
            archive,
            name=name,
            url=url,
            settings=first,
            devices=ordered_devices(allowed, residents, workers=first.workers_min),
            handler_name=handler,
            loaded_at_startup=at_startup,
        )
        for warning in archive.warnings:
            log.warning("%s", warning)
        if existing is not None:
            self._background.begin(end(existing), f"removing the failed {name} {version}")
        self._models.setdefault(name, {})[version] = model
        self._defaults.setdefault(name, version)
        self.on_names()
        return model

    async def _load_or_remove(self, model: Model, *, stays: bool) -> None:
        """``stays``: in the table, as FAILED, if it cannot be loaded."""
        try:
            await model.load(model.workers_min, lambda text: self._progress(model.name, text))
        except BaseException as error:
            if stays and model.state == "FAILED":
                if isinstance(error, Exception) and may_pass(error):
                    self._recovery.load_again(model, error, model.workers_min, model.workers_min)
                raise
            if model in self.all_models():  # it may have been unregistered meanwhile
                self._remove(model)
            await end(model)
            raise

    def _remove(self, model: Model) -> None:
        versions = self._models[model.name]
        del versions[model.version]
        if not versions:
            del self._models[model.name], self._defaults[model.name]
        elif self._defaults[model.name] == model.version:
            self._defaults[model.name] = next(iter(versions))
        self.on_names()

    # --- state ----------------------------------------------------------------------------------------------------

    def _capture(self) -> tuple[JsonObject, JsonObject]:
        # What is loading is not promised to anyone yet; and a model that kills the server while it loads must not
        # come back.
        models = [model for model in self.all_models() if model.state != "LOADING"]
        store = self._services.config.model_store
        return (
            state_of(models, self._defaults, self.failures),
            snapshot_of(models, self._defaults, self.failures, store),
        )
