"""The URL of an archive: read strictly, put into one normal form, and shown without what is secret in it.

Programs disagree about odd URLs: where the host ends, which port is meant, what ``%2e`` or a backslash becomes. What
they could disagree about is refused here, so that the host which is checked is the host which is asked.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, unquote_plus

WEB_SCHEMES = {"http": 80, "https": 443}  # with their ports
STORE_SCHEMES = ("s3", "gs", "hf")  # what fsspec fetches
SCHEMES = (*WEB_SCHEMES, "file", *STORE_SCHEMES)
HOST_SIZE_MAX = 253
_DECODINGS_MAX = 5  # of a path that was encoded several times over
_NAME_SIZE_MAX = 255  # bytes

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)(\?[^#]*)?(#.*)?")
_UNUSUAL = re.compile(r"[^!$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~#]")
_LABELS = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)(?:\.(?!-)[a-z0-9_-]{1,63}(?<!-))*")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})?")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_SECRET = re.compile(r"(://)[^/?#]*@|([?&;][^=&;#]*=)[^&;#]+")


class UrlError(ValueError):
    """A URL that cannot be used; the text ends the sentence "it ...".

    Attributes:
        is_refused: no pattern is even compared with it, because programs would read it differently.
    """

    def __init__(self, text: str, *, is_refused: bool = False):
        super().__init__(text)
        self.is_refused = is_refused


@dataclass(frozen=True)
class ArchiveUrl:
    """A URL in its normal form.

    Attributes:
        scheme: one of SCHEMES.
        host: lower case, IPv6 without brackets; of a store the bucket as it is; ``""`` of a file.
        port: 0 where the scheme has none.
        path: begins with a slash; escapes that need not be are undone, the others in upper case.
        query: without its question mark.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str = ""

    @property
    def authority(self) -> str:
        """Host, and port if it is not the scheme's own, as a ``Host`` header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == WEB_SCHEMES.get(self.scheme, 0) else f"{host}:{self.port}"

    @property
    def base(self) -> str:
        """Without the query, which may hold a signature."""
        return f"{self.scheme}://{self.authority}{self.path}"

    @property
    def target(self) -> str:
        """What a request line asks for."""
        return f"{self.path}?{self.query}" if self.query else self.path

    @property
    def local_path(self) -> str:
        """Path of a file, or key of an object."""
        return unquote(self.path, errors="strict")

    @property
    def file_name(self) -> str:
        """What the archive is called in the model store.

        Raises:
            UrlError: the last part of the path is no name for a file.
        """
        name = self.local_path.rpartition("/")[2]
        if not name:
            raise UrlError("ends without the name of an archive")
        if name.startswith(".") or not name.isprintable() or len(name.encode()) > _NAME_SIZE_MAX:
            raise UrlError("ends in a name that no archive may have: hidden, unprintable or longer than 255 bytes")
        return name


def is_url(text: str) -> bool:
    """Whether ``text`` is to be read as a URL rather than as the name of a file."""
    return "://" in text


def goes_up(text: str) -> bool:
    """Whether there is a ``..`` in ``text``, however often it is encoded."""
    for _ in range(_DECODINGS_MAX):
        if ".." in text:
            return True
        decoded = unquote(text)
        if decoded == text:
            return False
        text = decoded
    return True


def without_secrets(text: str) -> str:
    """``text``, a URL however broken, with ``***`` for passwords and the values of its query. For messages and logs."""
    return _SECRET.sub(lambda match: f"{match[1]}***@" if match[1] else f"{match[2]}***", text)


def query_without_secrets(query: str) -> str:
    """A query as it came, but for what `without_secrets` hides in those of its values that are URLs."""
    parts = []
    for part in query.split("&"):
        name, equals, value = part.partition("=")
        decoded = unquote_plus(value)
        shown = without_secrets(decoded) if is_url(decoded) else decoded
        parts.append(part if shown == decoded else f"{name}{equals}{quote(shown, safe='')}")
    return "&".join(parts)


def parse_url(text: str) -> ArchiveUrl:
    """Reads ``text``.

    Raises:
        UrlError: it cannot be used.
    """
    match = _URL.fullmatch(text)
    if match is None:
        raise UrlError("is not written scheme://host/path")
    scheme, authority, path, query, fragment = match.groups()
    scheme = scheme.lower()
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise UrlError(f"begins with {scheme}://; known are {known}", is_refused=True)
    unusual = _UNUSUAL.search(text)
    if unusual is not None:
        raise UrlError(
            f"has the character U+{ord(unusual[0]):04X}; write it percent-encoded, and a host as xn--...",
            is_refused=unusual[0] == "\\" or _UNUSUAL.search(authority) is not None,
        )
    if fragment is not None:
        raise UrlError("has a fragment (#...)", is_refused=True)
    if "@" in authority:
        raise UrlError("holds a user name or password; give the host alone", is_refused=True)
    path = _normal_path(path)
    if scheme in WEB_SCHEMES:
        host, port = _host_and_port(authority, WEB_SCHEMES[scheme])
        return ArchiveUrl(scheme, host, port, path or "/", (query or "?")[1:])
    if query is not None:
        raise UrlError(f"has a query (?...), which {scheme}:// URLs do not have")
    if scheme == "file":
        if authority.lower() not in ("", "localhost"):
            raise UrlError("names another machine; write file:///folder/archive.mar", is_refused=True)
        return ArchiveUrl(scheme, "", 0, path)
    if not _BUCKET.fullmatch(authority):
        raise UrlError(f"has no usable bucket; write {scheme}://bucket/folder/archive.mar", is_refused=True)
    return ArchiveUrl(scheme, authority, 0, path)


def _normal_path(path: str) -> str:
    def undo(match: re.Match[str]) -> str:
        if match[1] is None:
            raise UrlError("has a % that is not followed by two hexadecimal digits")
        character = chr(int(match[1], 16))
        return character if _UNRESERVED.fullmatch(character) else match[0].upper()

    decoded = path
    for _ in range(_DECODINGS_MAX):
        before, decoded = decoded, unquote(decoded)
        if decoded == before:
            break
        if decoded.count("/") != path.count("/") or "\\" in decoded or re.search(r"[\x00-\x1f\x7f]", decoded):
            raise UrlError("hides a slash, a backslash or a control character in its path", is_refused=True)
    if "//" in path or any(part in (".", "..") for part in decoded.split("/")):
        raise UrlError("has an empty part, '.' or '..' in its path", is_refused=True)
    try:
        unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise UrlError("has a path that is not UTF-8") from None
    return _ESCAPE.sub(undo, quote(path, safe="/%!$&'()*+,;=:@~[]"))


def _host_and_port(authority: str, port_default: int) -> tuple[str, int]:
    match = re.fullmatch(r"(\[[^\[\]]*\]|[^:\[\]]*)(?::([0-9]*))?", authority)
    if match is None:
        raise UrlError("has no host and port that can be separated", is_refused=True)
    host, digits = match[1].lower(), match[2] or ""
    port = int(digits) if digits and len(digits) <= 5 else 0 if digits else port_default
    if not 1 <= port <= 65_535:
        raise UrlError("has a port that is not from 1 to 65535")
    if host.startswith("["):
        try:
            if "%" in host:
                raise ValueError
            return str(ipaddress.IPv6Address(host[1:-1])), port
        except ValueError:
            raise UrlError("has a host in brackets that is not an IPv6 address", is_refused=True) from None
    host = host.removesuffix(".")
    if not host:
        raise UrlError("names no host")
    if len(host) > HOST_SIZE_MAX or not _LABELS.fullmatch(host):
        raise UrlError("has a host that is no name and no address", is_refused=True)
    # 127.1, 0x7f000001 and 2130706433 are addresses to some programs and names to others.
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            raise UrlError("has a host like an address, but not of four decimal numbers", is_refused=True) from None
    return host, port
