"""The version of torch-model-archiver whose interface this is."""

__version__ = "0.12.0"
