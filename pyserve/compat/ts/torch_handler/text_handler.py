"""`TextHandler` under TorchServe's name."""

import logging

from pyserve.handlers.base_handler import BaseHandler
from pyserve.handlers.text_handler import TextHandler
from ts.handler_utils.text_utils import get_tokenizer
from ts.utils.util import CLEANUP_REGEX

logger = logging.getLogger(__name__)

__all__ = ["CLEANUP_REGEX", "BaseHandler", "TextHandler", "get_tokenizer", "logger"]
