"""The manifest's part about the model."""

from __future__ import annotations

import json


class Model:
    """File names within the archive, and what the model is called; its text is JSON. What is None is left out."""

    def __init__(  # noqa: PLR0917 - the archiver's signature
        self, model_name: str, serialized_file: str | None, handler: str, model_file: str | None = None,
        model_version: str | None = None, extensions: str | None = None, requirements_file: str | None = None,
        config_file: str | None = None,
    ):  # fmt: skip
        self.model_name = model_name
        self.serialized_file = serialized_file
        self.model_file = model_file
        self.model_version = model_version
        self.extensions = extensions
        self.handler = handler
        self.requirements_file = requirements_file
        self.config_file = config_file
        named = {
            "modelName": model_name, "serializedFile": serialized_file, "handler": handler, "modelFile": model_file,
            "modelVersion": model_version, "extensions": extensions, "requirementsFile": requirements_file,
            "configFile": config_file,
        }  # fmt: skip
        self.model_dict = {key: value for key, value in named.items() if value}

    def __str__(self) -> str:
        return json.dumps(self.model_dict)
