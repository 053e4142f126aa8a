"""Who has to show a key, which keys are taken, how they change, and where they are kept."""

from __future__ import annotations

import json
import os
import stat
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.errors import BadRequestError, ConfigError, ServerError, TokenError
from pyserve.security.tokens import KEY_FILE, Scope, Tokens, guarded_scopes, key_file, notes_of, read_keys

ELSEWHERE = Address("0.0.0.0", 8081)
MESSAGE = "Token Authorization failed. Token either incorrect, expired, or not provided correctly"


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Kept:
    """What the supervisor keeps."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.get = self.files.get

    def put(self, name: str, content: bytes) -> str:
        self.files[name] = content
        return ""


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Kept, Path]:
    """What the supervisor keeps, and the folder it was started in."""
    (tmp_path / "here").mkdir()
    return Kept(), tmp_path / "here"


def made(folders: tuple[Kept, Path], **settings: Any) -> Tokens:
    tokens = Tokens.create(Config(**{"management_address": ELSEWHERE, **settings}), *folders)
    assert tokens is not None
    return tokens


def file_of(folders: tuple[Kept, Path]) -> dict[str, dict[str, str]]:
    members: dict[str, dict[str, str]] = json.loads((folders[1] / KEY_FILE).read_text())
    return members


def reason(tokens: Tokens, scope: Scope, authorization: str) -> str:
    """Why the call is refused; ``""`` if it is not."""
    try:
        tokens.check(scope, authorization)
    except TokenError as error:
        assert (error.message, error.type) == (MESSAGE, "InvalidKeyException")
        return str(error.detail["reason"])
    return ""


@pytest.mark.parametrize(
    ("settings", "guarded"),
    [
        ({}, set()),
        ({"inference_address": ELSEWHERE}, set()),
        ({"management_address": ELSEWHERE}, {"management"}),
        ({"management_address": Address("10.1.2.3", 8081)}, {"management"}),
        ({"management_address": Address("models.example", 8081)}, {"management"}),
        ({"management_address": Address("::1", 8081)}, set()),
        ({"management_address": Address(path="/run/x.sock")}, set()),
        ({"grpc_management_address": "0.0.0.0"}, {"management"}),
        ({"grpc_management_address": "0.0.0.0", "enable_grpc": "false"}, set()),
        ({"management_address": ELSEWHERE, "disable_token_authorization": True}, set()),
        ({"disable_token_authorization": False}, {"management", "inference"}),
        ({"compat": "strict"}, {"management", "inference"}),
        ({"compat": "strict", "disable_token_authorization": True}, set()),
    ],
)
def test_who_needs_a_key(folders: tuple[Kept, Path], settings: dict[str, Any], guarded: set[str]) -> None:
    config = Config(**settings)
    assert guarded_scopes(config) == guarded
    tokens = Tokens.create(config, *folders)
    assert (tokens is None) == (not guarded) == (not (folders[1] / KEY_FILE).exists())
    assert key_file(config, folders[1]) == (folders[1] / KEY_FILE if guarded else None)
    if tokens is not None:
        assert {scope for scope in ("management", "inference") if tokens.guards(scope)} == guarded  # type: ignore[arg-type]
        assert reason(tokens, "inference", "") == ("token missing" if "inference" in guarded else "")


def test_file_is_torchserves_and_for_its_owner_only(folders: tuple[Kept, Path]) -> None:
    tokens = made(folders)
    path = folders[1] / KEY_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    members = file_of(folders)
    assert {name: list(member) for name, member in members.items()} == {
        "management": ["key", "expiration time"], "inference": ["key", "expiration time"], "API": ["key"],
    }  # fmt: skip
    assert len({member["key"] for member in members.values()}) == 3
    assert all(len(member["key"]) == 43 for member in members.values())  # 256 bits as URL-safe base64
    expiry = datetime.fromisoformat(members["inference"]["expiration time"].replace("Z", "+00:00"))
    assert 3590 < (expiry - datetime.now(timezone.utc)).total_seconds() <= 3600
    assert sorted(os.listdir(folders[1])) == [KEY_FILE]
    assert all(member["key"] not in f"{vars(tokens)} {notes_of(Config(), tokens)}" for member in members.values())


def test_each_scope_takes_its_own_key_only(folders: tuple[Kept, Path]) -> None:
    tokens = made(folders, compat="default", disable_token_authorization=False)
    keys = {name: member["key"] for name, member in file_of(folders).items()}
    assert reason(tokens, "management", f"Bearer {keys['management']}") == ""
    assert reason(tokens, "management", f"bearer  {keys['management']} ") == ""
    assert reason(tokens, "inference", f"Bearer {keys['inference']}") == ""
    for wrong, why in [
        ("", "token missing"), (keys["management"], "token malformed"),
        (f"Basic {keys['management']}", "token malformed"),
        (f"Bearer {keys['management']} x", "token malformed"), ("Bearer", "token malformed"),
        (f"Bearer {keys['inference']}", "token of another scope"), (f"Bearer {keys['API']}", "token of another scope"),
        (f"Bearer {keys['management'][:-1]}", "token wrong"), ("Bearer \u00e4\udcff", "token wrong"),
        (f"Bearer {'x' * 100_000}", "token wrong"),
    ]:  # fmt: skip
        assert reason(tokens, "management", wrong) == why
    with pytest.raises(TokenError, match="Token Authentication failed"):
        tokens.check_rotation(f"Bearer {keys['management']}")
    tokens.check_rotation(f"Bearer {keys['API']}")


@pytest.mark.parametrize(
    ("compat", "status", "headers"), [("default", 401, {"WWW-Authenticate": "Bearer"}), ("strict", 400, {})]
)
def test_refusal_is_401_and_400_in_strict_mode(
    folders: tuple[Kept, Path], compat: str, status: int, headers: dict[str, str]
) -> None:
    with pytest.raises(TokenError) as raised:
        made(folders, compat=compat).check("management", "")
    assert (raised.value.status, raised.value.headers) == (status, headers)


def test_key_expires_and_a_new_one_replaces_it_at_once(folders: tuple[Kept, Path]) -> None:
    tokens, clock = made(folders, token_expiration_min=0.5), Clock()
    tokens._clock = clock
    tokens.rotate("management")
    first = f"Bearer {file_of(folders)['management']['key']}"
    clock.now += 29
    assert reason(tokens, "management", first) == ""
    clock.now += 1
    assert reason(tokens, "management", first) == "token expired"
    before = file_of(folders)
    tokens.rotate("management")
    after = file_of(folders)
    assert reason(tokens, "management", first) == "token wrong"
    assert reason(tokens, "management", f"Bearer {after['management']['key']}") == ""
    assert (after["API"], after["inference"]) == (before["API"], before["inference"])
    clock.now += 10**9
    tokens.check_rotation(f"Bearer {after['API']['key']}")  # never expires


@pytest.mark.parametrize("scope", ["", "api", "API", "Management", "all"])
def test_only_the_two_keys_that_expire_can_be_replaced(folders: tuple[Kept, Path], scope: str) -> None:
    tokens = made(folders)
    before = file_of(folders)
    with pytest.raises(TokenError, match="Token Authentication failed") as raised:
        tokens.rotate(scope)
    assert raised.value.status == 400
    assert file_of(folders) == before


def test_key_that_cannot_be_written_leaves_the_old_one(
    folders: tuple[Kept, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = made(folders)
    before = file_of(folders)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ServerError, match="No space left on device"):
        tokens.rotate("management")
    assert reason(tokens, "management", f"Bearer {before['management']['key']}") == ""
    assert file_of(folders) == before and sorted(os.listdir(folders[1])) == [KEY_FILE]
    next_one = Tokens.open(Config(management_address=ELSEWHERE), *folders)
    assert next_one is not None and reason(next_one, "management", f"Bearer {before['management']['key']}") == ""


def test_folder_that_cannot_be_written_is_said_with_three_mends(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        made((Kept(), tmp_path / "read-only/none"))
    for fix in ("a folder that can be written", "--token-file", "--disable-token-auth"):
        assert fix in str(raised.value)


def test_next_server_takes_over_the_keys_even_if_the_file_is_gone(folders: tuple[Kept, Path]) -> None:
    made(folders).rotate("management")
    key = f"Bearer {file_of(folders)['management']['key']}"
    (folders[1] / KEY_FILE).unlink()
    tokens = Tokens.open(Config(management_address=ELSEWHERE), *folders)
    assert tokens is not None
    assert reason(tokens, "management", key) == ""
    assert reason(tokens, "management", key + "x") == "token wrong"


def test_keys_that_were_not_kept_are_read_from_the_file_or_made_again(folders: tuple[Kept, Path]) -> None:
    config = Config(management_address=ELSEWHERE)
    made(folders)
    key = f"Bearer {file_of(folders)['management']['key']}"
    folders[0].files.clear()
    tokens = Tokens.open(config, *folders)
    assert tokens is not None and reason(tokens, "management", key) == ""
    (folders[1] / KEY_FILE).write_text('{"management": {"key": "half-of-it"}}')
    tokens = Tokens.open(config, *folders)
    assert tokens is not None and reason(tokens, "management", key) == "token wrong"
    assert reason(tokens, "management", f"Bearer {file_of(folders)['management']['key']}") == ""


def test_file_is_removed_at_the_end_unless_it_is_another_servers(folders: tuple[Kept, Path], tmp_path: Path) -> None:
    first = made(folders)
    second = made((Kept(), folders[1]))
    first.discard()
    assert (folders[1] / KEY_FILE).exists()
    second.rotate("inference")
    second.discard()
    assert not (folders[1] / KEY_FILE).exists()


def provided(folder: Path, text: str, **settings: Any) -> Tokens:
    (folder / "keys").write_text(text)
    tokens = Tokens.create(Config(token_file=str(folder / "keys"), **settings), Kept(), folder)
    assert tokens is not None
    return tokens


def test_keys_of_somebody_else_are_used_and_never_written(tmp_path: Path) -> None:
    tokens = provided(tmp_path, "a-key-from-elsewhere\n")
    for scope in ("management", "inference"):
        assert tokens.guards(scope)  # type: ignore[arg-type]
        assert reason(tokens, scope, "Bearer a-key-from-elsewhere") == ""  # type: ignore[arg-type]
        assert reason(tokens, scope, "Bearer other") == "token wrong"  # type: ignore[arg-type]
    with pytest.raises(BadRequestError, match="come from token_file"):
        tokens.rotate("management")
    tokens.discard()
    assert sorted(os.listdir(tmp_path)) == ["keys"]

    tokens = provided(tmp_path, '{"inference": {"key": "only-for-predictions"}}')
    assert (tokens.guards("inference"), tokens.guards("management")) == (True, False)

    old = {"key": "a-key-of-some-length", "expiration time": "2020-01-01T00:00:00.123456789Z"}
    tokens = provided(tmp_path, json.dumps({"management": old}))
    assert reason(tokens, "management", "Bearer a-key-of-some-length") == "token expired"


def test_keys_of_somebody_else_are_read_again(tmp_path: Path) -> None:
    tokens = provided(tmp_path, "the-first-of-the-keys")
    (tmp_path / "keys").write_text("the-second-of-the-keys")
    tokens.reload()
    assert reason(tokens, "inference", "Bearer the-first-of-the-keys") == "token wrong"
    for broken in ('{"management": {"key": "k"}}', "", "two words"):
        (tmp_path / "keys").write_text(broken)
        with pytest.raises(ConfigError):
            tokens.reload()
    assert reason(tokens, "inference", "Bearer the-second-of-the-keys") == ""


@pytest.mark.parametrize(
    "text", ["", "two words", "\u00e4", "x" * 5000, "{", "{}", '{"management": 1}', '{"management": {}}',
             '{"management": {"key": ""}}', '{"management": {"key": 1}}', '{"management": {"key": "k e y"}}',
             '{"management": {"key": "k", "expiration time": "soon"}}', '{"a":' * 2000, "x" * 70_000],
)  # fmt: skip
def test_file_without_keys_is_refused_and_not_quoted(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_keys(tmp_path / "keys")
    assert str(tmp_path / "keys") in str(raised.value)
    assert len(text) < 3 or text not in str(raised.value)


def test_token_file_has_to_fit_what_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Tokens.create(Config(token_file=str(tmp_path / "none")), Kept(), tmp_path)
    with pytest.raises(ConfigError, match="tokens are switched off; leave out one"):
        provided(tmp_path, "a-key-from-elsewhere", disable_token_authorization=True)
    with pytest.raises(ConfigError, match="has no key for management"):
        provided(tmp_path, '{"inference": {"key": "k"}}', management_address=ELSEWHERE)


def test_what_is_said_at_start(folders: tuple[Kept, Path], tmp_path: Path) -> None:
    elsewhere = Config(management_address=ELSEWHERE)
    [(kind, text)] = notes_of(elsewhere, Tokens.create(elsewhere, *folders))
    assert kind == "note" and str(folders[1] / KEY_FILE) in text and "management calls" in text
    assert [kind for kind, _ in notes_of(elsewhere, None)] == ["warning"]  # --disable-token-auth
    assert notes_of(Config(), None) == []
    assert "can be guessed" in notes_of(Config(), provided(tmp_path, "short"))[1][1]
