"""Where key and certificate come from, and what is said when they are of no use."""

from __future__ import annotations

import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.errors import ConfigError
from pyserve.security import tls
from pyserve.security.renewal import Watched, watched
from tests.support import certificates
from tests.support.certificates import Pair

TLS = Address("127.0.0.1", 8443, is_tls=True)


def config_for(pair: Pair | None = None, **settings: Any) -> Config:
    files = {} if pair is None else {"private_key_file": str(pair.key), "certificate_file": str(pair.certificate)}
    config = Config(inference_address=TLS, **files, **settings)
    config.origin = dict.fromkeys(("private_key_file", "certificate_file", "keystore"), "config.properties:7")
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return certificates.self_signed(folder)


def served_certificate(context: ssl.SSLContext, ca: bytes) -> dict[str, Any]:
    """What a client that trusts ``ca`` is shown for localhost."""
    client = ssl.create_default_context(cadata=ca.decode())
    told = tls._handshake(context, client, "localhost")
    assert told, "no handshake"
    return told


@pytest.mark.parametrize("form", ["as made", "pkcs1", "ec chain", "pkcs12", "key and certificate in one file"])
def test_key_and_certificate_in_every_form_make_a_context(folder: Path, pair: Pair, form: str) -> None:
    ca = pair.certificate
    if form == "pkcs1":
        certificates.openssl("rsa", "-in", pair.key, "-traditional", "-out", folder / "pkcs1.key")
        config = config_for(Pair(folder / "pkcs1.key", pair.certificate))
    elif form == "ec chain":
        leaf, ca = certificates.signed_by_authority(folder)
        config = config_for(leaf)
    elif form == "pkcs12":
        store = certificates.keystore(pair, "changeit", folder / "server.p12")
        config = config_for(keystore=str(store))
    elif form.startswith("key and"):
        both = folder / "both.pem"
        both.write_bytes(pair.key.read_bytes() + pair.certificate.read_bytes())
        config = config_for(Pair(both, both))
    else:
        config = config_for(pair)
    context = tls.server_context(config)
    assert ("DNS", "localhost") in served_certificate(context, ca.read_bytes())["subjectAltName"]
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    key, chain = tls.key_and_chain_pem(config)
    assert b"PRIVATE KEY" in key and b"ENCRYPTED" not in key
    assert chain.count(b"BEGIN CERTIFICATE") == (2 if form == "ec chain" else 1)


def _encrypted(folder: Path, pair: Pair) -> Config:
    key = folder / "encrypted.key"
    certificates.openssl("pkey", "-in", pair.key, "-aes256", "-passout", "pass:secret", "-out", key)
    return config_for(Pair(key, pair.certificate))


def _der(folder: Path, pair: Pair) -> Config:
    key = folder / "der.key"
    certificates.openssl("pkey", "-in", pair.key, "-outform", "DER", "-out", key)
    return config_for(Pair(key, pair.certificate))


def _mismatch(folder: Path, pair: Pair) -> Config:
    return config_for(Pair(certificates.self_signed(folder, "other").key, pair.certificate))


def _leaf_last(folder: Path, pair: Pair) -> Config:
    leaf, authority = certificates.signed_by_authority(folder)
    chain = folder / "backwards.pem"
    chain.write_bytes(authority.read_bytes() + leaf.certificate.read_bytes())
    return config_for(Pair(leaf.key, chain))


def _garbage(folder: Path, pair: Pair) -> Config:
    broken = folder / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    return config_for(Pair(pair.key, broken))


def _jks(folder: Path, pair: Pair) -> Config:
    store = folder / "keystore.jks"
    store.write_bytes(b"\xfe\xed\xfe\xed\0\0\0\2")
    return config_for(keystore=str(store), keystore_type="JKS")


