"""The figures of one load on one server."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from bench.http_client import Reply
from bench.load import Outcome


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank; 0 for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


@dataclass
class Measures:
    """Times in milliseconds, memory in MiB.

    ttft: from sending a request to the first text of its stream. gap: between two reads of one stream that brought
    events. longest_gap: the longest of each stream. cpu_ms_per_request, rss_mib: by process of the server.
    """

    peer: str
    concurrency: int
    is_stream: bool
    num_requests: int
    num_errors: int
    first_error: str | None
    wall_s: float
    requests_per_s: float
    tokens_per_s: float
    tokens_per_event: float
    latency_p50: float
    latency_p99: float
    ttft_p50: float
    ttft_p99: float
    gap_p50: float
    gap_p99: float
    longest_gap_p50: float
    longest_gap_p99: float
    client_cpu_ms_per_request: float
    rate_per_s: float | None = None
    max_tokens: int = 128
    num_prompt_words: int = 64
    cpu_ms_per_request: dict[str, float] = field(default_factory=dict)
    rss_mib: dict[str, float] = field(default_factory=dict)


def measures(outcome: Outcome, *, peer: str, concurrency: int, is_stream: bool, max_tokens: int) -> Measures:
    for reply in outcome.replies:
        if reply.error is None and reply.num_tokens != max_tokens:
            reply.error = f"{reply.num_tokens} tokens instead of {max_tokens}"
    good = [reply for reply in outcome.replies if reply.error is None]
    errors = [reply.error for reply in outcome.replies if reply.error is not None]
    wall_s = max((reply.finished_at for reply in outcome.replies), default=0.0) - outcome.started_at
    num_tokens = sum(reply.num_tokens for reply in good)
    gaps = [_gaps_ms(reply) for reply in good]
    all_gaps = [gap for of_one in gaps for gap in of_one]
    longest = [max(of_one) for of_one in gaps if of_one]
    latencies = [(reply.finished_at - reply.sent_at) * 1000 for reply in good]
    ttfts = [(reply.first_content_at - reply.sent_at) * 1000 for reply in good if reply.first_content_at]
    return Measures(
        peer=peer,
        concurrency=concurrency,
        is_stream=is_stream,
        num_requests=len(outcome.replies),
        num_errors=len(errors),
        first_error=errors[0] if errors else None,
        wall_s=wall_s,
        requests_per_s=len(good) / wall_s,
        tokens_per_s=num_tokens / wall_s,
        tokens_per_event=num_tokens / max(1, sum(len(reply.arrivals) for reply in good)) if is_stream else 0.0,
        latency_p50=percentile(latencies, 50),
        latency_p99=percentile(latencies, 99),
        ttft_p50=percentile(ttfts, 50),
        ttft_p99=percentile(ttfts, 99),
        gap_p50=percentile(all_gaps, 50),
        gap_p99=percentile(all_gaps, 99),
        longest_gap_p50=percentile(longest, 50),
        longest_gap_p99=percentile(longest, 99),
        client_cpu_ms_per_request=outcome.client_cpu_s * 1000 / max(1, len(outcome.replies)),
        max_tokens=max_tokens,
    )


def _gaps_ms(reply: Reply) -> list[float]:
    arrivals = reply.arrivals
    return [(later - earlier) * 1000 for earlier, later in pairwise(arrivals)]


def median_round(rounds: Sequence[Measures]) -> Measures:
    """The middle one of several rounds by tokens per second: one that was measured, not a mixture."""
    ordered = sorted(rounds, key=lambda measured: measured.tokens_per_s)
    return ordered[(len(ordered) - 1) // 2]


def spread(rounds: Sequence[Measures]) -> float:
    """Standard deviation of tokens per second over the rounds, as a share of their mean."""
    speeds = [measured.tokens_per_s for measured in rounds]
    return statistics.pstdev(speeds) / statistics.fmean(speeds) if len(speeds) > 1 else 0.0
