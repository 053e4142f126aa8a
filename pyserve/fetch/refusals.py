"""What is answered when a URL may not be fetched."""

from __future__ import annotations

import logging
import re

from pyserve.config.archive_url import without_secrets
from pyserve.errors import DownloadError, ModelNotFoundError, ServeError

log = logging.getLogger(__name__)

# What TorchServe fetches, and which of it if nothing is said.
_SCHEMES = ("file", "http", "https")
_ALLOWED_DEFAULT = r"file://.*,http(s)?://.*"


class Refusals:
    """pyserve's own: a URL that is not allowed is not found."""

    def file_name(self, url: str) -> str | None:
        """The file of the model store that must not be there before ``url`` is fetched; None if that is asked later."""
        return None

    def stored_name(self, url: str) -> str | None:
        """The file of the model store that ``url`` means, if there is one; None for none."""
        return None

    def error(self, url: str, reason: str, fix: str) -> ServeError:
        """The answer."""
        text = f"Given URL {without_secrets(url)} does not match any allowed URL(s)"
        return ModelNotFoundError(text, detail=_detail(reason, fix))


class StrictRefusals(Refusals):
    """TorchServe's, for ``compat=strict``: what it would have tried to fetch counts as a download that failed. Nothing
    is fetched for that; the log says why.

    Args:
        allowed_urls: as configured. TorchServe compares its patterns with the whole URL.
    """

    def __init__(self, allowed_urls: str):
        texts = (allowed_urls or _ALLOWED_DEFAULT).split(",")
        self._patterns = [re.compile(text.strip(), re.IGNORECASE) for text in texts]

    def file_name(self, url: str) -> str | None:
        return _last_part(url.partition("?")[0]) if _is_fetched(url) else None

    def stored_name(self, url: str) -> str | None:
        return None if _is_fetched(url) else _last_part(url) or None  # of other schemes TorchServe does not know

    def error(self, url: str, reason: str, fix: str) -> ServeError:
        shown = without_secrets(url)
        log.warning("%s is not fetched: %s%s", shown, reason, f"; {fix}" if fix else "")
        if not _is_fetched(url):
            return ModelNotFoundError(f"Model not found at: {shown}", detail=_detail(reason, fix))
        if any(pattern.fullmatch(url) for pattern in self._patterns):
            return failed(shown, reason, fix)
        return super().error(url, reason, fix)


def _is_fetched(url: str) -> bool:
    return url.partition("://")[0].lower() in _SCHEMES


def _last_part(url: str) -> str:
    return url.rpartition("/")[2]


def failed(shown: str, reason: str, fix: str) -> DownloadError:
    """Of a URL, without secrets, that could not be fetched."""
    return DownloadError(f"Failed to download archive from: {shown}", detail=_detail(reason, fix))


def _detail(reason: str, fix: str) -> dict[str, str]:
    return {"reason": reason, **({"fix": fix} if fix else {})}
