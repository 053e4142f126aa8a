"""Packages of a few bytes, and an index on this machine that has them."""

from __future__ import annotations

import contextlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Builds without setuptools, which pip would want to fetch.
_BACKEND = '''
import pathlib, zipfile
def build_wheel(folder, config=None, metadata=None):
    with zipfile.ZipFile(pathlib.Path(folder, "{name}-1.0-py3-none-any.whl"), "w") as file:
        file.writestr("{name}/__init__.py", pathlib.Path("{name}/__init__.py").read_text())
        write(file)
    return "{name}-1.0-py3-none-any.whl"
def build_editable(folder, config=None, metadata=None):
    with zipfile.ZipFile(pathlib.Path(folder, "{name}-1.0-py3-none-any.whl"), "w") as file:
        file.writestr("__editable__.{name}.pth", "import __editable_{name}_finder\\n")
        file.writestr("__editable_{name}_finder.py", FINDER.replace("PLACE", str(pathlib.Path.cwd())))
        write(file)
    return "{name}-1.0-py3-none-any.whl"
def write(file):
    for name, text in INFO.items():
        file.writestr("{name}-1.0.dist-info/" + name, text)
INFO = {{"METADATA": "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n", "RECORD": "",
        "WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"}}
FINDER = """
import importlib.util, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "{name}":
            return importlib.util.spec_from_file_location(name, r"PLACE/{name}/__init__.py")
sys.meta_path.append(Finder)
"""
'''


def wheel(name: str, version: str = "1.0", value: str = "", *, requires: tuple[str, ...] = ()) -> bytes:
    """A wheel of a package whose ``V`` is ``value``."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{name}/__init__.py": f"V = {value!r}\n",
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {each}\n" for each in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for each, text in files.items():
            file.writestr(zipfile.ZipInfo(each), text)  # without the time, which would make other bytes
    return out.getvalue()


def wheel_name(name: str, version: str = "1.0") -> str:
    return f"{name}-{version}-py3-none-any.whl"


def source_files(name: str, value: str) -> dict[str, str]:
    """A package as a folder that pip can build. Installed as editable, an import hook finds it, as with setuptools."""
    return {
        "pyproject.toml": f'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        f'[project]\nname = "{name}"\nversion = "1.0"\n',
        "backend.py": _BACKEND.format(name=name),
        f"{name}/__init__.py": f"V = {value!r}\n",
    }


def source_archive(name: str, value: str) -> bytes:
    """The same as ``name-1.0.tar.gz``."""
    out = io.BytesIO()
    files = {**source_files(name, value), "PKG-INFO": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"}
    with tarfile.open(fileobj=out, mode="w:gz") as file:
        for each, text in files.items():
            header = tarfile.TarInfo(f"{name}-1.0/{each}")
            header.size = len(text.encode())
            file.addfile(header, io.BytesIO(text.encode()))
    return out.getvalue()


@dataclass
class Index:
    """A package index over HTTP.

    Attributes:
        url: of its list, for ``PIP_INDEX_URL``.
        asked: paths that were asked for.
    """

    url: str
    asked: list[str] = field(default_factory=list)


@contextlib.contextmanager
def index(wheels: Mapping[str, bytes]) -> Iterator[Index]:
    """Serves ``wheels``, by file name."""
    found = Index("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found.asked.append(self.path)
            kind, _, name = self.path.strip("/").partition("/")
            body = wheels.get(name) if kind == "files" else None
            if kind == "simple":
                files = [each for each in wheels if each.partition("-")[0] == name]
                body = "".join(f'<a href="/files/{each}">{each}</a>' for each in files).encode()
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html" if kind == "simple" else "application/octet-stream")
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found.url = f"http://127.0.0.1:{server.server_port}/simple"
        try:
            yield found
        finally:
            server.shutdown()
