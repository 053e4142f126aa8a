"""TLS: where key and certificate come from, what is wrong with them, and the context that servers use.

In this order: ``keystore``, a PKCS12 file; ``private_key_file`` with ``certificate_file``, PEM; neither, and the
supervisor makes a certificate that nobody has signed, which servers find in ``Config.self_signed_dir``.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import socket
import ssl
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.errors import ConfigError

FILE_SIZE_MAX = 1 << 20
SELF_SIGNED_DAYS = 825
EXPIRES_SOON_DAYS = 14
OPENSSL_TIMEOUT_S = 30
WILDCARDS = ("0.0.0.0", "::")
_KEY_FILE, _CERTIFICATE_FILE = "key.pem", "certificate.pem"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_PEM_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----")
_PEM_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_JKS_MAGIC = (b"\xfe\xed\xfe\xed", b"\xce\xce\xce\xce")
# X509_V_ERR_...
_NOT_YET_VALID, _EXPIRED = 9, 10
# Of TLS 1.2: forward secrecy and authenticated encryption, as all of TLS 1.3 have. Python's own choice has those with
# CBC too, which are open to padding oracles wherever an implementation is careless.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20:!aNULL:!aDSS:!PSK:!SRP"
# What OpenSSL's security level keeps out, by its reason.
_WEAKNESSES = {
    "EE_KEY_TOO_SMALL": "its key is short: RSA needs 2048 bits",
    "CA_KEY_TOO_SMALL": "a certificate that signed it has a short key: RSA needs 2048 bits",
    "CA_MD_TOO_WEAK": "it is signed with SHA-1 or MD5, where SHA-256 is needed",
}


@dataclass(frozen=True)
class Certificate:
    """What a certificate says of itself.

    Attributes:
        names: hosts and IP addresses it is for.
        not_after: its last moment, as in ``Jan 31 12:00:00 2027 GMT``.
        weakness: why OpenSSL takes it only below its usual security level; ``""`` if it does not.
    """

    names: tuple[str, ...]
    not_after: str
    weakness: str = ""


def is_wanted(config: Config) -> bool:
    """Whether any port speaks TLS."""
    return config.enable_grpc_ssl or any(address.is_tls for address in config.addresses().values())


def prepare(config: Config, folder: Path | None) -> list[tuple[str, str]]:
    """Before the ports open: makes a certificate in ``folder`` if none is given, and tries the one there is.

    Returns:
        What the user should know: (``warning`` or ``note``, one line).

    Raises:
        ConfigError: key or certificate cannot be used; names the file and the fix.
    """
    if not is_wanted(config):
        return []
    said = []
    if not has_certificate(config):
        if folder is None:
            raise ConfigError("no certificate is given, and there is no folder to make one in; name one with state_dir")
        config.self_signed_dir = str(folder)
        _make_for(config, folder)
        said.append(
            (
                "warning",
                "TLS with a certificate that was made just now and that no client can check (curl needs -k); "
                "give one by private_key_file and certificate_file, or by keystore",
            )
        )
    return [*said, examine(config)]


def made_files(config: Config) -> dict[str, bytes]:
    """What `prepare` made, by the names of the files; empty if it made nothing."""
    if not config.self_signed_dir:
        return {}
    return {name: (Path(config.self_signed_dir) / name).read_bytes() for name in (_KEY_FILE, _CERTIFICATE_FILE)}


def has_certificate(config: Config) -> bool:
    """Whether one is configured, so that none has to be made."""
    return bool(config.keystore or config.private_key_file or config.certificate_file)


def examine(config: Config) -> tuple[str, str]:
    """Tries key and certificate.

    Returns:
        ``note``, or ``warning`` if it is weak, or valid for a short time only; and a line that says what it is.

    Raises:
        ConfigError: they cannot be used.
    """
    certificate = inspect(*key_and_chain_pem(config), sources(config))
    days_left = (ssl.cert_time_to_seconds(certificate.not_after) - time.time()) / 86_400
    names = ", ".join(certificate.names) or "no name"
    kind = "note" if days_left > EXPIRES_SOON_DAYS and not certificate.weakness else "warning"
    weakness = f"; {certificate.weakness}" if certificate.weakness else ""
    return kind, f"TLS: a certificate for {names}, valid until {certificate.not_after}{weakness}"


def restore(config: Config) -> None:
    """Makes the certificate of `prepare` again if it was removed with other temporary files.

    Raises:
        ConfigError: it cannot be made.
    """
    folder = Path(config.self_signed_dir)
    if config.self_signed_dir and not all((folder / name).exists() for name in (_KEY_FILE, _CERTIFICATE_FILE)):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_for(config, folder)


def server_context(config: Config) -> ssl.SSLContext:
    """TLS 1.2 and later, with the configured key and certificate.

    Raises:
        ConfigError: they cannot be used.
    """
    context = _bare_context()
    load(context, *key_and_chain_pem(config), sources(config))
    return context


def renew(context: ssl.SSLContext, config: Config) -> None:
    """Has ``context`` use key and certificate as they are now; connections that are open keep what they have.

    Raises:
        ConfigError: they cannot be used; ``context`` is as it was.
    """
    key, chain = key_and_chain_pem(config)
    inspect(key, chain, sources(config))  # a context that was given halves of two pairs would be of no use any more
    load(context, key, chain, sources(config))


def files(config: Config) -> list[Path]:
    """What is read for TLS."""
    if not is_wanted(config):
        return []
    if config.keystore:
        return [_path(config.keystore)]
    if config.self_signed_dir:
        return []  # nobody changes those
    return [_path(config.private_key_file), _path(config.certificate_file)]


def key_and_chain_pem(config: Config) -> tuple[bytes, bytes]:
    """The private key, not encrypted, and the server's certificate followed by those that signed it; both as PEM.

    Raises:
        ConfigError: they cannot be read, or are not what they should be.
    """
    if config.keystore:
        return _read_keystore(_path(config.keystore), config.keystore_pass, _place(config, "keystore"))
    if config.self_signed_dir:
        folder = Path(config.self_signed_dir)
        return _read(folder / _KEY_FILE, "key"), _read(folder / _CERTIFICATE_FILE, "certificate")
    for given, other in (("private_key_file", "certificate_file"), ("certificate_file", "private_key_file")):
        if getattr(config, given) and not getattr(config, other):
            raise ConfigError(f"{_place(config, given)} is set without {other}; TLS needs both")
    if not config.private_key_file:
        raise ConfigError("TLS needs private_key_file and certificate_file, or keystore")
    key_place, chain_place = _place(config, "private_key_file"), _place(config, "certificate_file")
    key, chain = _read(_path(config.private_key_file), key_place), _read(_path(config.certificate_file), chain_place)
    if not _PEM_KEY.search(key):
        fix = "it begins like DER; `openssl pkey -inform DER -in FILE -out key.pem` converts it"
        raise ConfigError(f"{key_place}: {config.private_key_file} holds no PEM private key{_if_der(key, fix)}")
    if b"ENCRYPTED" in key:
        raise ConfigError(
            f"{key_place}: the private key in {config.private_key_file} is encrypted; "
            f"decrypt it with `openssl pkey -in {config.private_key_file} -out key.pem`"
        )
    if _PEM_CERTIFICATE not in chain:
        fix = "it begins like DER; `openssl x509 -inform DER -in FILE -out certificate.pem` converts it"
        raise ConfigError(f"{chain_place}: {config.certificate_file} holds no PEM certificate{_if_der(chain, fix)}")
    return key, chain


def sources(config: Config) -> str:
    """Where key and certificate come from, for messages."""
    if config.keystore:
        return f"{_place(config, 'keystore')}: {config.keystore}"
    if config.self_signed_dir:
        return "the certificate made at start"
    return f"{config.private_key_file} and {config.certificate_file} (private_key_file, certificate_file)"


def load(context: ssl.SSLContext, key: bytes, chain: bytes, source: str) -> str:
    """Gives ``context`` a key and its certificates, at the highest security level of OpenSSL that takes them.

    Returns:
        Why that is below the usual one; ``""`` if it is not.

    Raises:
        ConfigError: OpenSSL does not take them.
    """
    usual = _usual_level()
    weakness = ""
    for level in range(usual, -1, -1):
        _set_level(context, level)
        try:
            _load_pair(context, key, chain)
        except ssl.SSLError as error:
            if level == 0 or error.reason not in _WEAKNESSES:
                raise ConfigError(f"{source}: {_explained(error)}") from None
            weakness = weakness or _WEAKNESSES[error.reason]
        else:
            break
    if not weakness:
        return ""
    try:
        _handshake(context, _trusting_context())
    except ssl.SSLError:  # RSA keys of 512 bits are too short for the signatures of TLS 1.3
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return f"{weakness}; it is served at OpenSSL's security level {level}, not {usual}, and clients may refuse it"


def _load_pair(context: ssl.SSLContext, key: bytes, chain: bytes) -> None:
    fd = os.memfd_create("tls", os.MFD_CLOEXEC)  # load_cert_chain reads files only, and keys belong on no disk
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(chain + b"\n" + key)
        context.load_cert_chain(f"/proc/self/fd/{fd}", password=lambda: b"")
    finally:
        os.close(fd)


@functools.cache
def _usual_level() -> int:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).security_level


def _set_level(context: ssl.SSLContext, level: int) -> None:
    """Sets what keys and signatures ``context`` takes; its protocols and ciphers stay."""
    context.maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
    if context.security_level != level:
        # Those of TLS 1.3 are not set by this call, and not changed.
        names = [each["name"] for each in context.get_ciphers() if not each["name"].startswith("TLS_")]
        context.set_ciphers(f"{':'.join(names)}:@SECLEVEL={level}")


def inspect(key: bytes, chain: bytes, source: str) -> Certificate:
    """Tries the pair by a handshake within this process.

    Raises:
        ConfigError: it cannot be used, or not at this time.
    """
    context = _bare_context()
    weakness = load(context, key, chain, source)
    client = _client_context(chain)
    _set_level(client, context.security_level)
    try:
        told = _handshake(context, client)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in (_NOT_YET_VALID, _EXPIRED):
            when = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
            raise ConfigError(f"{source}: the certificate {when}; renew it, or set the clock") from None
        raise ConfigError(f"{source}: clients will refuse the certificate: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise ConfigError(f"{source}: {_explained(error)}") from None
    names = tuple(name for _, name in told.get("subjectAltName", ()))
    return Certificate(names, told.get("notAfter", ""), weakness)


def curl_target(config: Config, address: Address) -> tuple[str, str]:
    """The URL by which ``curl`` on this machine reaches the server, and what it needs to trust it: ``--cacert FILE``,
    quoted, or ``-k``.
    """
    hosts = [urlsplit(address.client_url).hostname or ""]
    if address.is_loopback or address.host in WILDCARDS:
        hosts.append("localhost")
    if not config.keystore:
        folder = config.self_signed_dir
        path = Path(folder, _CERTIFICATE_FILE) if folder else _path(config.certificate_file)
        for host in hosts:
            if _is_trusted(config, host):
                return str(replace(address, host=host)), f"--cacert {shlex.quote(str(path))}"
    return address.client_url, "-k"


def _is_trusted(config: Config, host: str) -> bool:
    """Whether a client that trusts the certificate file accepts it for ``host``."""
    try:
        key, chain = key_and_chain_pem(config)
        context = _bare_context()
        load(context, key, chain, "")
        _handshake(context, _client_context(chain), host)
    except (ConfigError, ssl.SSLError):
        return False
    return True


def _make_for(config: Config, folder: Path) -> None:
    hosts = [each.host for each in config.addresses().values()]
    make_self_signed(folder, [each for each in hosts if each not in ("", *WILDCARDS)])


def make_self_signed(folder: Path, hosts: list[str]) -> None:
    """Writes a key and a certificate for this machine's names and ``hosts`` into ``folder``.

    Raises:
        ConfigError: there is no openssl, or it fails.
    """
    names = dict.fromkeys(["localhost", "127.0.0.1", "::1", socket.gethostname(), *hosts])
    entries = [f"IP:{name}" if ":" in name or name.replace(".", "").isdigit() else f"DNS:{name}"
               for name in names if ":" in name or _HOST.fullmatch(name)]  # fmt: skip
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-keyout", str(folder / _KEY_FILE), "-out", str(folder / _CERTIFICATE_FILE), "-days", str(SELF_SIGNED_DAYS),
        "-subj", "/CN=pyserve", "-addext", f"subjectAltName={','.join(entries)}",
    ]  # fmt: skip
    fix = "give a certificate by private_key_file and certificate_file, or by keystore"
    try:
        made = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=OPENSSL_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"no certificate is given, and openssl cannot make one ({error}); {fix}") from None
    if made.returncode != 0:
        reason = made.stderr.strip().splitlines()[-1:]
        raise ConfigError(f"no certificate is given, and openssl cannot make one ({''.join(reason)}); {fix}")


def _bare_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _client_context(chain: bytes) -> ssl.SSLContext:
    """Trusts each certificate of ``chain`` by itself, as ``curl --cacert`` does."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    with contextlib.suppress(ssl.SSLError):  # one that cannot be read is refused by the handshake
        context.load_verify_locations(cadata=chain.decode("ascii", "ignore"))
    return context


