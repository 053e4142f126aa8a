"""The steps of packing, one by one, as scripts call them. `generate_model_archive` does them all, more carefully."""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from model_archiver.manifest_components.manifest import Manifest, RuntimeType
from model_archiver.manifest_components.model import Model
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_archiver_error import MissingFileError, ModelArchiverError

MODEL_SERVER_VERSION = "1.0"
MODEL_ARCHIVE_VERSION = "1.0"
MANIFEST_FILE_NAME = "MANIFEST.json"
MAR_INF = "MAR-INF"

archiving_options = {"tgz": ".tar.gz", "no-archive": "", "zip-store": ".mar", "default": ".mar"}
# Built-in handlers, and what their models are about.
model_handlers = {
    "text_classifier": "text", "image_classifier": "vision", "object_detector": "vision", "image_segmenter": "vision",
    "dali_image_classifier": "vision", "vllm_handler": "text", "trt_llm_handler": "text", "base_handler": "anything",
}  # fmt: skip

_MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9_\-.]*$"
_UNWANTED_FOLDERS = ("__MACOSX", "__pycache__")

__all__ = [
    "MANIFEST_FILE_NAME", "MAR_INF", "MODEL_ARCHIVE_VERSION", "MODEL_SERVER_VERSION", "Manifest", "Model",
    "ModelArchiverConfig", "ModelArchiverError", "ModelExportUtils", "RuntimeType", "archiving_options",
    "model_handlers",
]  # fmt: skip


