"""What is begun of models before torch is imported: archives are opened, and eager ones begin to be converted."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path

from pyserve.archive.archive import Archive, open_archive
from pyserve.config.config import Config
from pyserve.config.model_source import ModelSource, nearest_file
from pyserve.conversion.torchscript import Tracing, needs_tracing, runs_in_python
from pyserve.errors import ModelLoadError, ModelNotFoundError, ServeError
from pyserve.lanes.spawner import Spawner

log = logging.getLogger(__name__)


def open_all(
    sources: list[ModelSource], errors: dict[str, ServeError], store_files: list[str]
) -> dict[str, Archive | ServeError]:
    """The archives by path; ``errors`` are of those that could not even be fetched."""
    archives: dict[str, Archive | ServeError] = {**errors}
    for source in sources:
        path = source.path_or_file
        if path not in archives:
            archives[path] = _open(source, store_files)
            if source.url is not None and isinstance(archives[path], ServeError):
                Path(path).unlink(missing_ok=True)  # so that the next start fetches it anew
    return archives


def _open(source: ModelSource, store_files: list[str]) -> Archive | ServeError:
    try:
        return open_archive(source.path_or_file)
    except ModelNotFoundError as error:
        near = nearest_file(Path(source.path_or_file).name, store_files)
        return ModelNotFoundError(f"{error.message}; did you mean {near}?") if near else error
    except ServeError as error:
        return error
    except Exception as error:  # one archive, whatever it is, does not keep the others from being served
        log.exception("%s cannot be opened", source.shown)
        return ModelLoadError(f"{source.shown}: cannot be opened: {type(error).__name__}: {error}")


def begin_tracing(archives: dict[str, Archive | ServeError]) -> dict[str, Tracing]:
    begun = {}
    for path, archive in archives.items():
        if isinstance(archive, Archive) and needs_tracing(archive):
            with contextlib.suppress(OSError):  # no room for another process yet; loading the model tries again
                begun[path] = Tracing(archive)
    return begun


def new_spawner(config: Config, open_files_max: int | None, family: str = "") -> Spawner:
    """Of the worker processes of a server with ``config``; see `Spawner`."""
    hidden = re.compile(config.blacklist_env_vars) if config.blacklist_env_vars else None
    return Spawner(
        lambda name: hidden is not None and hidden.fullmatch(name) is not None, worker_environment(config),
        open_files_max, family,
    )  # fmt: skip


def prepare_workers(spawner: Spawner, archives: dict[str, Archive | ServeError]) -> None:
    """Begins to start what worker processes are forked from, if a model will need some."""
    if any(isinstance(archive, Archive) and runs_in_python(archive) for archive in archives.values()):
        with contextlib.suppress(ServeError, OSError):  # what its models' workers meet too, and say
            spawner.prepare()


def worker_environment(config: Config) -> dict[str, str]:
    """What handlers find in their environment as TorchServe's do, whatever ours says."""
    values = {
        "TS_DECODE_INPUT_REQUEST": config.decode_input_request,
        "TS_IPEX_ENABLE": config.ipex_enable,
        "TS_IPEX_GPU_ENABLE": config.ipex_gpu_enable,
    }
    return {name: "true" if is_set else "false" for name, is_set in values.items()}
