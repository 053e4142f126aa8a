"""TorchServe's management service over gRPC: each call is the HTTP call of the same meaning.

proto3 cannot tell 0 and "" from nothing, so they mean the default, as in TorchServe.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlencode

from pyserve.api.management import Management
from pyserve.errors import ServeError
from pyserve.grpc_api.call import Call
from pyserve.grpc_api.messages import MANAGEMENT, message
from pyserve.grpc_api.service import Method, Service
from pyserve.grpc_api.status import MissingParameterError, judge_management, judge_management_strictly
from pyserve.request.exchange import Exchange
from pyserve.request.messages import Response

_Answer = message(f"{MANAGEMENT}.ManagementResponse")
Parameters = dict[str, str | int | bool]

_REGISTER_TEXTS = ("url", "model_name", "handler", "runtime")
_REGISTER_NUMBERS = ("batch_size", "initial_workers", "max_batch_delay", "response_timeout", "startup_timeout")


class ManagementService:
    """``ManagementAPIsService``. Loop thread only."""

    def __init__(self, management: Management, *, is_strict: bool = False):
        self._management = management
        self._is_strict = is_strict

    def service(self) -> Service:
        """Its table."""
        runs: dict[str, Callable[..., Any]] = {
            "DescribeModel": self.describe_model,
            "ListModels": self.list_models,
            "RegisterModel": self.register_model,
            "ScaleWorker": self.scale_worker,
            "SetDefault": self.set_default,
            "UnregisterModel": self.unregister_model,
        }
        methods = tuple(Method(name, run, message(f"{MANAGEMENT}.{name}Request")) for name, run in runs.items())
        judge = judge_management_strictly if self._is_strict else judge_management
        return Service(f"{MANAGEMENT}.ManagementAPIsService", methods, judge, "management")

    async def describe_model(self, call: Call, asked: Any) -> Any:
        """The JSON array of HTTP's answer."""
        parameters: Parameters = {"customized": True} if asked.customized else {}
        endpoint = self._management.describe_model
        return _Answer(msg=(await self._ask(call, endpoint, parameters, *self._model(asked))).strip())

    async def list_models(self, call: Call, asked: Any) -> Any:
        """The JSON object of HTTP's answer. Without a limit a whole page, where TorchServe has an empty one."""
        parameters: Parameters = {}
        if asked.limit or self._is_strict:
            parameters["limit"] = asked.limit
        if asked.next_page_token:
            parameters["next_page_token"] = asked.next_page_token
        return _Answer(msg=(await self._ask(call, self._management.list_models, parameters)).strip())

    async def register_model(self, call: Call, asked: Any) -> Any:
        """Unlike HTTP's it answers before the model is there, unless ``synchronous`` is set."""
        parameters: Parameters = {"synchronous": asked.synchronous}
        parameters |= {name: getattr(asked, name) for name in _REGISTER_TEXTS if getattr(asked, name)}
        numbers = {name: getattr(asked, name) for name in _REGISTER_NUMBERS}
        # In TorchServe what is below 0 means the default too; elsewhere it is the error that it is over HTTP.
        parameters |= {name: value for name, value in numbers.items() if value > 0 or (value and not self._is_strict)}
        if asked.s3_sse_kms:
            parameters["s3_sse_kms"] = True
        return await self._status(call, self._management.register_model, parameters)

    async def scale_worker(self, call: Call, asked: Any) -> Any:
        """Not to zero: an unset ``min_worker`` means 1. One below 0 is an error, as over HTTP."""
        parameters: Parameters = {"synchronous": asked.synchronous}
        names = ("min_worker", "max_worker", "number_gpu", "timeout")
        parameters |= {name: getattr(asked, name) for name in names if getattr(asked, name)}
        return await self._status(call, self._management.scale_model, parameters, *self._model(asked))

    async def set_default(self, call: Call, asked: Any) -> Any:
        """``model_version`` is required."""
        name, version = self._model(asked)
        if not version:
            if not self._is_strict:
                raise MissingParameterError("model_version")
            version = ""
        return await self._status(call, self._management.set_default_version, {}, name, version)

    async def unregister_model(self, call: Call, asked: Any) -> Any:
        """Answers when it is gone."""
        if self._is_strict and not asked.model_name:
            raise MissingParameterError("url")  # as TorchServe has it
        return await self._status(call, self._management.unregister_model, {}, *self._model(asked))

    async def _status(self, call: Call, endpoint: Callable[..., Any], parameters: Parameters, *path: Any) -> Any:
        answer = json.loads(await self._ask(call, endpoint, parameters, *path))
        warning = f" Warning: {answer['warning']}" if "warning" in answer else ""
        return _Answer(msg=f"{answer['status']}{warning}")

    async def _ask(self, call: Call, endpoint: Callable[..., Any], parameters: Parameters, *path: Any) -> str:
        """The body of HTTP's answer.

        Raises:
            ServeError: HTTP's answer is an error.
        """
        values = {name: str(value).lower() if value is True or value is False else value
                  for name, value in parameters.items()}  # fmt: skip
        exchange = Exchange(call.request(query=urlencode(values)), lambda _: None)
        answer = endpoint(exchange, *path)
        response: Response = await answer if inspect.isawaitable(answer) else answer
        if response.error is not None:
            raise response.error
        if response.status >= 400:
            error = ServeError(bytes(response.body).decode("utf-8", "replace"))
            error.status = response.status
            raise error
        return bytes(response.body).decode()

    def _model(self, asked: Any) -> tuple[str, str | None]:
        """Name and version.

        Raises:
            MissingParameterError: there is no name; in TorchServe there is no model of that name.
        """
        if not (asked.model_name or self._is_strict):
            raise MissingParameterError("model_name")
        return asked.model_name, asked.model_version or None
