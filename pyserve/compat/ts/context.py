"""What handlers know of their model and their batch."""

from pyserve.context import Context, RequestProcessor

__all__ = ["Context", "RequestProcessor"]
