"""One request, as one process sees it: what it was about, where it went, how fast its tokens came, and how it ended.

What is noted here goes to the metrics, to one line in the log, and to a span, all of it when the request ends; and its
path goes to those who ask to see it. Each process tells of itself: when its first and its last dict left, and whom it
called meanwhile. All times count from the moment at which that process received the request, by its own clock: no two
clocks are ever compared. The caller knows which instance it called, so nobody needs to know its own name. The time of a
call that the worker does not account for was spent between the two processes.

Dynamo makes spans, too, but its Python binding cannot give the first of them a parent: they are a trace of their
own, whatever the client sent. So the wire's dicts carry `traceparent` (W3C trace context), and the spans made here
carry the trace on. Dynamo's settings switch them on and say where they go: OTEL_EXPORT_ENABLED,
OTEL_EXPORTER_OTLP_TRACES_ENDPOINT.
"""

import logging
import os
import random
import time
from types import TracebackType
from typing import Any

from opentelemetry import trace as otel
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from common.environment import is_on
from common.errors import InternalError, PipelineError
from common.observability.metrics import Metrics
from common.openai.request import ChatCompletionRequest
from common.wire import (
    CallTrace,
    EngineChunk,
    EngineRequest,
    Envelope,
    HopTrace,
    ProcessorChunk,
    RouteTrace,
    WorkerFound,
    WorkerQuestion,
)

SHOW_PATH_HEADER = "x-show-path"
OK, CANCELLED = "ok", "cancelled"
_EXPORT_TIMEOUT_S = 2.0  # for all tries of one batch; the last one is on the way when a process stops
_PROPAGATOR = TraceContextTextMapPropagator()

logger = logging.getLogger(__name__)


class RequestPath:
    """What one process notes about one request. Begin it when the request arrives."""

    def __init__(self) -> None:
        self._received_ns = time.monotonic_ns()
        self.trace = HopTrace()

    def now_us(self) -> int:
        return (time.monotonic_ns() - self._received_ns) // 1000

    def passed(self, trace: HopTrace | CallTrace) -> None:
        """Note that something leaves this process, or comes from one that it calls."""
        trace.last_us = self.now_us()
        if trace.first_us is None:
            trace.first_us = trace.last_us

    def answering(self) -> None:
        self.passed(self.trace)


class RequestSpan:
    """A request's stay in one process.

    trace_id: 32 hexadecimal digits, "" where the request belongs to no trace; a frontend begins one where nobody else
    has. traceparent: what came, "" where none did; then what the next process on the way is sent.
    """

    def __init__(self, tracer: otel.Tracer, component: str, traceparent: str) -> None:
        parent = _PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {})
        self._span = tracer.start_span(component, context=parent, kind=otel.SpanKind.SERVER)
        context = self._span.get_span_context()
        if component == "frontend" and not context.is_valid:
            context = otel.SpanContext(random.getrandbits(128) or 1, random.getrandbits(64) or 1, is_remote=False)
        self.trace_id = self.traceparent = ""
        if context.is_valid:
            self.trace_id = otel.format_trace_id(context.trace_id)
            self.traceparent = f"00-{self.trace_id}-{otel.format_span_id(context.span_id)}-{context.trace_flags:02x}"

    def end(self, fields: dict[str, Any]) -> None:
        """End the span, with these attributes."""
        if self._span.is_recording():
            self._span.set_attributes({f"chat.{name}": value for name, value in fields.items()})
            if fields["outcome"] not in (OK, CANCELLED):
                self._span.set_status(otel.StatusCode.ERROR, fields["outcome"])
        self._span.end()