def _trusting_context() -> ssl.SSLContext:
    """A client that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _set_level(context, 0)
    return context


def _handshake(server_side: ssl.SSLContext, client_side: ssl.SSLContext, host: str = "") -> dict[str, Any]:
    """What the server's certificate says, once the client has accepted it."""
    client_side.check_hostname = bool(host)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    client = client_side.wrap_bio(to_client, to_server, server_hostname=host or None)
    for _ in range(4):
        for each in (client, server):
            with contextlib.suppress(ssl.SSLWantReadError):
                each.do_handshake()
    return dict(client.getpeercert() or {})


def _read_keystore(path: Path, password: str, place: str) -> tuple[bytes, bytes]:
    content = _read(path, place)
    if content.startswith(_JKS_MAGIC):
        raise ConfigError(
            f"{place}: {path} is a Java keystore (JKS); convert it with `keytool -importkeystore "
            f"-srckeystore {path} -destkeystore {path.with_suffix('.p12')} -deststoretype PKCS12`"
        )
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.serialization import pkcs12
    except ImportError:
        raise ConfigError(
            f"{place}: PKCS12 files need cryptography: pip install cryptography; or convert it with "
            f"`openssl pkcs12 -in {path} -nodes -out server.pem` and name that by private_key_file and certificate_file"
        ) from None
    try:
        key, certificate, others = pkcs12.load_key_and_certificates(content, password.encode())
    except ValueError as error:
        raise ConfigError(
            f"{place}: {path} cannot be opened: it is no PKCS12 file, or keystore_pass is not its password ({error})"
        ) from None
    if key is None or certificate is None:
        what = "private key" if key is None else "certificate that belongs to its key"
        raise ConfigError(f"{place}: {path} has no {what}")
    pem = serialization.Encoding.PEM
    return (
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        b"".join(each.public_bytes(pem) for each in (certificate, *others)),
    )


