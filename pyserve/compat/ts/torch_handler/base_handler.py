"""The handler that every other one starts from."""

import logging

from pyserve.handlers.base_handler import *  # noqa: F403
from pyserve.handlers.base_handler import BaseHandler
from ts.handler_utils.timer import timed
from ts.utils.util import check_valid_pt2_backend, list_classes_from_module, load_label_mapping

logger = logging.getLogger(__name__)
PT230_AVAILABLE = True

__all__ = [
    "PT230_AVAILABLE", "BaseHandler", "check_valid_pt2_backend", "list_classes_from_module", "load_label_mapping",
    "logger", "timed",
]  # fmt: skip
