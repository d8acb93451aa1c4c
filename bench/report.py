"""The table and the plot for the README; `python -m bench.report FILE.json` makes them again from earlier results."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measures import Measures, median_round, spread
from bench.peers import PEERS


@dataclass(frozen=True, order=True)
class Key:
    """One peer under one load."""

    rate_per_s: float
    max_tokens: int
    num_prompt_words: int
    concurrency: int
    is_stream: bool
    peer: str

    @classmethod
    def of(cls, measured: Measures) -> "Key":
        return cls(
            measured.rate_per_s or 0.0,
            measured.max_tokens,
            measured.num_prompt_words,
            measured.concurrency,
            measured.is_stream,
            measured.peer,
        )

    @property
    def load(self) -> str:
        parts = [f"{self.rate_per_s:.0f} requests/s" if self.rate_per_s else f"c={self.concurrency}"]
        parts += [f"{self.max_tokens} tokens"] if self.max_tokens != Measures.max_tokens else []
        parts += [f"{self.num_prompt_words} words"] if self.num_prompt_words != Measures.num_prompt_words else []
        return ", ".join([*parts, "streaming" if self.is_stream else "whole"])


def title(peer: str) -> str:
    """A variant of an earlier run has only its name."""
    return PEERS[peer].title if peer in PEERS else peer


def medians(done: Iterable[Measures]) -> dict[Key, tuple[Measures, float]]:
    """The median round of each peer under each load, and the spread of the rounds."""
    rounds: dict[Key, list[Measures]] = {}
    for measured in done:
        rounds.setdefault(Key.of(measured), []).append(measured)
    return {key: (median_round(of_key), spread(of_key)) for key, of_key in sorted(rounds.items())}


def markdown(done: Sequence[Measures]) -> str:
    """One row a peer and load."""
    rows = [
        "| load | server | tokens/s | requests/s | latency p50 / p99 ms | TTFT p50 / p99 ms | gap p50 / p99 ms "
        "| longest gap p99 ms | CPU ms/request | memory MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, (measured, deviation) in medians(done).items():
        columns = [
            key.load,
            title(measured.peer),
            f"{measured.tokens_per_s:,.0f} ± {deviation:.0%}",
            f"{measured.requests_per_s:.1f}",
            f"{measured.latency_p50:.0f} / {measured.latency_p99:.0f}",
            *(
                (
                    f"{measured.ttft_p50:.1f} / {measured.ttft_p99:.1f}",
                    f"{measured.gap_p50:.1f} / {measured.gap_p99:.1f}",
                    f"{measured.longest_gap_p99:.0f}",
                )
                if measured.is_stream
                else ("", "", "")
            ),
            ", ".join(f"{name} {spent:.2f}" for name, spent in measured.cpu_ms_per_request.items() if spent >= 0.01),
            ", ".join(f"{name} {rss:.0f}" for name, rss in measured.rss_mib.items() if rss >= 50),
        ]
        rows.append("| " + " | ".join(columns) + " |")
    errors = sum(measured.num_errors for measured in done)
    return "\n".join(rows) + f"\n\nFailed requests: {errors} of {sum(measured.num_requests for measured in done)}.\n"


def plot(done: Sequence[Measures], path: Path) -> None:
    """Tokens per second against concurrency, streaming and not."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    found = medians(measured for measured in done if measured.rate_per_s is None)
    for axis, is_stream in zip(axes, (False, True), strict=True):
        for name, peer in PEERS.items():
            points = sorted(
                (key.concurrency, found[key][0].tokens_per_s)
                for key in found
                if key.peer == name and key.is_stream == is_stream
            )
            if points:
                style = {"linewidth": 2.5, "zorder": 3} if name == "ours" else {"linewidth": 1.2}
                axis.plot(*zip(*points, strict=True), marker="o", label=peer.title.replace("`", ""), **style)
        axis.set_title("streaming" if is_stream else "not streaming")
        axis.set_xlabel("concurrent requests")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("output tokens/s")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def write_report(done: Sequence[Measures], folder: Path, name: str) -> None:
    if not done:
        print("nothing was measured")
        return
    (folder / f"{name}.md").write_text(markdown(done))
    try:
        plot(done, folder / f"{name}.png")
    except ImportError:  # a GPU machine may have just what the servers need
        print("no plot: matplotlib is not installed")
    print(f"written: {folder}/{name}.json, .md and .png")


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write_report([Measures(**each) for each in json.loads(source.read_text())], source.parent, source.stem)