class RequestRecord:
    """A context manager around the answering of one request.

    model: the name asked for. num_prompt_tokens, num_completion_tokens: so far. is_streamed: whether the times of
    single tokens mean anything. time_to_first_token_s: from arrival, None where there was none, or no stream.
    path: where the request went, for those who ask to see it.
    outcome: "ok", "cancelled" or an error's code; an exception that ends the block sets it, too.
    """

    def __init__(self, metrics: Metrics, logger: logging.Logger, span: RequestSpan, envelope: Envelope) -> None:
        self.metrics, self._logger, self._span = metrics, logger, span
        self._request_id = envelope.request_id
        self.about = self.model = ""
        self.num_prompt_tokens = self.num_completion_tokens = 0
        self.is_streamed = False
        self.time_to_first_token_s: float | None = None
        self.path = RequestPath() if envelope.show_path else None
        self.outcome = CANCELLED  # until something else is known
        self._num_choices = 1
        self._last_tokens_s: float | None = None
        self._started_s = time.monotonic()
        self._details: dict[str, Any] = {}

    @property
    def envelope(self) -> Envelope:
        """For the calls that are made to answer the request."""
        return Envelope(self._request_id, self._span.traceparent, self.path is not None)

    def asks(self, request: ChatCompletionRequest | EngineRequest | WorkerQuestion) -> None:
        """Note what is asked for."""
        if isinstance(request, WorkerQuestion):
            self.num_prompt_tokens = request.num_prompt_tokens
        elif isinstance(request, EngineRequest):
            self.num_prompt_tokens, self.is_streamed = len(request.token_ids), request.output_options.stream
        else:
            self.model, self.is_streamed, self._num_choices = request.model, request.stream, request.n

    def calling(self, instance_id: int, route: RouteTrace | None = None) -> "CallRecord":
        """For one call of an instance, made to answer the request."""
        return CallRecord(self, instance_id, route)

    def answers(self, chunk: ProcessorChunk | EngineChunk | WorkerFound) -> None:
        """Note a chunk that is about to leave. The last one takes the path along, where it is asked for."""
        if isinstance(chunk, WorkerFound):  # the stream that stays open is the booking
            self.finish()
            return
        if isinstance(chunk, EngineChunk):
            self._last_tokens_s = self.add_tokens(len(chunk.token_ids), self._last_tokens_s)
            if chunk.cached_tokens:
                self.metrics.cached_prompt_tokens.inc(chunk.cached_tokens)
        if chunk.finish_reason is not None and (isinstance(chunk, EngineChunk) or chunk.usage is not None):
            self.finish(chunk.finish_reason)
        if self.path is not None:
            self.path.answering()
            if chunk.finish_reason is not None:
                chunk.path = self.path.trace

    def add_text(self, chunk: ProcessorChunk) -> None:
        """Note a chunk that has just come: text, and with the last one how many tokens it took."""
        if chunk.content:
            self.first_token()
        if chunk.usage is None:
            return
        self.num_prompt_tokens, self.num_completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        num_later_tokens = self.num_completion_tokens / self._num_choices - 1
        if self.time_to_first_token_s is not None and num_later_tokens > 0:
            generating_s = time.monotonic() - self._started_s - self.time_to_first_token_s
            self.metrics.time_per_output_token.observe(generating_s / num_later_tokens)

    def add_tokens(self, num_tokens: int, last_s: float | None) -> float | None:
        """Note tokens of a sequence that have just come, and how long after its last ones; returns when they came."""
        self.num_completion_tokens += num_tokens
        if not self.is_streamed or not num_tokens:
            return last_s
        self.first_token()
        now_s = time.monotonic()
        if last_s is not None:
            self.metrics.inter_token_latency.observe((now_s - last_s) / num_tokens)
        return now_s

    def first_token(self) -> None:
        """Note the first token of a stream; later ones may call this, too."""
        if self.is_streamed and self.time_to_first_token_s is None:
            self.time_to_first_token_s = time.monotonic() - self._started_s
            self._details["time_to_first_token_s"] = round(self.time_to_first_token_s, 6)
            self.metrics.time_to_first_token.observe(self.time_to_first_token_s)

    def waited(self, queue_time_s: float) -> None:
        """Note how long the request was in SGLang's queue."""
        self._details["queue_time_s"] = round(queue_time_s, 6)
        self.metrics.queue_time.observe(queue_time_s)

    def finish(self, finish_reason: str | None = None) -> None:
        """Note that the answer is complete."""
        self.outcome = OK
        if finish_reason is not None:
            self._details["finish_reason"] = finish_reason

    def __enter__(self) -> "RequestRecord":
        self.metrics.in_flight.inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        duration_s = time.monotonic() - self._started_s
        if isinstance(error, PipelineError):
            self.outcome = error.outcome
        elif isinstance(error, Exception):  # not GeneratorExit and CancelledError
            self.outcome = InternalError.code
        self.metrics.in_flight.dec()
        self.metrics.requests(self.outcome).inc()
        self.metrics.duration.observe(duration_s)
        self.metrics.prompt_tokens.inc(self.num_prompt_tokens)
        self.metrics.completion_tokens.inc(self.num_completion_tokens)
        fields = self._fields(duration_s)
        self._span.end(fields)
        # stacklevel: the line is the handler's, not this module's.
        self._logger.info("%s", self._line(duration_s), extra={"fields": fields}, stacklevel=2)

    def _line(self, duration_s: float) -> str:
        parts = [self.about, self.outcome, self.model and f"model {self.model}"]
        if self.num_prompt_tokens:
            parts.append(f"{self.num_prompt_tokens} prompt tokens, {self.num_completion_tokens} completion tokens")
        if self.time_to_first_token_s is not None:
            parts.append(f"first token after {self.time_to_first_token_s * 1000:.0f} ms")
        parts.append(f"{duration_s * 1000:.0f} ms")
        return f"request {self._request_id}: {', '.join(filter(None, parts))}"

    def _fields(self, duration_s: float) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "request_id": self._request_id,
            "trace_id": self._span.trace_id,
            "model": self.model,
            "outcome": self.outcome,
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "duration_s": round(duration_s, 6),
            **self._details,
        }
        return {name: value for name, value in fields.items() if value != ""}


