"""Fetches an archive from an object store through fsspec, with the credentials that its own libraries find.

Each store needs optional packages, those of the extras ``s3``, ``gs`` and ``hf``.
"""

from __future__ import annotations

import importlib
from typing import Any

from pyserve.config.archive_url import STORE_SCHEMES, ArchiveUrl
from pyserve.fetch.transfer import CHUNK_SIZE, Transfer, TransferError

_REASON_SIZE_MAX = 300

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface-hub"}


def open_store(scheme: str) -> Any:
    """The fsspec file system of ``scheme``.

    Raises:
        TransferError: its package is not installed, or it cannot be used.
    """
    assert scheme in STORE_SCHEMES
    try:
        # By its name, never by a URL: fsspec would read chains of other file systems in that.
        return importlib.import_module("fsspec").filesystem(scheme)
    except ImportError as error:
        raise TransferError(
            f"{scheme}:// needs packages that are not installed ({error})", fix=f"pip install fsspec {PACKAGES[scheme]}"
        ) from None
    except Exception as error:
        raise TransferError(f"{scheme}:// cannot be used: {_text(error)}") from None


def fetch_object(url: ArchiveUrl, transfer: Transfer) -> None:
    """Fills ``transfer`` with an object. Blocks; a transfer that is asked to end does so between two reads.

    Raises:
        TransferError: it could not be fetched as a whole.
    """
    store = open_store(url.scheme)
    key = url.host + url.local_path
    try:
        store.invalidate_cache()  # file systems are shared, and remember how large an object was
        size = store.info(key).get("size")
        transfer.check()
        if not store.isfile(key):
            raise TransferError("it is a folder; give the URL of an archive")
        if size is not None:
            transfer.expect(size)
        with store.open(key, "rb") as file:
            while chunk := file.read(CHUNK_SIZE):
                transfer.write(chunk)
    except TransferError:
        raise
    except FileNotFoundError:
        raise TransferError("there is no such object") from None
    except Exception as error:  # whatever boto, aiohttp or Hugging Face's library raises
        transfer.check()
        raise TransferError(_text(error)) from None
    if size is not None and transfer.size != size:
        raise TransferError(f"{transfer.size} of {size} bytes came")


def _text(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:_REASON_SIZE_MAX]
