"""pyserve: a serving engine for PyTorch models. The command line is in `pyserve.commands.cli`."""

__version__ = "0.1.0"
