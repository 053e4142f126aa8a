"""The version of TorchServe whose handler contract this is."""

__version__ = "0.12.0"
