"""What handlers call while they handle."""

from __future__ import annotations

import importlib
from typing import Any

from pyserve.context import Context
from pyserve.worker import streaming
from ts.protocol.otf_message_handler import create_predict_response

__all__ = ["Context", "create_predict_response", "import_class", "send_intermediate_predict_response"]


def import_class(class_name: str, module_prefix: str | None = None) -> type:
    """What ``module.Class`` names, looked for in ``module_prefix`` if it is given.

    Raises:
        ImportError: there is none, or no module is named.
    """
    module_name, _, name = class_name.rpartition(".")
    if module_prefix:
        module_name = f"{module_prefix}.{module_name}" if module_name else module_prefix
    if not module_name:
        raise ImportError("module name is not defined.")
    module = importlib.import_module(module_name)
    try:
        found: type = getattr(module, name)
    except AttributeError:
        raise ImportError(f"class:{name} not found in module:{module_name}.") from None
    return found


def send_intermediate_predict_response(ret: Any, req_id_map: Any, message: str, code: int, context: Any) -> None:
    """Sends one part to each client of the batch; to a plain socket as TorchServe's wire has it.

    Raises:
        ValueError: not one part per request, or no context.
    """
    connection: Any = getattr(context, "cl_socket", None)
    if hasattr(connection, "sendall"):
        connection.sendall(create_predict_response(ret, req_id_map, message, code, context, ts_stream_next=True))
    else:
        streaming.send_intermediate_predict_response(ret, req_id_map, message, code, context)
