"""The handler that every other one starts from."""

from pyserve.handlers.base_handler import *  # noqa: F403
from pyserve.handlers.base_handler import BaseHandler

__all__ = ["BaseHandler"]