class ModelExportUtils:
    """The steps."""

    @staticmethod
    def get_archive_export_path(export_file_path: str, model_name: str, archive_format: str) -> str:
        """Where the archive goes."""
        return os.path.join(export_file_path, f"{model_name}{archiving_options[archive_format]}")

    @staticmethod
    def check_mar_already_exists(
        model_name: str, export_file_path: str | None, overwrite: bool, archive_format: str = "default"
    ) -> str:
        """The folder to write to.

        Raises:
            ModelArchiverError: the archive is there, and ``overwrite`` is not.
        """
        folder = export_file_path or os.getcwd()
        path = ModelExportUtils.get_archive_export_path(folder, model_name, archive_format)
        if os.path.exists(path):
            if not overwrite:
                raise ModelArchiverError(
                    f"{path} already exists.\nPlease specify --force/-f option to overwrite the model archive output"
                    " file.\nSee -h/--help for more details."
                )
            logging.warning("Overwriting %s ...", path)
        return folder

    @staticmethod
    def find_unique(files: Iterable[str], suffix: str) -> str | None:
        """The one file that ends with ``suffix``; None if there is none.

        Raises:
            ModelArchiverError: there are several.
        """
        found = [name for name in files if name.endswith(suffix)]
        if len(found) > 1:
            raise ModelArchiverError(
                f"model-archiver expects only one {suffix} file in the folder. Found {len(found)} files {found} in"
                " model-path."
            )
        return found[0] if found else None

    @staticmethod
    def generate_model(modelcfg: ModelArchiverConfig) -> Model:
        """The manifest's part about the model."""

        def name(path: str | None) -> str | None:
            return os.path.basename(path) if path else None

        return Model(
            modelcfg.model_name, name(modelcfg.serialized_file), os.path.basename(modelcfg.handler),
            name(modelcfg.model_file), modelcfg.version, None, name(modelcfg.requirements_file),
            name(modelcfg.config_file),
        )  # fmt: skip

    @staticmethod
    def generate_manifest_json(config: ModelArchiverConfig) -> str:
        """The text of MANIFEST.json."""
        return str(Manifest(config.runtime, ModelExportUtils.generate_model(config)))

    @staticmethod
    def clean_temp_files(temp_files: Iterable[str]) -> None:
        """Removes files."""
        for path in temp_files:
            os.remove(path)

    @staticmethod
    def make_dir(d: str) -> None:
        """Makes a folder, if it is not there."""
        os.makedirs(d, exist_ok=True)

    @staticmethod
    def copy_artifacts(model_name: str, runtime: str, **kwargs: Any) -> str:
        """Copies the files of a model to a new folder and returns it; the caller removes it.

        Args:
            model_name: of the model; in the folder's name.
            runtime: ``python``, ``python3`` or ``LSP``.
            kwargs: what a file is for -> its path; ``extra_files`` are several, separated by commas.

        Raises:
            FileNotFoundError: one is not there.
        """
        folder = tempfile.mkdtemp(prefix=f"{model_name}-")
        try:
            for kind, path in kwargs.items():
                if kind == "handler":
                    _copy_handler(path, runtime, folder)
                elif kind == "extra_files":
                    for pattern in (path or "").split(","):
                        _copy_extra(pattern, folder)
                elif path:
                    shutil.copy(path, folder)
        except BaseException:
            shutil.rmtree(folder)
            raise
        return folder

    @staticmethod
    def archive_dir(path: str, dst: Any, archive_format: str, model_name: str) -> None:
        """Adds the files of a folder to an open zip or tar file."""
        for current, folders, names in os.walk(path):
            folders[:] = sorted(each for each in folders if ModelExportUtils.directory_filter(each, _UNWANTED_FOLDERS))
            for each in sorted(names):
                file = os.path.join(current, each)
                if ModelExportUtils.file_filter(each, set()):
                    inner = os.path.relpath(file, path)
                    dst.add(file, os.path.join(model_name, inner)) if archive_format == "tgz" else dst.write(
                        file, inner
                    )

    @staticmethod
    def directory_filter(directory: str, unwanted_dirs: Collection[str]) -> bool:
        """Whether a folder of this name is packed."""
        return directory not in unwanted_dirs and not directory.startswith(".")

    @staticmethod
    def file_filter(current_file: str, files_to_exclude: Collection[str]) -> bool:
        """Whether a file of this name is packed."""
        return current_file not in files_to_exclude and not current_file.endswith((".pyc", ".DS_Store"))

    @staticmethod
    def check_model_name_regex_or_exit(model_name: str) -> None:
        """Raises ModelArchiverError unless a model may be called that."""
        if not re.match(_MODEL_NAME, model_name):
            raise ModelArchiverError(
                "Model name contains special characters.\nThe allowed regular expression filter for model name is:"
                f" {_MODEL_NAME}"
            )

    @staticmethod
    def validate_inputs(model_name: str, export_path: str) -> None:
        """Raises ModelArchiverError unless the name is allowed and the folder is there."""
        ModelExportUtils.check_model_name_regex_or_exit(model_name)
        if not os.path.isdir(export_path):
            raise ModelArchiverError(
                f"Given export-path {export_path} is not a directory. Point to a valid export-path directory."
            )

    @staticmethod
    def archive(
        export_file: str, model_name: str, model_path: str, manifest: str, archive_format: str = "default"
    ) -> None:
        """Packs a folder and a manifest.

        Args:
            export_file: folder to write to.
            model_name: of the model.
            model_path: folder to pack.
            manifest: text of MANIFEST.json.
            archive_format: one of `archiving_options`.
        """
        target = Path(ModelExportUtils.get_archive_export_path(export_file, model_name, archive_format))
        ModelExportUtils.make_dir(os.path.join(model_path, MAR_INF))
        Path(model_path, MAR_INF, MANIFEST_FILE_NAME).write_text(manifest)
        if archive_format == "no-archive":
            if target.exists():
                shutil.rmtree(target)
            shutil.copytree(model_path, target)
        elif archive_format == "tgz":
            with tarfile.open(target, "w:gz") as tar:
                ModelExportUtils.archive_dir(model_path, tar, archive_format, model_name)
        else:
            method = zipfile.ZIP_STORED if archive_format == "zip-store" else zipfile.ZIP_DEFLATED
            with zipfile.ZipFile(target, "w", method) as packed:
                ModelExportUtils.archive_dir(model_path, packed, archive_format, model_name)
        logging.info("Successfully exported model %s to file %s", model_name, export_file)


def _copy_handler(handler: str | None, runtime: str, folder: str) -> None:
    """A file, with or without its suffix, and perhaps ``:function`` behind it; a built-in one has none."""
    if not handler or handler in model_handlers or (runtime == RuntimeType.LSP.value and "." not in handler):
        return
    path = handler.partition(":")[0]
    suffix = ".so" if runtime == RuntimeType.LSP.value else ".py"
    shutil.copy(path if path.endswith(suffix) else path + suffix, folder)


def _copy_extra(pattern: str, folder: str) -> None:
    """A file, a wildcard, or a folder, whose content goes to the root."""
    for path in glob.glob(pattern) if glob.has_magic(pattern) else [pattern] if pattern else []:
        if os.path.isdir(path):
            shutil.copytree(path, folder, dirs_exist_ok=True)
        elif os.path.isfile(path):
            shutil.copy(path, folder)
        else:
            raise MissingFileError(f"File does not exist: {path}")
