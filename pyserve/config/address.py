"""Where a server listens: ``http://host[:port]``, ``https://host[:port]`` or ``unix:/path``."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import quote

from pyserve.visible import visible

UNIX_PATH_SIZE_MAX = 107  # bytes; sockaddr_un.sun_path holds 108 with its final NUL

_HTTP = re.compile(
    r"http(?P<tls>s?)://(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?/?", re.IGNORECASE
)


@dataclass(frozen=True)
class Address:
    """One place to listen at.

    Attributes:
        host: name or IP address without brackets; ``""`` for a unix socket.
        port: TCP port; 0 lets the system choose one. 0 for a unix socket, too.
        path: path of the unix socket; ``""`` for TCP.
        is_tls: whether it speaks TLS.
    """

    host: str = ""
    port: int = 0
    path: str = ""
    is_tls: bool = False

    @classmethod
    def parse(cls, text: str, port_default: int, tls_port_default: int = 0) -> Address:
        """Read ``text``; one of the default ports is taken when it names none.

        Raises:
            ValueError: the text is not an address; the message says what is allowed.
        """
        if text.startswith("unix:"):
            return cls._parse_unix(text[len("unix:") :])
        match = _HTTP.fullmatch(text)
        if match is None:
            raise ValueError("allowed are http://host[:port], https://host[:port] and unix:/path")
        is_tls = bool(match["tls"])
        port = int(match["port"]) if match["port"] else tls_port_default if is_tls else port_default
        if port > 65535:
            raise ValueError(f"port {port} is too large; the largest is 65535")
        return cls(host=match["host"].strip("[]"), port=port, is_tls=is_tls)

    @classmethod
    def _parse_unix(cls, path: str) -> Address:
        if not path.startswith("/"):
            raise ValueError("a unix socket needs an absolute path, such as unix:/run/pyserve.sock")
        if "\0" in path:
            raise ValueError("the path of a unix socket cannot hold a NUL byte")
        size = len(path.encode("utf-8", "surrogateescape"))
        if size > UNIX_PATH_SIZE_MAX:
            raise ValueError(f"the path is {size} bytes long; a unix socket's may have {UNIX_PATH_SIZE_MAX}")
        return cls(path=path)

    @property
    def is_unix(self) -> bool:
        return bool(self.path)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        if self.is_unix or self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False

    @property
    def client_url(self) -> str:
        """Base URL that a client on this machine can use; wildcard hosts become loopback ones."""
        if self.is_unix:
            return "http+unix://" + quote(self.path, safe="")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return str(Address(host=host, port=self.port, is_tls=self.is_tls))

    def __str__(self) -> str:
        if self.is_unix:
            return "unix:" + self.path
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}"


def port_owner(port: int) -> str:
    """``"nginx (pid 812)"`` for the process listening on TCP ``port``, in one line; ``""`` if that is not to be seen.

    Other users' processes are seen by root only.
    """
    import psutil  # takes longer than all the rest, and is needed when something is wrong

    try:
        sockets = psutil.net_connections("tcp")  # of IPv4 and IPv6
    except (psutil.Error, OSError, RuntimeError):  # /proc is hidden, or not as it should be
        return ""
    for each in sockets:
        if each.status == psutil.CONN_LISTEN and each.laddr.port == port and each.pid is not None:
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                words = " ".join(psutil.Process(each.pid).cmdline()).split()  # a program's text may be among them
                return f"{visible(' '.join(words))[:80].strip()} (pid {each.pid})"
    return ""
