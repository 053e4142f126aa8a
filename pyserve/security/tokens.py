"""The keys that callers have to show: which calls need one, where they are kept, and how they change.

They are made anew whenever a supervisor starts, and written to ``key_file.json`` in the folder it was started in, as
TorchServe does. The supervisor keeps them too, so that a server that was restarted continues with them, whatever
became of the file. With ``token_file`` somebody else makes the keys: that file is read and never written.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, Protocol

from pyserve.config.config import Config
from pyserve.errors import BadRequestError, ConfigError, JsonObject, ServerError, TokenError
from pyserve.os_errors import cause_of

__all__ = ["KEY_FILE", "TokenError", "Tokens", "guarded_scopes"]

log = logging.getLogger(__name__)

Scope = Literal["inference", "management", "api"]

KEY_FILE = "key_file.json"
KEY_SIZE = 32  # random bytes
KEY_LENGTH_MAX = 4096  # characters
KEY_LENGTH_SAFE = 16
FILE_SIZE_MAX = 64 * 1024
_COPY = "keys.json"
_NAMES: dict[Scope, str] = {"management": "management", "inference": "inference", "api": "API"}  # in the file
_EXPIRY = "expiration time"
_BEARER = re.compile(r"Bearer\s+(\S+)\s*", re.IGNORECASE)
_KEY = re.compile(r"[!-~]+")


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        text: what callers send behind ``Bearer``.
        expires_at: seconds since the epoch; ``None`` for never.
    """

    text: str = field(repr=False)
    expires_at: float | None


Keys = dict[Scope, Key]


class Kept(Protocol):
    """What the supervisor keeps for each server that it starts, by name."""

    def get(self, name: str) -> bytes | None:
        """What was put last."""

    def put(self, name: str, content: bytes) -> str:
        """OSError if it cannot be kept at all."""


def guarded_scopes(config: Config) -> frozenset[Scope]:
    """Which calls need a key, unless a ``token_file`` says it.

    Management does where strangers could reach it. ``disable_token_authorization=false``, said outright, and
    ``compat=strict`` ask for all that TorchServe has.
    """
    if config.disable_token_authorization is True:
        return frozenset()
    if config.disable_token_authorization is False or config.compat == "strict":
        return frozenset({"management", "inference"})
    return frozenset() if config.management_is_local else frozenset({"management"})


def key_file(config: Config, folder: Path) -> Path | None:
    """Where the keys can be read; None if no call needs one."""
    if config.token_file:
        return Path(config.token_file).expanduser().absolute()
    return folder / KEY_FILE if guarded_scopes(config) else None


