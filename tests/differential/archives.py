"""Builds the archives of a case from their descriptions."""

from __future__ import annotations

import base64
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

HANDLERS = Path(__file__).parent / "handlers"
DATE = (2024, 1, 2, 3, 4, 6)

KEYS = {"about", "source", "file", "form", "prefix", "manifest", "top", "files", "content", "folder", "order"}
FORMS = ("mar", "stored", "tgz", "tar", "folder", "bytes")


def build(store: Path, name: str, spec: dict[str, Any]) -> Path:
    """Writes one archive into ``store``.

    ``spec`` has ``files`` (path to content), ``manifest`` (fields of its ``model``, laid over the usual ones; a null
    leaves a field out; a text is the whole file; ``false`` leaves the file out), ``top`` (fields beside ``model``),
    ``form`` (one of FORMS, default ``mar``), ``prefix`` (before every entry's name), ``file`` (the name in the store).

    Raises:
        ValueError: an unknown key, form or kind of content.
    """
    unknown = spec.keys() - KEYS
    form = spec.get("form", "mar")
    if unknown or form not in FORMS:
        raise ValueError(f"archive {name}: unknown {', '.join(sorted(unknown)) or form}")
    suffix = {"mar": ".mar", "stored": ".mar", "tgz": ".tar.gz", "tar": ".tar", "folder": "", "bytes": ".mar"}[form]
    path = store / spec.get("file", name + suffix)
    if form == "bytes":
        path.write_bytes(_content(spec["content"], spec)[0])
        return path
    entries = {file: _content(content, spec) for file, content in spec.get("files", {}).items()}
    manifest = _manifest(name, spec)
    if manifest is not None:
        entries = {"MAR-INF/MANIFEST.json": (manifest, False), **entries}
    entries = {spec.get("prefix", "") + file: entry for file, entry in entries.items()}
    if form == "folder":
        _write_folder(path, entries)
    elif form in ("mar", "stored"):
        _write_zip(path, entries, zipfile.ZIP_STORED if form == "stored" else zipfile.ZIP_DEFLATED)
    else:
        _write_tar(path, entries, "w:gz" if form == "tgz" else "w")
    return path


def _manifest(name: str, spec: dict[str, Any]) -> bytes | None:
    written = spec.get("manifest", {})
    if written is False:
        return None
    if isinstance(written, str):
        return written.encode()
    if isinstance(written, dict) and "base64" in written:
        return base64.b64decode(written["base64"])
    files = spec.get("files", {})
    model: dict[str, Any] = {"modelName": name, "handler": "h.py", "modelVersion": "1.0"}
    if "model-config.yaml" in files:
        model["configFile"] = "model-config.yaml"
    model |= written
    top = {"createdOn": "02/01/2024 03:04:05", "runtime": "python", "archiverVersion": "0.12.0", **spec.get("top", {})}
    return json.dumps(
        {
            **{key: value for key, value in top.items() if value is not None},
            "model": {key: value for key, value in model.items() if value is not None},
        }
    ).encode()


def _content(written: Any, spec: dict[str, Any]) -> tuple[bytes, bool]:
    """A file's bytes, and whether they are a link's target."""
    if isinstance(written, str):
        return written.encode(), False
    ((kind, value),) = written.items()
    match kind:
        case "base64":
            return base64.b64decode(value), False
        case "zeros":
            return bytes(value), False
        case "handler":
            return (HANDLERS / value).read_bytes(), False
        case "copy":
            return (Path(spec["folder"]) / value).read_bytes(), False
        case "link":
            return value.encode(), True
        case "script":
            return _script(value), False
    raise ValueError(f"unknown content {kind}; known: text, base64, zeros, handler, copy, link, script")


def _script(name: str) -> bytes:
    """A TorchScript model, the same at every call."""
    import torch

    models = {
        "double": lambda: torch.jit.trace(_Double(), torch.zeros(1, 2)),
        "linear": lambda: torch.jit.script(_seeded(torch.nn.Linear(4, 6))),
    }
    out = io.BytesIO()
    torch.jit.save(models[name]().eval(), out)
    return out.getvalue()


def _seeded(module: Any) -> Any:
    import torch

    with torch.no_grad():
        for number, each in enumerate(module.parameters()):
            each.copy_(torch.arange(each.numel()).reshape(each.shape) / 16 - number)
    return module


def _Double() -> Any:
    import torch

    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    return Double()


def _write_zip(path: Path, entries: dict[str, tuple[bytes, bool]], method: int) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, (content, is_link) in entries.items():
            info = zipfile.ZipInfo(name, DATE)
            info.compress_type = method
            info.external_attr = (0o120777 if is_link else 0o040755 if name.endswith("/") else 0o100644) << 16
            archive.writestr(info, content)


def _write_tar(path: Path, entries: dict[str, tuple[bytes, bool]], mode: Any) -> None:
    with tarfile.open(path, mode) as archive:
        for name, (content, is_link) in entries.items():
            info = tarfile.TarInfo(name)
            if is_link:
                info.type, info.linkname = tarfile.SYMTYPE, content.decode()
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def _write_folder(path: Path, entries: dict[str, tuple[bytes, bool]]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for name, (content, is_link) in entries.items():
        file = path / name
        if name.endswith("/"):
            file.mkdir(parents=True, exist_ok=True)
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if is_link:
            file.symlink_to(content.decode())
        else:
            file.write_bytes(content)
