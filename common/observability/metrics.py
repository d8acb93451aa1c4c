"""What a process counts, in Prometheus' format: the only module that knows the metrics' names.

All processes use the same names with a label `component`; docs/observability.md lists them. Children of
labelled metrics are looked up once, when the process starts or with a request, and never with a chunk.
"""

from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

_DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_PER_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_DECISION_BUCKETS = (0.00005, 0.0001, 0.0002, 0.0003, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a timestamp beside each series would double their number


class CallMetrics(NamedTuple):
    """What a `FailoverClient` counts. See the names in `Metrics`."""

    retries: Counter
    migrations: Counter


class Metrics:
    """The metrics of one process. component: "frontend", "processor", "engine" or "router".

    Times in seconds. A metric that a component never touches is left out of what it shows.
    """

    def __init__(self, component: str) -> None:
        self.component = component
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._requests = self._counter("requests", "Requests answered, by how they ended.", "outcome")
        for outcome in ("ok", "cancelled"):  # there from the start, so that a rate can be taken of the first one
            self._requests.labels(component, outcome)
        self.in_flight = self._gauge("requests_in_flight", "Requests being answered.").labels(component)
        self.duration = self._histogram(
            "request_duration_seconds", "From a request's arrival to the end of its answer.", _DURATION_BUCKETS
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token; streams only.",
            _DURATION_BUCKETS,
        )  # fmt: skip
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.").labels(component)
        self.completion_tokens = self._counter("completion_tokens", "Tokens generated.").labels(component)
        if component in ("engine", "router"):
            self.cached_prompt_tokens = self._counter(
                "cached_prompt_tokens", "Tokens of prompts that were cached; in a router, at the chosen workers."
            ).labels(component)
        if component == "router":
            self._decisions = self._counter("routing_decisions", "Prompts that a worker was chosen for.", "worker")
            self._decision_time = self._histogram(
                "routing_decision_seconds", "How long a worker was chosen for.", _DECISION_BUCKETS
            )
            return
        if component == "frontend":
            self.time_per_output_token = self._histogram(
                "time_per_output_token_seconds",
                "A stream's time from its first token to its last, divided by the tokens after the first.",
                _PER_TOKEN_BUCKETS,
            )
        else:
            self.inter_token_latency = self._histogram(
                "inter_token_latency_seconds",
                "The time since a stream's last chunk, divided by the tokens in this one.",
                _PER_TOKEN_BUCKETS,
            )
        if component == "engine":
            self.queue_time = self._histogram(
                "queue_time_seconds",
                "How long SGLang let a request wait before it began with it; with --enable-metrics.",
                _DURATION_BUCKETS,
            )
        else:
            self._retries = self._counter(
                "retries", "Calls repeated on another instance, before anything of the answer had come.", "endpoint"
            )
            self._migrations = self._counter(
                "migrations", "Answers that went on with another instance, or began anew there.", "endpoint"
            )
            self._instances = self._gauge("instances", "Instances of an endpoint that etcd lists.", "endpoint")

    def requests(self, outcome: str) -> Counter:
        """The counter for one outcome: "ok", "cancelled", or an error's code."""
        return self._requests.labels(self.component, outcome)

    def decided(self, worker_id: int, num_cached_tokens: int, duration_s: float) -> None:
        """A router has chosen."""
        self._decisions.labels(self.component, f"{worker_id:x}").inc()
        self.cached_prompt_tokens.inc(num_cached_tokens)
        self._decision_time.observe(duration_s)

    def forget_worker(self, worker_id: int) -> None:
        """It has left."""
        self._decisions.remove(self.component, f"{worker_id:x}")

    def calls_of(self, endpoint: str, num_instances: Callable[[], int]) -> CallMetrics:
        """The metrics of calling one endpoint."""
        self._instances.labels(self.component, endpoint).set_function(num_instances)
        return CallMetrics(
            self._retries.labels(self.component, endpoint), self._migrations.labels(self.component, endpoint)
        )

    def text(self) -> str:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ("component", *labels), namespace="dynamo_chat", registry=self._registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, ("component", *labels), namespace="dynamo_chat", registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            name, text, ("component",), namespace="dynamo_chat", registry=self._registry, buckets=buckets
        ).labels(self.component)
