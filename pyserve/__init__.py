"""pyserve: a serving engine for PyTorch models. The command line is in `pyserve.commands.cli`."""

__version__ = "0.1.0"
TORCHSERVE_VERSION = "0.12.0"
"""Of the TorchServe whose contract is kept; what scripts and handlers compare with."""