def _read(path: Path, place: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(FILE_SIZE_MAX + 1)
    except OSError as error:
        raise ConfigError(f"{place}: {path} cannot be read: {error.strerror}") from None
    if len(content) > FILE_SIZE_MAX:
        raise ConfigError(f"{place}: {path} is larger than {FILE_SIZE_MAX} bytes")
    return content.removeprefix(b"\xef\xbb\xbf")  # editors of Windows begin text so; OpenSSL would see no PEM


def _explained(error: ssl.SSLError) -> str:
    match error.reason:
        case "KEY_VALUES_MISMATCH" | "KEY_TYPE_MISMATCH" | "NO_CERTIFICATE_ASSIGNED":
            return (
                "key and certificate do not belong together; in a file with a chain the server's own certificate "
                "comes first"
            )
        case reason if reason in _WEAKNESSES:
            return f"key or signature is too weak for TLS ({reason}); RSA needs 2048 bits and SHA-256"
        case _ if not error.reason:
            return "key or certificate cannot be used: OpenSSL finds no whole PEM block, or one that it cannot read"
        case _:
            return f"key or certificate cannot be used: {(error.reason or str(error)).lower().replace('_', ' ')}"


def _if_der(content: bytes, fix: str) -> str:
    return f"; {fix}" if content[:1] == b"\x30" else ""


def _place(config: Config, key: str) -> str:
    return f"{key} ({config.origin.get(key, 'default')})"


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()
