"""The names that handlers written for TorchServe import, resolved to pyserve's own modules.

On sys.path of worker processes and of `pyserve debug` and `check` only.
"""

from ts.version import __version__

__all__ = ["__version__"]
