"""The listening sockets: made once by the supervisor, kept open while servers come and go.

A client that connects while no server is running waits in the backlog instead of being refused.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyserve.config.address import Address, port_owner
from pyserve.config.config import Config
from pyserve.errors import ConfigError, JsonObject
from pyserve.server.last_clients import let_in_again
from pyserve.server.passed_sockets import PassedSockets

log = logging.getLogger(__name__)

BACKLOG = 4096  # the kernel lowers it to net.core.somaxconn
UNIX_SOCKET_UMASK = 0o117  # owner and group may connect


class Listeners:
    """Open sockets by name; two names with one address share one socket.

    Several front ends have a TCP socket each for an address (SO_REUSEPORT: the system divides the clients among them),
    and share those of unix sockets.

    Attributes:
        are_kept: somebody else made one of them and keeps it open for the next start, as systemd does. Servers then
            stop accepting, and neither close the door to clients nor remove a file: those who connect wait.
    """

    def __init__(self) -> None:
        self.are_kept = False
        self.sockets: dict[str, socket.socket] = {}
        self._copies: dict[socket.socket, list[socket.socket]] = {}
        self.addresses: dict[str, Address] = {}
        self._unix_files: dict[str, tuple[int, int]] = {}

    @classmethod
    def open(cls, config: Config, passed: PassedSockets | None = None) -> Listeners:
        """Bind and listen on every address of ``config``.

        Args:
            passed: sockets of a service manager, which are taken in place of our own.

        Raises:
            ConfigError: an address cannot be had; names it, its key, who has it and the fix. Nothing stays open.
        """
        listeners = cls()
        try:
            for name, address in config.addresses().items():
                key = f"{name}_address ({config.origin.get(f'{name}_address', 'default')})"
                given = passed.take(name, address) if passed else None
                if given is None:
                    listeners._add(name, address, key, config.front_ends - 1)
                else:  # front ends share it: it was made before there were any
                    listeners.sockets[name], listeners.addresses[name] = given
                    listeners.are_kept = True
            if passed:
                passed.check_all_taken(config.addresses().values())
        except BaseException:
            listeners.close()
            raise
        return listeners

    @classmethod
    def adopt(cls, handed: JsonObject) -> Listeners:
        """The inverse of `to_json`, in the program that this process has become."""
        listeners = cls()
        listeners.are_kept = handed["are_kept"]
        by_fd: dict[int, socket.socket] = {}
        for fd in {*handed["sockets"].values(), *(fd for _, copies in handed["copies"] for fd in copies)}:
            os.set_inheritable(fd, False)
            by_fd[fd] = socket.socket(fileno=fd)
        listeners.sockets = {name: by_fd[fd] for name, fd in handed["sockets"].items()}
        listeners._copies = {by_fd[fd]: [by_fd[each] for each in copies] for fd, copies in handed["copies"]}
        listeners.addresses = {name: Address.parse(text, 0) for name, text in handed["addresses"].items()}
        listeners._unix_files = {path: (device, inode) for path, device, inode in handed["unix_files"]}
        return listeners

    def to_json(self) -> JsonObject:
        """For the program that this process is about to become, which inherits `descriptors`."""
        return {
            "are_kept": self.are_kept,
            "sockets": {name: sock.fileno() for name, sock in self.sockets.items()},
            "copies": [[sock.fileno(), [copy.fileno() for copy in copies]] for sock, copies in self._copies.items()],
            "addresses": {name: str(address) for name, address in self.addresses.items()},
            "unix_files": [[path, *identity] for path, identity in self._unix_files.items()],
        }

    @property
    def descriptors(self) -> list[int]:
        """Of all sockets."""
        return [sock.fileno() for sock in self._all()]

    def of_front_end(self, number: int) -> dict[str, socket.socket]:
        """The sockets that the front end of this number accepts from."""
        if number == 0:
            return self.sockets
        return {name: self._copies[sock][number - 1] if sock in self._copies else sock
                for name, sock in self.sockets.items()}  # fmt: skip

    def _add(self, name: str, address: Address, key: str, copy_count: int) -> None:
        target = _target(address, key)
        for other, made in self.sockets.items():
            # Port 0 asks for any free port, so two such addresses are two ports.
            if made.getsockname() == target[1] and made.family == target[0]:
                if address.is_tls != self.addresses[other].is_tls:
                    raise ConfigError(f"{key}: {address} is {other}_address too, but one of the two speaks TLS only")
                self.sockets[name], self.addresses[name] = made, self.addresses[other]
                return
        if address.is_unix:
            listener = self._listen_unix(address, key)
        elif copy_count:
            if address.port:  # those that share a port are not told of others who share it, such as another server
                _listen_tcp(target, address, key, name).close()
            listener = _listen_tcp(target, address, key, name, is_shared=True)
            same = listener.family, listener.getsockname()
            copies = self._copies[listener] = []
            for _ in range(copy_count):
                copies.append(_listen_tcp(same, address, key, name, is_shared=True))
        else:
            listener = _listen_tcp(target, address, key, name)
        self.sockets[name] = listener
        port = 0 if address.is_unix else listener.getsockname()[1]
        self.addresses[name] = replace(address, port=port)

    def _listen_unix(self, address: Address, key: str) -> socket.socket:
        path = Path(address.path)
        _remove_stale(path, key)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        umask = os.umask(UNIX_SOCKET_UMASK)
        try:
            listener.bind(address.path)
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise ConfigError(f"{key}: cannot listen on {address}: {error.strerror}") from None
        finally:
            os.umask(umask)
        status = path.stat()
        self._unix_files[address.path] = (status.st_dev, status.st_ino)
        listener.setblocking(False)
        return listener

    def reopen(self) -> None:
        """Lets clients in again, if a server had stopped listening for good: one that was told to stop by somebody else
        than the supervisor, which starts another one. Port and path stay the same.
        """  # fmt: skip
        for listener in self._all():
            if listener.family == socket.AF_UNIX:
                if listener.getsockname() in self._unix_files:  # else it is somebody else's
                    self._reopen_unix(listener)
            else:
                let_in_again(listener)

    def _reopen_unix(self, listener: socket.socket) -> None:
        path = listener.getsockname()
        if os.path.lexists(path):
            return
        names = [name for name, each in self.sockets.items() if each is listener]
        try:
            made = self._listen_unix(self.addresses[names[0]], f"{names[0]}_address")
        except (ConfigError, OSError) as error:
            log.warning("the file of the socket %s is gone and cannot be made again: %s", path, error)
            return
        self.sockets.update(dict.fromkeys(names, made))
        listener.close()

    def release(self) -> None:
        """Close our copies of all sockets. The files of unix sockets stay: another process may still listen."""
        for listener in self._all():
            listener.close()

    def _all(self) -> set[socket.socket]:
        return {*self.sockets.values(), *(copy for copies in self._copies.values() for copy in copies)}

    def close(self) -> None:
        """Close all sockets and remove the socket files that are still ours."""
        self.release()
        for path, identity in self._unix_files.items():
            try:
                status = os.lstat(path)
                if (status.st_dev, status.st_ino) == identity:
                    os.unlink(path)
            except OSError:
                continue
        self._unix_files.clear()


def _target(address: Address, key: str) -> tuple[int, Any]:
    if address.is_unix:
        return socket.AF_UNIX, address.path
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"{key}: the host {address.host!r} is not known: {error.strerror}") from None
    return found[0][0], found[0][4]


def _listen_tcp(
    target: tuple[int, Any], address: Address, key: str, name: str, *, is_shared: bool = False
) -> socket.socket:
    family, where = target
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(where)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{key}: cannot listen on {address}: {_reason(error, address, name)}") from None
    listener.setblocking(False)
    return listener


def _reason(error: OSError, address: Address, name: str) -> str:
    if error.errno == errno.EADDRINUSE:
        owner = port_owner(address.port)
        taken = f"the port is in use by {owner}" if owner else "the port is in use"
        return f"{taken}; stop that, or {_other(name)}"
    if error.errno == errno.EACCES:
        return f"ports below 1024 need privileges; {_other(name)}"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"no interface of this machine has that address; {_other(name)}"
    return error.strerror or str(error)


def _other(name: str) -> str:
    # `torchserve` has no flag for it.
    return f"choose another with {name}_address in config.properties, or with `pyserve start --{name}-address`"


def _remove_stale(path: Path, key: str) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{key}: cannot listen on unix:{path}: {error.strerror}") from None
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"{key}: {path} exists and is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError:
            pass  # a full backlog or a missing permission: somebody is there
    raise ConfigError(f"{key}: another server is listening on unix:{path}; stop it or choose another path")