def _wrong_password(folder: Path, pair: Pair) -> Config:
    store = certificates.keystore(pair, "sesame", folder / "sesame.p12")
    return config_for(keystore=str(store), keystore_pass="changeit")


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda folder, pair: config_for(Pair(folder / "none.key", pair.certificate)),
         "private_key_file (config.properties:7): {folder}/none.key cannot be read: No such file"),
        (lambda folder, pair: config_for(Pair(pair.certificate, pair.certificate)), "holds no PEM private key"),
        (lambda folder, pair: config_for(Pair(pair.key, pair.key)), "holds no PEM certificate"),
        (lambda folder, pair: config_for(private_key_file=str(pair.key)), "is set without certificate_file"),
        (lambda folder, pair: config_for(certificate_file=str(pair.certificate)), "is set without private_key_file"),
        (lambda folder, pair: config_for(Pair(folder, pair.certificate)), "cannot be read: Is a directory"),
        (_encrypted, "is encrypted; decrypt it with `openssl pkey -in {folder}/encrypted.key -out key.pem`"),
        (_der, "`openssl pkey -inform DER"),
        (_mismatch, "key and certificate do not belong together"),
        (_leaf_last, "the server's own certificate comes first"),
        (_garbage, "key or certificate cannot be used"),
        (lambda folder, pair: config_for(certificates.dated(folder, "old", "20200101000000Z", "20210101000000Z")),
         "the certificate has expired"),
        (lambda folder, pair: config_for(certificates.dated(folder, "new", "20480101000000Z", "20490101000000Z")),
         "the certificate is not valid yet"),
        (_jks, "is a Java keystore (JKS); convert it with `keytool -importkeystore -srckeystore {folder}/keystore.jks"),
        (_wrong_password, "keystore_pass is not its password"),
        (lambda folder, pair: config_for(keystore=str(pair.key)), "no PKCS12 file"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named_before_a_port_opens(
    folder: Path, pair: Pair, made: Callable[[Path, Pair], Config], said: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        tls.prepare(made(folder, pair), folder)
    assert said.format(folder=folder) in str(raised.value)
    assert "PRIVATE KEY-----" not in str(raised.value)


def test_pkcs12_without_cryptography_says_what_to_install(
    folder: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = certificates.keystore(pair, "changeit", folder / "nocrypto.p12")
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.serialization", None)
    with pytest.raises(ConfigError, match=r"pip install cryptography"):
        tls.prepare(config_for(keystore=str(store)), folder)


def test_without_a_certificate_one_is_made_and_said_loudly(tmp_path: Path) -> None:
    config = config_for()
    notes = tls.prepare(config, tmp_path)
    assert [kind for kind, _ in notes] == ["warning", "note"]
    assert "curl needs -k" in notes[0][1] and "127.0.0.1" in notes[1][1]
    assert (tmp_path / "key.pem").stat().st_mode & 0o077 == 0
    certificate = (tmp_path / "certificate.pem").read_bytes()
    assert ("DNS", "localhost") in served_certificate(tls.server_context(config), certificate)["subjectAltName"]
    again = Config.from_json(config.to_json())  # the server that is started again has the same one
    assert tls.key_and_chain_pem(again) == tls.key_and_chain_pem(config)


def test_certificate_that_a_cleaner_took_is_made_again(tmp_path: Path) -> None:
    config = config_for()
    tls.prepare(config, tmp_path)
    first = (tmp_path / "certificate.pem").read_bytes()
    tls.restore(config)
    assert (tmp_path / "certificate.pem").read_bytes() == first
    (tmp_path / "key.pem").unlink()
    tls.restore(config)
    assert served_certificate(tls.server_context(config), (tmp_path / "certificate.pem").read_bytes())
    tls.restore(Config())  # has none


def test_no_openssl_is_said_with_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"openssl cannot make one .*; give a certificate by private_key_file"):
        tls.prepare(config_for(), tmp_path)


def test_nothing_is_made_or_read_where_no_port_speaks_tls(tmp_path: Path) -> None:
    config = Config(private_key_file=str(tmp_path / "none"))
    assert tls.prepare(config, tmp_path) == [] and not list(tmp_path.iterdir())
    assert tls.prepare(Config(enable_grpc_ssl=True), tmp_path)


@pytest.mark.parametrize(
    ("listening", "host", "url", "trusted"),
    [
        ("127.0.0.1", "localhost", "https://127.0.0.1:8443", True),
        ("0.0.0.0", "localhost", "https://127.0.0.1:8443", True),
        ("models.example", "models.example", "https://models.example:8443", True),
        ("models.example", "localhost", "https://models.example:8443", False),
        ("10.1.2.3", "localhost", "https://10.1.2.3:8443", False),
        ("::1", "localhost", "https://localhost:8443", True),
        ("::", "models.example", "https://[::1]:8443", False),
    ],
)
def test_curl_is_told_how_to_trust_the_server(
    tmp_path: Path, listening: str, host: str, url: str, trusted: bool
) -> None:
    pair = certificates.self_signed(tmp_path, host=host)
    told = tls.curl_target(config_for(pair), Address(listening, 8443, is_tls=True))
    assert told == (url, f"--cacert {pair.certificate}" if trusted else "-k")


def test_certificate_that_ends_soon_is_warned_of(tmp_path: Path) -> None:
    soon = time.strftime("%Y%m%d%H%M%SZ", time.gmtime(time.time() + 86_400))
    [(kind, text)] = tls.prepare(config_for(certificates.dated(tmp_path, "soon", "20200101000000Z", soon)), tmp_path)
    assert kind == "warning" and "valid until" in text


def test_renewed_certificate_is_taken_on_and_a_broken_one_is_not(tmp_path: Path) -> None:
    pair = certificates.self_signed(tmp_path)
    config = config_for(pair)
    context = tls.server_context(config)
    [watch] = watched(config, context, None)
    first = pair.certificate.read_bytes()

    other = certificates.self_signed(tmp_path, "other")
    pair.key.write_bytes(other.key.read_bytes())  # the certificate has not arrived yet
    watch.look()
    assert served_certificate(context, first)
    pair.certificate.write_bytes(other.certificate.read_bytes())
    watch.look()
    assert served_certificate(context, other.certificate.read_bytes())
    with pytest.raises(ssl.SSLCertVerificationError):
        served_certificate(context, first)


def test_files_are_read_again_only_when_they_changed(tmp_path: Path) -> None:
    calls: list[int] = []
    file = tmp_path / "file"
    file.write_text("1")
    watch = Watched([file], lambda: calls.append(1))
    watch.look()
    assert not calls
    (tmp_path / "new").write_text("2")
    (tmp_path / "new").rename(file)
    watch.look()
    watch.look()
    assert calls == [1]
    file.unlink()
    watch.look()
    assert calls == [1, 1]
