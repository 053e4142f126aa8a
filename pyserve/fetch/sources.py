"""Where archives come from: what a caller names becomes a file or folder on this machine.

A name means the model store, and so does a path, of which only the last part counts unless all of it lies inside the
store. A URL is fetched into the store if ``allowed_urls`` allows it; into the cache folder when the store is read-only.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from pyserve.archive.archive import Archive, open_archive
from pyserve.archive.cache import open_cache
from pyserve.config.allowed_urls import AllowedUrls
from pyserve.config.archive_url import (
    STORE_SCHEMES,
    WEB_SCHEMES,
    ArchiveUrl,
    UrlError,
    goes_up,
    is_url,
    parse_url,
    without_secrets,
)
from pyserve.config.config import Config
from pyserve.config.model_source import ModelSource, list_store, nearest_file
from pyserve.errors import ModelLoadError, ModelNotFoundError, ServeError, ServerError
from pyserve.fetch.object_store import fetch_object
from pyserve.fetch.refusals import Refusals, StrictRefusals, failed
from pyserve.fetch.transfer import CHUNK_SIZE, Abort, ExistsError, Transfer, TransferError, TransferLimits
from pyserve.fetch.web import Network, fetch_http

log = logging.getLogger(__name__)

FETCHES_MAX = 4  # at once; more wait
FILES_SHOWN_MAX = 5
NAME_COMPARED_MAX = 255  # characters; no file has a longer name
# A transfer that was told to end may hang in a library, or in asking for a name. Nobody waits for it longer.
_ABANDON_S = 5.0
_STOPPING = "the server is stopping"
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True)
class Obtained:
    """An archive on this machine.

    Attributes:
        path: the file or folder.
        url: what it is called in answers: its name in the model store, or its URL without the query.
        is_fetched: it came from a URL, and goes when its model goes.
    """

    path: Path
    url: str
    is_fetched: bool = False


class ArchiveSources:
    """Finds and fetches archives. Loop thread only.

    Args:
        config: ``model_store``, ``allowed_urls`` and the bounds of downloads are read.
        network: how hosts are found and reached; by default as the system does.
    """

    def __init__(self, config: Config, *, network: Network | None = None):
        self._store = Path(config.model_store) if config.model_store else None
        self._allowed = AllowedUrls(config.allowed_urls)
        self._refusals = StrictRefusals(config.allowed_urls) if config.compat == "strict" else Refusals()
        self._network = network or Network(allow_private=config.allow_private_addresses)
        self._limits = TransferLimits(config.download_size_max, config.download_timeout_s)
        self._slots = asyncio.Semaphore(FETCHES_MAX)
        self._aborts: set[Abort] = set()
        self._is_stopping = False

    async def obtain(self, url: str, *, in_use: Collection[Path] = (), reuses: bool = False) -> Obtained:
        """The archive that ``url`` names.

        Args:
            in_use: archives that are served, which are not to be replaced.
            reuses: take a file of the URL's name that is there already, instead of refusing.

        Raises:
            ModelNotFoundError: there is none, or it may not be fetched.
            DownloadError: it could not be fetched; nothing of it is left.
            ServerError: there is a file of its name already.
        """
        if not url.strip():
            raise ModelNotFoundError("empty url")
        if goes_up(url):
            raise ModelNotFoundError(f"Relative path is not allowed in url: {without_secrets(url)}")
        if is_url(url):
            return await self._fetch(url, in_use, reuses)
        if self._store is None:
            raise ModelNotFoundError("Model store has not been configured.")
        return await asyncio.to_thread(_find, self._store, url)

    def remove(self, path: Path) -> None:
        """Removes an archive that was fetched, and nothing that lies elsewhere than those are put; blocks."""
        if path.parent == self._store:
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                path.unlink()
        elif path.parent.parent == _downloads():
            shutil.rmtree(path.parent, ignore_errors=True)

    def stop(self) -> None:
        """Ends what is being fetched; nothing is from now on."""
        self._is_stopping = True
        for abort in self._aborts:
            abort.fire(_STOPPING)

    # --- URLs -----------------------------------------------------------------------------------------------------

    async def _fetch(self, text: str, in_use: Collection[Path], reuses: bool) -> Obtained:
        shown = without_secrets(text)
        if self._store is None:
            raise ModelNotFoundError("Model store has not been configured.")
        store = self._store
        known = self._refusals.file_name(text)
        if known is not None and not reuses and await asyncio.to_thread(os.path.lexists, store / known):
            raise _exists(known)
        stored = self._refusals.stored_name(text)
        if stored is not None and await asyncio.to_thread(os.path.lexists, store / stored):
            return await asyncio.to_thread(_find, store, stored)
        url, name = self._checked(text, shown)
        if await asyncio.to_thread(os.path.lexists, store / name):
            if reuses:
                log.info("%s is in the model store already and is not fetched again from %s", name, shown)
                return Obtained(store / name, name)
            raise _exists(name)
        try:
            async with self._slots:
                path = await self._run(lambda abort: self._transfer(url, store, name, abort, in_use))
        except ExistsError:
            raise _exists(name) from None
        except TransferError as error:
            log.warning("fetching %s failed: %s", shown, error)
            if error.is_refused:
                raise self._refusals.error(text, str(error), error.fix) from None
            raise failed(shown, str(error), error.fix) from None
        return Obtained(path, url.base, is_fetched=True)

    def _checked(self, text: str, shown: str) -> tuple[ArchiveUrl, str]:
        """``text`` as a URL that may be fetched, and what its archive is called."""
        if not self._allowed:
            raise self._refusals.error(
                text, "allowed_urls is empty, so that nothing is fetched",
                "name it in allowed_urls in config.properties, or put the file into the model store and give its name",
            )  # fmt: skip
        try:
            url = parse_url(text)
            if not self._allowed.match(url):
                raise self._refusals.error(text, "no pattern of allowed_urls matches its scheme, host and path",
                                           "name it in allowed_urls in config.properties")  # fmt: skip
            return url, url.file_name
        except UrlError as error:
            if error.is_refused:
                raise self._refusals.error(text, f"the URL {error}", "") from None
            raise failed(shown, f"the URL {error}", "") from None

    async def _run(self, work: Callable[[Abort], Path]) -> Path:
        """``work`` in a thread of its own, which does not keep the process from ending."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Path] = loop.create_future()
        abort = Abort()
        if self._is_stopping:
            raise TransferError(_STOPPING)

        def settle(path: Path | None, error: BaseException | None) -> None:
            if done.done():
                return
            if path is not None:
                done.set_result(path)
            elif error is not None:
                done.set_exception(error)

        def run() -> None:
            path: Path | None = None
            error: BaseException | None = None
            try:
                path = work(abort)
            except BaseException as raised:
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, path, error)

        def expire(reason: str) -> None:
            abort.fire(reason)
            timers.append(loop.call_later(_ABANDON_S, abandon, reason))

        def abandon(reason: str) -> None:
            abort.remove_partial()
            settle(None, TransferError(reason))

        limit_s = self._limits.timeout_s
        timers = [loop.call_later(limit_s, expire, f"it took longer than download_timeout_s={limit_s:g}")]
        self._aborts.add(abort)
        threading.Thread(target=run, name="fetch", daemon=True).start()
        try:
            return await done
        except asyncio.CancelledError:
            abort.fire("no client waits for it any more")
            raise
        finally:
            self._aborts.discard(abort)
            for timer in timers:
                timer.cancel()

    def _transfer(self, url: ArchiveUrl, store: Path, name: str, abort: Abort, in_use: Collection[Path]) -> Path:
        """Fetches ``url`` and returns where it lies. In a thread."""
        transfer, is_cached = self._begin(url, store, name, abort, in_use)
        note = transfer.target.with_name(".etag") if is_cached else None
        with transfer:
            etag = ""
            if url.scheme in WEB_SCHEMES:
                known = _read_etag(note) if note is not None and transfer.target.exists() else ""
                etag = fetch_http(url, self._allowed, self._network, transfer, known=known)
                if known and not transfer.size:
                    log.info("%s is as it was when it was fetched before", url.base)
                    return transfer.target
            elif url.scheme in STORE_SCHEMES:
                fetch_object(url, transfer)
            else:
                _copy(url, self._allowed, transfer)
            if note is not None:
                note.unlink(missing_ok=True)  # never one of another file; without one the next download is a whole one
            transfer.commit(replaces=is_cached)
        if note is not None:
            with contextlib.suppress(OSError):
                note.write_text(etag)
        log.info("fetched %s: %d bytes", url.base, transfer.size)
        return transfer.target

    def _begin(
        self, url: ArchiveUrl, store: Path, name: str, abort: Abort, in_use: Collection[Path]
    ) -> tuple[Transfer, bool]:
        """A transfer into the store; or into the cache, where it replaces what is there, if the store is read-only."""
        try:
            return Transfer(store, name, self._limits, abort), False
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise TransferError(f"it cannot be kept in the model store: {error.strerror}") from None
        folder = _downloads() / hashlib.sha256(url.base.encode()).hexdigest()[:16]
        if folder / name in in_use:
            raise ExistsError
        log.warning("the model store is read-only; keeping %s in %s", name, folder)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return Transfer(folder, name, self._limits, abort), True
        except OSError as error:
            raise TransferError(
                f"the model store is read-only, and the cache cannot be written: {error.strerror}",
                fix="set PYSERVE_CACHE to a folder that can be written",
            ) from None


