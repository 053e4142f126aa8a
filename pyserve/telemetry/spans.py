"""Spans of OpenTelemetry, one per prediction and one per stage of it, with the times of the stages themselves.

On when the ``otel`` extra is installed and the environment names a collector, as the standard has it:
``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``OTEL_EXPORTER_OTLP_TRACES_ENDPOINT``), together with ``OTEL_SERVICE_NAME``,
``OTEL_TRACES_SAMPLER``, ``OTEL_BSP_...`` and the others. A client's valid ``traceparent`` makes its span the parent;
the handler finds this server's span there, so that its own spans and calls join in. Spans leave on a thread of their
own.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyserve import __version__
from pyserve.request.messages import Request

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from pyserve.request.stages import Stages

log = logging.getLogger(__name__)

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_NAMES = ("traceparent", "tracestate")
# What is left when the server ends is sent, unless the collector does not take it in this time.
CLOSE_S = 3.0


class Tracer:
    """Makes the spans of this process. Loop thread only."""

    def __init__(self, provider: TracerProvider):
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("pyserve", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._trace = trace
        self._context_of = trace.set_span_in_context

    def begin(self, request: Request, model: str, version: str) -> Span:
        """The request's span, a child of the client's; from now on the request names it as the parent."""
        carrier = {}
        for name in _NAMES:
            values = [value for key, value in request.headers if key.lower() == name]
            # More than one parent is no parent; states go on (W3C Trace Context, 3.2 and 3.3).
            if values and (len(values) == 1 or name == "tracestate"):
                carrier[name] = ",".join(values)
        span = self._tracer.start_span(
            f"predict {model}",
            context=self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            start_time=request.arrived_at + _epoch_offset(),
            attributes={
                "http.request.method": request.method, "url.path": request.path, "pyserve.request_id": request.id,
                "pyserve.model": model, "pyserve.model_version": version,
            },
        )  # fmt: skip
        injected: dict[str, str] = {}
        self._propagator.inject(injected, context=self._context_of(span))
        request.replace_headers(_NAMES, list(injected.items()))
        return span

    def end(self, stages: Stages, status: int | None) -> None:
        """Ends the request's span and makes those of its stages. ``status``: None if its client has gone."""
        span, stages.span = stages.span, None
        if span is None:
            return
        if span.is_recording():
            offset = _epoch_offset()
            parent = self._context_of(span)
            for name, (began, ended) in stages.times.items():
                child = self._tracer.start_span(name, context=parent, start_time=began + offset)
                child.end(max(began, ended) + offset)
            if stages.release:
                span.set_attribute("pyserve.batch_size", stages.batch_size)
                span.set_attribute("pyserve.release", stages.release)
            if status is None:
                span.set_attribute("error.type", "client disconnected")
            else:
                span.set_attribute("http.response.status_code", status)
            if status is None or status >= 500:
                span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Sends what is left, but waits no longer than CLOSE_S."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSE_S)


def open_tracer(environ: Mapping[str, str] = os.environ) -> Tracer | None:
    """The tracer that the environment asks for; None if it asks for none, or cannot have it, which the log says."""
    named = next((name for name in ENDPOINT_VARIABLES if environ.get(name)), None)
    if named is None or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    protocol = next((environ[name] for name in _PROTOCOL_VARIABLES if environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        log.error("no spans are sent: the OTLP protocol %s is not there; set %s=http/protobuf", protocol,
                  _PROTOCOL_VARIABLES[1])  # fmt: skip
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.error("%s is set, but no spans are sent (%s); pip install opentelemetry-sdk "
                  "opentelemetry-exporter-otlp-proto-http, or unset it", named, error)  # fmt: skip
        return None
    own_name = "service.name" in environ.get("OTEL_RESOURCE_ATTRIBUTES", "") or environ.get("OTEL_SERVICE_NAME")
    attributes: dict[str, Any] = {} if own_name else {"service.name": "pyserve"}
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    log.info("spans are sent to %s", environ[named])
    return Tracer(provider)


def _epoch_offset() -> int:
    """From ns of ``time.monotonic_ns()`` to ns since 1970."""
    return time.time_ns() - time.monotonic_ns()
