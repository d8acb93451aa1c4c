"""W3C trace context: which trace a request belongs to, and a span of it in each process where OTLP export is on.

Dynamo makes spans, too, but its Python binding cannot give the first of them a parent: they are a trace of their
own, whatever the client sent. So the wire's dicts carry `traceparent`, and the spans made here carry the trace on.
Dynamo's settings switch them on and say where they go: OTEL_EXPORT_ENABLED, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT.
"""

import logging
import os
import random
from typing import Any

from opentelemetry.trace import (
    NoOpTracer,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    format_span_id,
    format_trace_id,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.environment import is_on

logger = logging.getLogger(__name__)

EXPORT_TIMEOUT_S = 2.0  # for all tries of one batch; the last one is on the way when a process stops
_PROPAGATOR = TraceContextTextMapPropagator()


class RequestSpan:
    """A request's stay in one process.

    is_first: this process begins a trace where nobody else has. trace_id: 32 hexadecimal digits, "" where the request
    belongs to no trace. traceparent: what came, "" where none did; then what the next process on the way is sent.
    """

    def __init__(self, tracer: Tracer, name: str, traceparent: str, *, is_first: bool) -> None:
        parent = _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {})
        self._span = tracer.start_span(name, context=parent, kind=SpanKind.SERVER)
        context = self._span.get_span_context()
        if is_first and not context.is_valid:
            context = _new_trace()
        self.trace_id = self.traceparent = ""
        if context.is_valid:
            self.trace_id = format_trace_id(context.trace_id)
            self.traceparent = f"00-{self.trace_id}-{format_span_id(context.span_id)}-{context.trace_flags:02x}"

    def end(self, fields: dict[str, Any]) -> None:
        """End the span, with these attributes."""
        if self._span.is_recording():
            self._span.set_attributes({f"chat.{name}": value for name, value in fields.items()})
            if fields["outcome"] not in ("ok", "cancelled"):
                self._span.set_status(StatusCode.ERROR, fields["outcome"])
        self._span.end()


def _new_trace() -> SpanContext:
    return SpanContext(random.getrandbits(128) or 1, random.getrandbits(64) or 1, False, TraceFlags(0))


def tracer_for(component: str) -> Tracer:
    """What makes the spans of one process: nothing, unless OTLP export is on."""
    if not is_on("OTEL_EXPORT_ENABLED"):
        return NoOpTracer()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("no spans of our own: OTEL_EXPORT_ENABLED is set, and %s is not installed", error.name)
        return NoOpTracer()
    service = os.environ.get("OTEL_SERVICE_NAME") or f"chat-{component}"
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=EXPORT_TIMEOUT_S)))
    return provider.get_tracer("dynamo-chat-pipeline")
