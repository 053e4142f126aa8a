"""What a server that has begun to serve shows of itself: its models, its ports, and a request to paste."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pyserve.archive.archive import has_manifest
from pyserve.archive.cache import open_cache
from pyserve.config.config import Config
from pyserve.errors import ServeError
from pyserve.grpc_api.front_end import GrpcFrontEnd
from pyserve.models.registry import Registry
from pyserve.security.tls import curl_target
from pyserve.security.tokens import Tokens


async def start_table(config: Config, registry: Registry, grpc: GrpcFrontEnd, tokens: Tokens | None) -> dict[str, Any]:
    """Members of the event ``ready``, see `launch`: a row for each model, served or failed, and what stands below."""
    rows = [
        {
            "model": model.name,
            "version": model.version,
            "state": model.state,
            "workers": model.wanted_workers if model.state == "READY" else 0,
            "device": model.device,
            "batch": model.batch_size,
            "url": f"{config.inference_address}/predictions/{quote(model.name, safe='')}",
            "error": model.error,
            "note": model.note,
        }
        for model in registry.all_models()
    ]
    rows += [
        {"model": failure.name, "version": "", "state": "FAILED", "workers": 0, "device": "", "batch": 0, "url": "",
         "error": failure.error}
        for failure in registry.failures
    ]  # fmt: skip
    loaded = {model.archive.path.name for model in registry.all_models()}
    loaded |= {failure.url for failure in registry.failures}
    return {
        "models": rows,
        "not_loaded": [file for file in config.store_files() if file not in loaded and _is_model(config, file)],
        "sample": await _sample(config, registry, tokens),
        "console": _console(config),
        "grpc": grpc.addresses,
        "notes": grpc.notes,
    }


def _console(config: Config) -> str:
    """Where browsers on this machine find the page with which models can be managed; ``""`` if there is none."""
    address = config.management_address
    return f"{address.client_url}/" if config.has_console and not address.is_unix else ""


def _is_model(config: Config, file: str) -> bool:
    """Whether an entry of the model store is an archive, or a folder that says that it is a model; one of logs is none.
    """  # fmt: skip
    path = Path(config.model_store or "", file)
    try:
        return not path.is_dir() or has_manifest(path)
    except (ServeError, OSError):
        return False


async def _sample(config: Config, registry: Registry, tokens: Tokens | None) -> str:
    """One line that a person can paste."""
    ready = [model for model in registry.default_models() if model.has_ready_worker]
    curl = await asyncio.to_thread(_curl, config, tokens)
    if not ready:
        return f"{curl}/ping"
    model = ready[0]
    # Models of one name in two projects are two.
    folder = open_cache().root / "samples" / model.archive.sha256[:12]
    # Drawing a picture takes a moment, and requests are being answered already.
    arguments = await asyncio.to_thread(model.sample_arguments, folder)
    return f"{curl}/predictions/{quote(model.name, safe='')} {arguments}"


def _curl(config: Config, tokens: Tokens | None) -> str:
    """The command up to the path, for a client on this machine."""
    address = config.inference_address
    words, url = ["curl"], address.client_url
    if address.is_unix:
        words, url = ["curl", "--unix-socket", shlex.quote(address.path)], "http://localhost"
    elif address.is_tls:
        url, option = curl_target(config, address)
        words.append(option)
    if tokens is not None and tokens.guards("inference"):
        words.append('-H "Authorization: Bearer KEY"')
    return " ".join([*words, url])
