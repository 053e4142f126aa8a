"""Keys and certificates as old tools made them: served, at the highest security level that takes them, and said."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest

from pyserve.config.address import Address
from pyserve.config.config import Config
from pyserve.errors import ConfigError
from pyserve.security import tls
from pyserve.security.renewal import watched
from tests.support.certificates import Pair, keystore, openssl, self_signed

USUAL = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).security_level


def config_for(pair: Pair) -> Config:
    return Config(
        inference_address=Address("127.0.0.1", 8443, is_tls=True),
        private_key_file=str(pair.key), certificate_file=str(pair.certificate),
    )  # fmt: skip


def signed(folder: Path, *, digest: str = "sha256", authority_bits: int = 2048) -> Pair:
    """A leaf with the authority that signed it behind it."""
    authority = self_signed(folder, "authority", host="authority.example", bits=authority_bits)
    key, request, leaf, chain = (folder / f"leaf.{end}" for end in ("key", "csr", "crt", "pem"))
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", request, "-subj", "/CN=localhost")
    openssl("x509", "-req", "-in", request, "-CA", authority.certificate, "-CAkey", authority.key, "-CAcreateserial",
            f"-{digest}", "-days", 30, "-out", leaf)  # fmt: skip
    chain.write_bytes(leaf.read_bytes() + authority.certificate.read_bytes())
    return Pair(key, chain)


WEAK: dict[str, tuple[Callable[[Path], Pair], int, str]] = {
    "RSA of 1024 bits": (lambda folder: self_signed(folder, bits=1024), 1, "its key is short"),
    "RSA of 512 bits": (lambda folder: self_signed(folder, bits=512), 0, "its key is short"),
    "signed with SHA-1": (lambda folder: signed(folder, digest="sha1"), 0, "it is signed with SHA-1 or MD5"),
    "signed with MD5": (lambda folder: signed(folder, digest="md5"), 0, "it is signed with SHA-1 or MD5"),
    "authority of 1024 bits": (lambda folder: signed(folder, authority_bits=1024), 1, "a certificate that signed it"),
}


@pytest.mark.skipif(USUAL < 2, reason="OpenSSL's usual level is below 2 here")
@pytest.mark.parametrize("case", WEAK.values(), ids=WEAK)
def test_weak_certificate_is_served_with_a_warning_and_no_weaker_level_than_it_needs(
    tmp_path: Path, case: tuple[Callable[[Path], Pair], int, str]
) -> None:
    make, level, said = case
    config = config_for(make(tmp_path))
    [(kind, text)] = tls.prepare(config, tmp_path)
    assert kind == "warning" and f"; {said}" in text and f"security level {level}, not {USUAL}" in text
    context = tls.server_context(config)
    assert context.security_level == level
    ordinary = tls._bare_context()
    assert context.minimum_version == ordinary.minimum_version == ssl.TLSVersion.TLSv1_2
    assert {each["name"] for each in context.get_ciphers()} <= {each["name"] for each in ordinary.get_ciphers()}
    tls._handshake(context, tls._trusting_context())


def test_renewed_certificate_brings_its_own_level(tmp_path: Path) -> None:
    pair = self_signed(tmp_path, bits=512)
    config = config_for(pair)
    context = tls.server_context(config)
    [watch] = watched(config, context, None)
    for bits, level in ((2048, USUAL), (1024, min(USUAL, 1))):
        self_signed(tmp_path, bits=bits)
        assert watch.look()
        assert context.security_level == level
        assert context.maximum_version == ssl.TLSVersion.MAXIMUM_SUPPORTED


def test_ordinary_certificate_is_served_at_the_usual_level_without_a_warning(tmp_path: Path) -> None:
    config = config_for(self_signed(tmp_path))
    [(kind, text)] = tls.prepare(config, tmp_path)
    assert kind == "note" and "level" not in text
    assert tls.server_context(config).security_level == USUAL


def _crlf(content: bytes) -> bytes:
    return content.replace(b"\n", b"\r\n")


FORMS: dict[str, Callable[[bytes], bytes]] = {
    "CRLF": _crlf,
    "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "text before": lambda content: b"Bag Attributes\n    friendlyName: server\n" + content,
    "text behind": lambda content: content + b"\nthat is all\n",
    "no line end": bytes.strip,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_pem_files_as_editors_and_tools_leave_them_are_read(tmp_path: Path, form: Callable[[bytes], bytes]) -> None:
    pair = self_signed(tmp_path)
    for file in pair:
        file.write_bytes(form(file.read_bytes()))
    [(kind, _)] = tls.prepare(config_for(pair), tmp_path)
    assert kind == "note"


@pytest.mark.parametrize("order", ["key first", "certificate first"])
def test_one_file_may_hold_both(tmp_path: Path, order: str) -> None:
    pair = self_signed(tmp_path)
    parts = [pair.key.read_bytes(), pair.certificate.read_bytes()]
    bundle = tmp_path / "bundle.pem"
    bundle.write_bytes(b"".join(parts if order == "key first" else reversed(parts)))
    [(kind, _)] = tls.prepare(config_for(Pair(bundle, bundle)), tmp_path)
    assert kind == "note"


@pytest.mark.parametrize("key", ["SEC1", "with its parameters", "Ed25519"])
def test_keys_of_elliptic_curves_are_read(tmp_path: Path, key: str) -> None:
    pair = Pair(tmp_path / "ec.key", tmp_path / "ec.pem")
    kind = ["ed25519"] if key == "Ed25519" else ["ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    openssl("req", "-x509", "-newkey", *kind, "-nodes", "-keyout", pair.key, "-out", pair.certificate, "-days", 30,
            "-subj", "/CN=localhost")  # fmt: skip
    if key != "Ed25519":
        text = openssl("pkey", "-in", pair.key, "-traditional")
        assert "BEGIN EC PRIVATE KEY" in text
        parameters = openssl("ecparam", "-name", "prime256v1") if key == "with its parameters" else ""
        pair.key.write_text(parameters + text)
    [(said, _)] = tls.prepare(config_for(pair), tmp_path)
    assert said == "note"


@pytest.mark.parametrize("password", ["changeit", "", "a b=c:d#e\"'$!", "pässwörd"])
def test_keystore_password_may_be_anything(tmp_path: Path, password: str) -> None:
    pytest.importorskip("cryptography")
    store = keystore(self_signed(tmp_path), password, tmp_path / "server.p12")
    address = Address("127.0.0.1", 8443, is_tls=True)
    config = Config(inference_address=address, keystore=str(store), keystore_pass=password)
    [(kind, _)] = tls.prepare(config, tmp_path)
    assert kind == "note"


@pytest.mark.parametrize("ciphers", ["3DES", "RC2"])
def test_keystore_with_ciphers_of_old_is_read(tmp_path: Path, ciphers: str) -> None:
    pytest.importorskip("cryptography")
    pair = self_signed(tmp_path)
    # -legacy: keys in 3DES, certificates in RC2 of 40 bits.
    options = ["-keypbe", "PBE-SHA1-3DES", "-certpbe", "PBE-SHA1-3DES"] if ciphers == "3DES" else ["-legacy"]
    try:
        openssl("pkcs12", "-export", *options, "-inkey", pair.key, "-in", pair.certificate, "-out",
                tmp_path / "old.p12", "-passout", "pass:changeit")  # fmt: skip
    except AssertionError as error:
        pytest.skip(f"this openssl makes none: {error}")
    config = Config(inference_address=Address("127.0.0.1", 8443, is_tls=True), keystore=str(tmp_path / "old.p12"))
    [(kind, _)] = tls.prepare(config, tmp_path)
    assert kind == "note"


def test_pem_that_is_cut_short_is_told_so(tmp_path: Path) -> None:
    pair = self_signed(tmp_path)
    pair.certificate.write_bytes(pair.certificate.read_bytes()[:-200])
    with pytest.raises(ConfigError, match="OpenSSL finds no whole PEM block, or one that it cannot read"):
        tls.prepare(config_for(pair), tmp_path)