class CallRecord:
    """What a caller notes about one call of an instance."""

    def __init__(self, record: RequestRecord, instance_id: int, route: RouteTrace | None) -> None:
        self._record, self._path = record, record.path
        self._last_tokens_s: float | None = None
        if self._path is not None:
            self._trace = CallTrace(instance=f"{instance_id:x}", called_us=self._path.now_us(), route=route)
            self._path.trace.calls.append(self._trace)

    def received(self, chunk: ProcessorChunk | EngineChunk) -> None:
        if isinstance(chunk, EngineChunk):
            self._last_tokens_s = self._record.add_tokens(len(chunk.token_ids), self._last_tokens_s)
        else:
            self._record.add_text(chunk)
        if self._path is not None:
            self._path.passed(self._trace)
            self._trace.stage = chunk.path or self._trace.stage

    def broke(self) -> None:
        if self._path is not None:
            self._trace.last_us, self._trace.is_broken = self._path.now_us(), True


class RequestRecords:
    """Begins the records of one process' requests, with the process' own metrics, logger and spans."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._logger = logging.getLogger(metrics.component)
        self._tracer = _tracer_for(metrics.component)

    def begin(self, envelope: Envelope) -> RequestRecord:
        span = RequestSpan(self._tracer, self._metrics.component, envelope.traceparent)
        return RequestRecord(self._metrics, self._logger, span, envelope)


def _tracer_for(component: str) -> otel.Tracer:
    """What makes the spans of one process: nothing, unless OTLP export is on."""
    if not is_on("OTEL_EXPORT_ENABLED"):
        return otel.NoOpTracer()
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("no spans of our own: OTEL_EXPORT_ENABLED is set, and %s is not installed", error.name)
        return otel.NoOpTracer()
    service = os.environ.get("OTEL_SERVICE_NAME") or f"chat-{component}"
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=_EXPORT_TIMEOUT_S)))
    return provider.get_tracer("dynamo-chat-pipeline")
