"""One request, as one process sees it: what it was about, how fast its tokens came, and how it ended.

What is noted here goes to the metrics, to one line in the log, and to a span, all of it when the request ends.
"""

import logging
import time
from types import TracebackType
from typing import Any

from common.errors import InternalError, PipelineError
from common.observability.metrics import Metrics
from common.observability.request_path import RequestPath
from common.observability.tracing import RequestSpan, tracer_for
from common.wire import Origin, ProcessorChunk

OK = "ok"
CANCELLED = "cancelled"


class RequestRecord:
    """A context manager around the answering of one request.

    model: the name asked for. num_prompt_tokens, num_completion_tokens: so far. is_streamed: whether the times of
    single tokens say something. time_to_first_token_s: from arrival, None where there was none, or no stream.
    path: which way the request went, where somebody asks for that.
    outcome: "ok", "cancelled" or an error's code; an exception that ends the block says it, too.
    """

    def __init__(self, metrics: Metrics, logger: logging.Logger, span: RequestSpan, request_id: str) -> None:
        self._metrics, self._logger, self._span = metrics, logger, span
        self._request_id = request_id
        self.about = self.model = ""
        self.num_prompt_tokens = self.num_completion_tokens = 0
        self.is_streamed = False
        self.time_to_first_token_s: float | None = None
        self.path: RequestPath | None = None
        self.outcome = CANCELLED  # until something else is known
        self._started_s = time.monotonic()
        self._last_s: dict[int, float] = {}
        self._details: dict[str, Any] = {}

    @property
    def origin(self) -> Origin:
        """For the next process on the request's way."""
        return Origin(self._request_id, self._span.traceparent)

    def _first_token(self) -> None:
        self.time_to_first_token_s = time.monotonic() - self._started_s
        self._metrics.time_to_first_token.observe(self.time_to_first_token_s)

    def add_tokens(self, num_tokens: int, choice: int = 0) -> None:
        """Note the tokens of a chunk that has just come. choice: which of several answers it is part of."""
        self.num_completion_tokens += num_tokens
        if not self.is_streamed or not num_tokens:
            return
        now_s = time.monotonic()
        if (last_s := self._last_s.get(choice)) is not None:
            self._metrics.inter_token_latency.observe((now_s - last_s) / num_tokens)
        elif not self._last_s:
            self._first_token()
        self._last_s[choice] = now_s

    def add_text(self, chunk: ProcessorChunk, num_choices: int) -> None:
        """Note a chunk that has just come: text, and with the last one how many tokens it took."""
        if chunk.content and self.is_streamed and self.time_to_first_token_s is None:
            self._first_token()
        if chunk.usage is None:
            return
        self.num_prompt_tokens, self.num_completion_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        num_later_tokens = self.num_completion_tokens / num_choices - 1
        if self.time_to_first_token_s is not None and num_later_tokens > 0:
            generating_s = time.monotonic() - self._started_s - self.time_to_first_token_s
            self._metrics.time_per_output_token.observe(generating_s / num_later_tokens)

    def finish(self, finish_reason: str | None = None, *, queue_time_s: float | None = None) -> None:
        """Note that the answer is complete. queue_time_s: how long the request had waited, if that is known."""
        self.outcome = OK
        if finish_reason is not None:
            self._details["finish_reason"] = finish_reason
        if queue_time_s is not None:
            self._details["queue_time_s"] = round(queue_time_s, 6)
            self._metrics.queue_time.observe(queue_time_s)

    def __enter__(self) -> "RequestRecord":
        self._metrics.in_flight.inc()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        duration_s = time.monotonic() - self._started_s
        if isinstance(error, PipelineError):
            self.outcome = error.outcome
        elif isinstance(error, Exception):  # not GeneratorExit and CancelledError
            self.outcome = InternalError.code
        self._metrics.in_flight.dec()
        self._metrics.requests(self.outcome).inc()
        self._metrics.duration.observe(duration_s)
        self._metrics.prompt_tokens.inc(self.num_prompt_tokens)
        self._metrics.completion_tokens.inc(self.num_completion_tokens)
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
        if self.time_to_first_token_s is not None:
            fields["time_to_first_token_s"] = round(self.time_to_first_token_s, 6)
        return {name: value for name, value in fields.items() if value != ""}


class RequestRecords:
    """Begins the records of one process' requests, with the process' own metrics, logger and spans."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._logger = logging.getLogger(metrics.component)
        self._tracer = tracer_for(metrics.component)

    def begin(self, origin: Origin) -> RequestRecord:
        is_first = self._metrics.component == "frontend"
        span = RequestSpan(self._tracer, self._metrics.component, origin.traceparent, is_first=is_first)
        return RequestRecord(self._metrics, self._logger, span, origin.request_id)