def _downloads() -> Path:
    return open_cache().root / "downloads"


def _read_etag(note: Path) -> str:
    try:
        text = note.read_text()
    except (OSError, ValueError):
        return ""
    return text if text.isascii() and text.isprintable() else ""


def _exists(name: str) -> ServerError:
    return ServerError(f"Model file already exists {name}", detail={
        "fix": f"register what is there by its name (url={name}), or remove it from the model store first",
    })  # fmt: skip


def _copy(url: ArchiveUrl, allowed: AllowedUrls, transfer: Transfer) -> None:
    """Fills ``transfer`` with a file of this machine. Links are followed to where ``allowed_urls`` allows, too."""
    try:
        descriptor = os.open(url.local_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TransferError(f"the file cannot be opened: {reason}") from None
    try:
        real = os.readlink(f"/proc/self/fd/{descriptor}")
        if not allowed.match(ArchiveUrl("file", "", 0, quote(real, safe="/!$&'()*+,;=:@~"))):
            raise TransferError("it is a link to a place that allowed_urls does not allow", is_refused=True)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise TransferError("it is not a regular file; give an archive")
        transfer.expect(status.st_size)
        while chunk := os.read(descriptor, CHUNK_SIZE):
            transfer.write(chunk)
    except OSError as error:
        raise TransferError(f"the file cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


async def obtain_at_start(
    config: Config, sources: Sequence[ModelSource], progress: Callable[[str, str], None]
) -> tuple[list[ModelSource], dict[str, ServeError]]:
    """``sources`` with the files that came of their URLs, and the errors of those that failed, by URL.

    A file of the right name that is in the model store already is taken as it is: a restart fetches nothing again.

    Args:
        progress: told (name, text) of what is being done.
    """
    wanted = dict.fromkeys(source.path_or_file for source in sources if is_url(source.path_or_file))
    fetching = ArchiveSources(config)

    async def obtain(url: str) -> Obtained | ServeError:
        progress(without_secrets(url), "fetching")
        try:
            return await fetching.obtain(url, reuses=True)
        except ServeError as error:
            # For the one who starts the server, and sees the message alone.
            reason = error.detail.get("reason")
            return type(error)(f"{error.message}: {reason}" if reason else error.message, detail=error.detail)

    came = dict(zip(wanted, await asyncio.gather(*(obtain(url) for url in wanted)), strict=True))
    errors = {url: result for url, result in came.items() if isinstance(result, ServeError)}
    found = []
    for source in sources:
        result = came.get(source.path_or_file)
        if isinstance(result, Obtained):
            found.append(ModelSource(source.name, str(result.path), result.url if result.is_fetched else None))
        else:
            found.append(source)
    return found, errors


def open_obtained(source: Obtained) -> Archive:
    """Opens what was obtained; blocks.

    Raises:
        ServeError: it cannot be used.
    """
    try:
        return open_archive(source.path)
    except ModelLoadError as error:  # the disk, not the archive
        raise ModelLoadError(f"Failed to save model: {source.url}", detail={"text": error.message}) from error


# --- the model store -----------------------------------------------------------------------------------------------


def _find(store: Path, url: str) -> Obtained:
    """What ``url``, a name or a path, means in ``store``.

    Raises:
        ModelNotFoundError: nothing.
    """
    if "\0" in url:
        raise ModelNotFoundError(f"Model not found at: {url}")
    reason = ""
    if url.startswith("/"):
        inside = _below(url, store)
        if inside is None or any(part.startswith(".") for part in inside.parts):
            reason = "it lies outside of the model store, or is hidden"
        elif os.path.exists(store / inside):
            # The entry itself may be a link to an archive elsewhere, as by its name: whoever can write to the store
            # chose that one archive. A folder that is a link would let callers choose, among all that lies behind it.
            folder = os.path.realpath((store / inside).parent)
            if folder == str(store.resolve()) or _below(folder, store) is not None:
                return Obtained(store / inside, str(inside))
            raise _not_found(url, "it lies behind a link that leaves the model store")
    name = url.rstrip("/").rpartition("/")[2]
    if not name or name.startswith(".") or not os.path.exists(store / name):
        if reason:
            raise _not_found(url, reason)
        files = list_store(str(store))
        near = nearest_file(name, files) if name and len(name) <= NAME_COMPARED_MAX else ""
        error = _not_found(
            url, "the model store has no such file", f"did you mean {near}?" if near else _instead(files)
        )
        error.detail["where"] = str(store)
        raise error
    return Obtained(store / name, name)


def _below(path: str, store: Path) -> Path | None:
    """The part of ``path`` below ``store``, whichever of its names that has; None when it is not below."""
    whole = Path(path)
    for root in (store, store.resolve()):
        if whole.is_relative_to(root) and whole != root:
            return whole.relative_to(root)
    return None


def _instead(files: list[str]) -> str:
    """What to do when nothing in the store is like what was asked for."""
    more = f", and {len(files) - FILES_SHOWN_MAX} more" if len(files) > FILES_SHOWN_MAX else ""
    has = f"; it has {', '.join(files[:FILES_SHOWN_MAX])}{more}" if files else "; it is empty"
    return f"put the archive into the model store and give its name{has}"


def _not_found(url: str, reason: str, fix: str = "") -> ModelNotFoundError:
    return ModelNotFoundError(f"Model not found at: {url}", detail={
        "reason": reason, "fix": fix or "put the archive into the model store and give its name",
    })  # fmt: skip
