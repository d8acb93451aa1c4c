"""The figures of one load on one server, from our own client's replies or from what `bench_serving` found."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from bench.client import Load, Outcome


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank; 0 for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


@dataclass
class Measures:
    """Times in milliseconds, memory in MiB.

    ttft: from sending a request to the first text of its stream. gap: between two reads of one stream that brought
    events; longest_gap: the longest of each stream. cpu_ms_per_request, rss_mib: by process of the server.
    """

    peer: str
    concurrency: int
    is_stream: bool
    max_tokens: int
    num_prompt_words: int
    num_requests: int
    num_errors: int
    first_error: str | None
    requests_per_s: float
    tokens_per_s: float
    latency_p50: float
    latency_p99: float
    ttft_p50: float = 0.0
    ttft_p99: float = 0.0
    gap_p50: float = 0.0
    longest_gap_p99: float = 0.0
    tokens_per_event: float = 0.0
    client_cpu_ms_per_request: float = 0.0
    cpu_ms_per_request: dict[str, float] = field(default_factory=dict)
    rss_mib: dict[str, float] = field(default_factory=dict)


def measures(
    peer: str, load: Load, *, latencies_ms: Sequence[float], ttfts_ms: Sequence[float], gaps_ms: Sequence[list[float]],
    errors: Sequence[str], seconds: float, client_cpu_s: float = 0.0,
) -> Measures:  # fmt: skip
    """latencies_ms, ttfts_ms, gaps_ms: of the answers that came whole; the latter two empty without streaming."""
    num_tokens = len(latencies_ms) * load.max_tokens
    return Measures(
        peer, load.num_users, load.is_stream, load.max_tokens, load.num_prompt_words,
        num_requests=len(latencies_ms) + len(errors),
        num_errors=len(errors),
        first_error=errors[0] if errors else None,
        requests_per_s=len(latencies_ms) / seconds,
        tokens_per_s=num_tokens / seconds,
        latency_p50=percentile(latencies_ms, 50),
        latency_p99=percentile(latencies_ms, 99),
        ttft_p50=percentile(ttfts_ms, 50),
        ttft_p99=percentile(ttfts_ms, 99),
        gap_p50=percentile([gap for gaps in gaps_ms for gap in gaps], 50),
        longest_gap_p99=percentile([max(gaps) for gaps in gaps_ms if gaps], 99),
        tokens_per_event=num_tokens / max(1, sum(len(gaps) + 1 for gaps in gaps_ms)) if load.is_stream else 0.0,
        client_cpu_ms_per_request=client_cpu_s * 1000 / load.num_requests,
    )  # fmt: skip


def of_outcome(peer: str, load: Load, outcome: Outcome) -> Measures:
    good = [reply for reply in outcome.replies if reply.error is None]
    return measures(
        peer, load,
        latencies_ms=[(reply.finished_at - reply.sent_at) * 1000 for reply in good],
        ttfts_ms=[(reply.first_content_at - reply.sent_at) * 1000 for reply in good if load.is_stream],
        gaps_ms=[[(b - a) * 1000 for a, b in pairwise(reply.arrivals)] for reply in good if load.is_stream],
        errors=[reply.error for reply in outcome.replies if reply.error is not None],
        seconds=max(reply.finished_at for reply in outcome.replies) - outcome.started_at,
        client_cpu_s=outcome.client_cpu_s,
    )  # fmt: skip


def of_bench_serving(peer: str, load: Load, found: dict[str, Any]) -> Measures:
    """found: a line of its output file, with `--output-details`. Items of `itls`: a stream's gaps."""
    is_whole = [
        not error and num == load.max_tokens for error, num in zip(found["errors"], found["output_lens"], strict=True)
    ]
    whole = [index for index, is_one in enumerate(is_whole) if is_one]
    gaps_ms = [[gap * 1000 for gap in found["itls"][index]] for index in whole]
    return measures(
        peer, load,
        latencies_ms=[(found["ttfts"][index] + sum(found["itls"][index])) * 1000 for index in whole],
        ttfts_ms=[found["ttfts"][index] * 1000 for index in whole if load.is_stream],
        gaps_ms=gaps_ms if load.is_stream else [],
        errors=[found["errors"][index] or "not all tokens" for index, is_one in enumerate(is_whole) if not is_one],
        seconds=found["duration"],
    )  # fmt: skip