class Tokens:
    """The keys of a running server. ``check`` may be called from any thread.

    Args:
        keys: by scope.
        guarded: the scopes that need a key.
        lifetime_s: of a key that is made.
        is_strict: refusals are TorchServe's 400 instead of 401.
        file: where the keys can be read, by the owner only.
        kept: where the next server finds them.
        provided: the ``token_file``, if the keys come from one.
        clock: seconds since the epoch.

    Attributes:
        on_change: called when keys have been replaced, before anybody is told, from the thread that has done it.
    """

    on_change: Callable[[], object] = bool

    def __init__(
        self,
        keys: Keys,
        guarded: frozenset[Scope],
        *,
        lifetime_s: float,
        is_strict: bool = False,
        file: Path | None = None,
        kept: Kept | None = None,
        provided: Path | None = None,
        clock: Callable[[], float] = time.time,
    ):
        self._keys = keys
        self._guarded = guarded
        self._lifetime_s = lifetime_s
        self._is_strict = is_strict
        self._file = file
        self._kept = kept
        self._provided = provided
        self._clock = clock
        self._change = threading.Lock()

    @classmethod
    def create(cls, config: Config, kept: Kept, folder: Path) -> Tokens | None:
        """The supervisor's: makes the keys that ``config`` asks for and writes them, or reads those of ``token_file``.

        Args:
            kept: what the supervisor keeps.
            folder: where ``key_file.json`` shall be.

        Returns:
            None if no call needs a key.

        Raises:
            ConfigError: the file cannot be written, or not be used; names the fix.
        """
        if config.token_file:
            return cls._provided_by(config)
        if not guarded_scopes(config):
            return None
        tokens = cls._new(config, kept, {}, folder / KEY_FILE)
        tokens._keys = {scope: tokens._make(scope) for scope in _NAMES}
        try:
            tokens._write(tokens._keys)
        except OSError as error:
            raise ConfigError(
                f"the keys cannot be written to {folder / KEY_FILE}: {cause_of(error)}; start in a folder that can be "
                "written, name a file that holds the keys with --token-file, or switch them off with "
                "--disable-token-auth"
            ) from None
        return tokens

    @classmethod
    def open(cls, config: Config, kept: Kept, folder: Path) -> Tokens | None:
        """The server's: reads what the supervisor made by ``create`` with the same arguments.

        Raises:
            ConfigError: it is not to be used, or it is gone and cannot be made again.
        """
        if config.token_file:
            return cls._provided_by(config)
        if not guarded_scopes(config):
            return None
        path = folder / KEY_FILE
        content = kept.get(_COPY)
        try:
            keys = _parsed(content, path) if content is not None else read_keys(path) if path.is_file() else {}
        except ConfigError as error:
            log.warning("%s", error)
            keys = {}
        if keys.keys() == _NAMES.keys():
            return cls._new(config, kept, keys, path)
        log.warning("the keys are lost; new ones are in %s", path)
        return cls.create(config, kept, folder)

    @classmethod
    def in_memory(cls, config: Config) -> Tokens | None:
        """Keys that ``config`` asks for and no file shows, see `keys`; or those of ``token_file``.

        Returns:
            None if no call needs a key.

        Raises:
            ConfigError: ``token_file`` cannot be used; names the fix.
        """
        if config.token_file:
            return cls._provided_by(config)
        if not guarded_scopes(config):
            return None
        tokens = cls._new(config, None, {}, None)
        tokens._keys = {scope: tokens._make(scope) for scope in _NAMES}
        return tokens

    @classmethod
    def _new(cls, config: Config, kept: Kept | None, keys: Keys, file: Path | None) -> Tokens:
        return cls(
            keys, guarded_scopes(config), lifetime_s=config.token_expiration_min * 60,
            is_strict=config.compat == "strict", file=file, kept=kept,
        )  # fmt: skip

    @classmethod
    def _provided_by(cls, config: Config) -> Tokens:
        place = config.origin.get("token_file", "token_file")
        if config.disable_token_authorization is True:
            raise ConfigError(f"{place} names a file of keys, but tokens are switched off; leave out one of the two")
        path = Path(config.token_file).expanduser().absolute()
        keys = read_keys(path)
        missing = guarded_scopes(config) - keys.keys()
        if missing:
            raise ConfigError(f"{path} ({place}) has no key for {' and '.join(sorted(missing))}, which needs one here")
        return cls(
            keys, frozenset(keys.keys() & {"management", "inference"}), lifetime_s=0,
            is_strict=config.compat == "strict", provided=path,
        )  # fmt: skip

    @property
    def file(self) -> Path:
        """Where the keys can be read."""
        path = self._provided or self._file
        assert path is not None
        return path

    @property
    def keys(self) -> dict[Scope, str]:
        """What callers send behind ``Bearer``, by scope, as it is now."""
        return {scope: key.text for scope, key in self._keys.items()}

    def digest(self, scope: Scope) -> tuple[str, float | None] | None:
        """SHA-256 of the key of ``scope`` in hex, and when it expires, s since the epoch; None if there is no key."""
        key = self._keys.get(scope)
        return None if key is None else (hashlib.sha256(key.text.encode()).hexdigest(), key.expires_at)

    def guards(self, scope: Scope) -> bool:
        """Whether calls of ``scope`` need a key."""
        return scope == "api" or scope in self._guarded

    def check(self, scope: Scope, authorization: str) -> None:
        """Returns if a call of ``scope`` with this ``Authorization`` header may be made.

        Raises:
            TokenError: it may not; ``detail`` says why.
        """
        if self.guards(scope):
            self._check(scope, authorization, TokenError.AUTHORIZATION)

    def passes_until(self, scope: Scope, authorization: str) -> float | None:
        """Until when calls of ``scope`` with this ``Authorization`` header may be made, unless the key is replaced.

        Returns:
            s since the epoch, or infinity; None if they may not.
        """
        key = self._keys.get(scope)
        try:
            self.check(scope, authorization)
        except TokenError:
            return None
        return math.inf if key is None or key.expires_at is None else key.expires_at

    def check_rotation(self, authorization: str) -> None:
        """As ``check`` of the scope ``api``, with the text that TorchServe has for it.

        Raises:
            TokenError: the caller may not change keys.
        """
        self._check("api", authorization, TokenError.AUTHENTICATION)

    def _check(self, scope: Scope, authorization: str, message: str) -> None:
        given = _BEARER.fullmatch(authorization.strip())
        if given is None:
            raise self._refusal(message, scope, "malformed" if authorization else "missing")
        key = self._keys.get(scope)
        if key is None or not _same(key.text, given[1]):
            is_other = any(_same(other.text, given[1]) for other in self._keys.values())
            raise self._refusal(message, scope, "of another scope" if is_other else "wrong")
        if key.expires_at is not None and self._clock() >= key.expires_at:
            raise self._refusal(message, scope, "expired")

    def _refusal(self, message: str, scope: Scope, reason: str) -> TokenError:
        detail = {"reason": f"token {reason}", "needed": f"Authorization: Bearer <the {_NAMES[scope]} key>"}
        if scope != "api" and self._provided is None:
            detail["renew"] = f"/token?type={scope} with the API key"
        return TokenError(message, detail=detail, is_strict=self._is_strict)

    def rotate(self, scope: str) -> None:
        """Replaces the key of ``scope``; the old one is refused from now on. Touches the disk.

        Raises:
            TokenError: ``scope`` has no key that can be replaced.
            BadRequestError: the keys are somebody else's.
            ServerError: the new key cannot be written; the old one stays.
        """
        if scope not in ("management", "inference"):
            detail = {"parameter": "type", "allowed": ["management", "inference"]}
            raise TokenError(TokenError.AUTHENTICATION, detail=detail, is_strict=True)
        if self._provided is not None:
            raise BadRequestError("The keys come from token_file; change them there, it is read again within seconds.")
        with self._change:
            keys: Keys = {**self._keys, scope: self._make(scope)}  # type: ignore[dict-item]
            try:
                self._write(keys)
            except OSError as error:
                log.error("the keys cannot be written to %s: %s", self.file, cause_of(error))
                raise ServerError(f"The new key cannot be written ({cause_of(error)}); the old one stays.") from None
            self._keys = keys
        self.on_change()
        log.info("the %s key was replaced", scope)

    @property
    def guarded(self) -> list[str]:
        """The scopes that need a key, sorted."""
        return sorted(self._guarded)

    @property
    def can_be_guessed(self) -> bool:
        """Whether a key is too short."""
        return any(len(key.text) < KEY_LENGTH_SAFE for key in self._keys.values())

    def reload(self) -> None:
        """Reads a ``token_file`` again.

        Raises:
            ConfigError: it cannot be used; the keys stay as they are.
        """
        if self._provided is not None:
            keys = read_keys(self._provided)
            missing = self._guarded - keys.keys()
            if missing:
                raise ConfigError(f"{self._provided} has no key for {' and '.join(sorted(missing))} any more")
            self._keys = keys
            self.on_change()

    def discard(self) -> None:
        """Removes the file that ``create`` wrote, unless it holds another server's keys by now."""
        if self._file is None:
            return
        with contextlib.suppress(OSError, ConfigError, KeyError):
            if self._file.is_file() and read_keys(self._file)["api"] == self._keys["api"]:
                self._file.unlink()

    def _make(self, scope: str) -> Key:
        text = secrets.token_urlsafe(KEY_SIZE)
        return Key(text, None if scope == "api" else self._clock() + self._lifetime_s)

    def _write(self, keys: Keys) -> None:
        """Into the file, in one step, and where the next server finds them; both or neither. Not those in memory."""
        if self._file is None:
            return
        assert self._kept is not None
        members: JsonObject = {}
        for scope, name in _NAMES.items():
            key = keys[scope]
            members[name] = {"key": key.text}
            if key.expires_at is not None:
                members[name][_EXPIRY] = _instant(key.expires_at)
        content = (json.dumps(members, indent=2) + "\n").encode()
        draft = self._file.with_name(f".{self._file.name}.{secrets.token_hex(8)}")
        before = self._kept.get(_COPY)
        try:
            fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with open(fd, "wb") as file:
                file.write(content)
            self._kept.put(_COPY, content)
            try:
                os.replace(draft, self._file)
            except OSError:
                self._kept.put(_COPY, before or b"")
                raise
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()


