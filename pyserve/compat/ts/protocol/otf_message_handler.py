"""Where handlers of old import `send_intermediate_predict_response` from."""

from __future__ import annotations

import warnings
from typing import Any

from pyserve.worker import streaming


def send_intermediate_predict_response(ret: Any, req_id_map: Any, message: str, code: int, context: Any = None) -> None:
    """As `ts.handler_utils.utils.send_intermediate_predict_response`, which takes its place."""
    warnings.warn(
        "import send_intermediate_predict_response from ts.handler_utils.utils", PendingDeprecationWarning, stacklevel=2
    )
    streaming.send_intermediate_predict_response(ret, req_id_map, message, code, context)


def _no_wire(name: str) -> Any:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{name} speaks TorchServe's wire between its processes, which pyserve does not have")

    return refuse


create_predict_response = _no_wire("create_predict_response")
create_load_model_response = _no_wire("create_load_model_response")
retrieve_msg = _no_wire("retrieve_msg")
