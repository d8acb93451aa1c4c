"""The figures of the loads, their table and their plot."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from bench.client import Load, Outcome
from bench.peers import PEERS


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


def measures(peer: str, load: Load, outcome: Outcome) -> Measures:
    whole = [reply for reply in outcome.replies if reply.error is None]
    errors = [reply.error for reply in outcome.replies if reply.error is not None]
    streams = whole if load.is_stream else []
    latencies_ms = [(reply.finished_at - reply.sent_at) * 1000 for reply in whole]
    ttfts_ms = [(reply.first_content_at - reply.sent_at) * 1000 for reply in streams]
    gaps_ms = [[(later - at) * 1000 for at, later in pairwise(reply.arrivals)] for reply in streams]
    num_tokens = len(whole) * load.max_tokens
    return Measures(
        peer, load.num_users, load.is_stream, load.max_tokens, load.num_prompt_words,
        num_requests=len(outcome.replies),
        num_errors=len(errors),
        first_error=errors[0] if errors else None,
        requests_per_s=len(whole) / outcome.seconds,
        tokens_per_s=num_tokens / outcome.seconds,
        latency_p50=percentile(latencies_ms, 50),
        latency_p99=percentile(latencies_ms, 99),
        ttft_p50=percentile(ttfts_ms, 50),
        ttft_p99=percentile(ttfts_ms, 99),
        gap_p50=percentile([gap for gaps in gaps_ms for gap in gaps], 50),
        longest_gap_p99=percentile([max(gaps) for gaps in gaps_ms if gaps], 99),
        tokens_per_event=num_tokens / max(1, sum(len(gaps) + 1 for gaps in gaps_ms)) if load.is_stream else 0.0,
        client_cpu_ms_per_request=outcome.client_cpu_s * 1000 / load.num_requests,
    )  # fmt: skip


Key = tuple[int, int, int, bool, str]  # one peer under one load


def medians(done: Sequence[Measures]) -> dict[Key, tuple[Measures, float]]:
    """The middle round of each peer under each load, by tokens per second, and their spread as a share of the mean."""
    rounds: dict[Key, list[Measures]] = {}
    for of in sorted(done, key=lambda each: each.tokens_per_s):
        rounds.setdefault((of.max_tokens, of.num_prompt_words, of.concurrency, of.is_stream, of.peer), []).append(of)
    return {key: (of_key[(len(of_key) - 1) // 2], _spread(of_key)) for key, of_key in sorted(rounds.items())}


def _spread(rounds: Sequence[Measures]) -> float:
    speeds = [measured.tokens_per_s for measured in rounds]
    return statistics.pstdev(speeds) / (statistics.fmean(speeds) or 1.0)


def row(of: Measures, deviation: float | None = None) -> list[str]:
    """The cells of a table, or what is said while it is measured."""
    load = f"c={of.concurrency}, {of.max_tokens} tokens, {of.num_prompt_words} words"
    return [
        f"{load}, {'streaming' if of.is_stream else 'whole'}",
        PEERS[of.peer].title if of.peer in PEERS else of.peer,
        f"{of.tokens_per_s:,.0f}" + ("" if deviation is None else f" ± {deviation:.0%}"),
        f"{of.latency_p50:.1f} / {of.latency_p99:.1f}",
        f"{of.ttft_p50:.1f} / {of.ttft_p99:.1f}" if of.is_stream else "",
        f"{of.longest_gap_p99:.0f}" if of.is_stream else "",
        f"{of.tokens_per_event:.1f}" if of.is_stream else "",
        f"{sum(of.cpu_ms_per_request.values()):.2f}: "
        + ", ".join(f"{name} {spent:.2f}" for name, spent in of.cpu_ms_per_request.items() if spent >= 0.005),
        f"{of.client_cpu_ms_per_request:.2f}",
        ", ".join(f"{name} {rss:.0f}" for name, rss in of.rss_mib.items() if rss >= 50),
        f"{of.num_errors} of {of.num_requests}" + (f": {of.first_error}" if of.num_errors else ""),
    ]


def markdown(done: Sequence[Measures]) -> str:
    """One row per peer and load."""
    titles = (
        "load | server | tokens/s | latency p50 / p99 ms | TTFT p50 / p99 ms | longest gap p99 ms | tokens/event "
        "| CPU ms/request | the client's | memory MiB | failed"
    )
    rows = [
        titles,
        "|".join("---" for _ in titles.split("|")),
        *(" | ".join(row(*each)) for each in medians(done).values()),
    ]
    return "".join(f"| {each} |\n" for each in rows)


def plot(done: Sequence[Measures], path: Path) -> None:
    """Tokens per second against concurrency, streaming and not."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    found = [measured for measured, _ in medians(done).values()]
    for axis, is_stream in zip(axes, (False, True), strict=True):
        for name in dict.fromkeys(measured.peer for measured in found):
            mine = [each for each in found if each.peer == name and each.is_stream == is_stream]
            points = sorted((each.concurrency, each.tokens_per_s) for each in mine)
            axis.plot(*zip(*points, strict=True), marker="o", label=PEERS[name].title.replace("`", ""))
        axis.set(title="streaming" if is_stream else "not streaming", xlabel="concurrent requests")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("output tokens/s")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def write_report(done: Sequence[Measures], folder: Path, name: str) -> None:
    (folder / f"{name}.md").write_text(markdown(done))
    try:
        plot(done, folder / f"{name}.png")
    except ImportError:  # a GPU machine may have just what the servers need
        print("no plot: matplotlib is not installed")
    print(f"written: {folder}/{name}.json, .md and .png")
