"""Keys and certificates for the tests, made by openssl as their owners make them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple


class Pair(NamedTuple):
    key: Path
    certificate: Path


def openssl(*arguments: object) -> str:
    made = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False)
    assert made.returncode == 0, made.stderr
    return made.stdout


def self_signed(folder: Path, name: str = "server", *, host: str = "localhost", bits: int = 2048) -> Pair:
    """A certificate for ``host`` and 127.0.0.1."""
    pair = Pair(folder / f"{name}.key", folder / f"{name}.pem")
    openssl("req", "-x509", "-newkey", f"rsa:{bits}", "-nodes", "-keyout", pair.key, "-out", pair.certificate,
            "-days", 30, "-subj", f"/CN={host}", "-addext", f"subjectAltName=DNS:{host},IP:127.0.0.1")  # fmt: skip
    return pair


def signed_by_authority(folder: Path) -> tuple[Pair, Path]:
    """A pair whose certificate file is a chain, leaf first; and the certificate of the authority that signed it."""
    authority = self_signed(folder, "authority", host="authority.example")
    key, request, leaf, chain = (folder / f"leaf.{end}" for end in ("key", "csr", "crt", "pem"))
    extensions = folder / "leaf.ext"
    extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key,
            "-out", request, "-subj", "/CN=localhost")  # fmt: skip
    openssl("x509", "-req", "-in", request, "-CA", authority.certificate, "-CAkey", authority.key, "-CAcreateserial",
            "-days", 30, "-extfile", extensions, "-out", leaf)  # fmt: skip
    chain.write_bytes(leaf.read_bytes() + authority.certificate.read_bytes())
    return Pair(key, chain), authority.certificate


def dated(folder: Path, name: str, start: str, end: str) -> Pair:
    """A self-signed pair that is valid from ``start`` to ``end``, as in 20200101000000Z."""
    database, config = folder / f"{name}.db", folder / f"{name}.cnf"
    pair = Pair(folder / f"{name}.key", folder / f"{name}.pem")
    database.write_text("")
    config.write_text(
        f"[ca]\ndefault_ca=own\n[own]\ndatabase={database}\nnew_certs_dir={folder}\ndefault_md=sha256\n"
        "policy=any\nrand_serial=yes\n[any]\ncommonName=supplied\n"
    )
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-keyout", pair.key, "-out", folder / f"{name}.csr",
            "-subj", "/CN=localhost")  # fmt: skip
    openssl("ca", "-batch", "-selfsign", "-config", config, "-keyfile", pair.key, "-in", folder / f"{name}.csr",
            "-out", pair.certificate, "-startdate", start, "-enddate", end, "-notext")  # fmt: skip
    return pair


def keystore(pair: Pair, password: str, file: Path) -> Path:
    """The pair as PKCS12."""
    openssl("pkcs12", "-export", "-inkey", pair.key, "-in", pair.certificate, "-out", file,
            "-passout", f"pass:{password}")  # fmt: skip
    return file