def notes_of(config: Config, tokens: Tokens | None) -> list[tuple[str, str]]:
    """What the user should know at start: (``warning`` or ``note``, one line). Shows no key."""
    notes = []
    if tokens is not None:
        scopes = " and ".join(tokens.guarded)
        notes.append(("note", f"{scopes} calls need 'Authorization: Bearer KEY'; the keys are in {tokens.file}"))
        if tokens.can_be_guessed:
            notes.append(("warning", f"{tokens.file}: a key of fewer than {KEY_LENGTH_SAFE} characters can be guessed"))
    if not config.management_is_local and (tokens is None or not tokens.guards("management")):
        notes.append(("warning", "management is not on loopback and needs no key: who reaches it can change models"))
    return notes


def read_keys(path: Path) -> Keys:
    """The keys in a file: as ``key_file.json`` has them, or one line that is the key of both APIs.

    Raises:
        ConfigError: it cannot be read, or holds no keys.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_SIZE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"the file of keys {path} cannot be read: {error.strerror}") from None
    return _parsed(content, path)


def _parsed(content: bytes, path: Path) -> Keys:
    """``path`` is where it was read, for messages."""
    if len(content) > FILE_SIZE_MAX:
        raise ConfigError(f"the file of keys {path} is larger than {FILE_SIZE_MAX} bytes")
    text = content.decode("utf-8", "replace").strip()
    if not text.startswith("{"):
        key = Key(_checked(text, path), None)
        return {"management": key, "inference": key}
    try:
        members = json.loads(text)
        keys: Keys = {}
        for scope, name in _NAMES.items():
            if name in members:
                expiry = members[name].get(_EXPIRY)
                keys[scope] = Key(_checked(members[name]["key"], path), None if expiry is None else _seconds(expiry))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ConfigError(_unusable(path)) from None
    if not keys:
        raise ConfigError(_unusable(path))
    return keys


def _checked(key: object, path: Path) -> str:
    if not isinstance(key, str) or len(key) > KEY_LENGTH_MAX or not _KEY.fullmatch(key):
        raise ConfigError(_unusable(path))
    return key


def _unusable(path: Path) -> str:
    return (
        f"the file of keys {path} is to hold one line of up to {KEY_LENGTH_MAX} visible characters, which is the key, "
        'or {"management": {"key": "..."}, "inference": {"key": "..."}}'
    )


def _same(key: str, given: str) -> bool:
    return hmac.compare_digest(key.encode(), given.encode("utf-8", "surrogateescape"))


def _instant(seconds: float) -> str:
    """As Java prints it: ``2026-01-31T12:00:00.123456Z``."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _seconds(instant: str) -> float:
    """The inverse of `_instant`; fractions of a microsecond are dropped."""
    text = re.sub(r"(\.\d{6})\d+", r"\1", instant).replace("Z", "+00:00")
    parsed = datetime.fromisoformat(text)
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=timezone.utc)).timestamp()
