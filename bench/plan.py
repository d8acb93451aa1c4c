"""Which loads a lane puts on which peers, round after round, and what came of it."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass

import psutil

from bench.load import Load
from bench.measures import Measures, measures
from bench.peers import Peer
from bench.processes import frozen

_PROMPTS_PER_LOAD = 1_000_000
_ENOUGH_CPUS = 12


@dataclass(frozen=True)
class Case:
    """One load; `requests_per_user` is how often each of the `concurrency` users asks."""

    concurrency: int
    is_stream: bool
    requests_per_user: int
    max_tokens: int = 128
    num_prompt_words: int = 64
    rate_per_s: float | None = None

    def load(self, first_prompt: int, *, requests_per_user: int | None = None) -> Load:
        return Load(
            url="",
            model="",
            num_users=self.concurrency,
            requests_per_user=requests_per_user or self.requests_per_user,
            is_stream=self.is_stream,
            max_tokens=self.max_tokens,
            num_prompt_words=self.num_prompt_words,
            first_prompt=first_prompt,
            rate_per_s=self.rate_per_s,
        )


class Measuring:
    """Runs cases on peers in turn, so that each round sees all peers under the same conditions.

    Only one peer's SGLang runs at a time: the schedulers of the others are frozen. Where there are CPUs enough they
    share one, the last: on rented machines one CPU may be a third faster than another, for as long as a run lasts.
    """

    def __init__(self, peers: Sequence[Peer], executor: Executor, report: Callable[[Measures], None]) -> None:
        self._peers, self._executor, self._report = peers, executor, report
        self._num_loads = 0
        if (num_cpus := psutil.cpu_count() or 1) >= _ENOUGH_CPUS:
            for scheduler in (process for peer in peers for process in peer.schedulers()):
                scheduler.cpu_affinity([num_cpus - 1])  # its main thread, which never sleeps

    def run(self, cases: Sequence[Case], *, num_rounds: int, until: float) -> None:
        """until: a time of `time.monotonic` after which nothing new is started."""
        for _ in range(num_rounds):
            for case in cases:
                for peer in self._peers:
                    if time.monotonic() < until:
                        self._report(self.measure(peer, case))

    def measure(self, peer: Peer, case: Case) -> Measures:
        with ExitStack() as stack:
            others = [process for other in self._peers if other is not peer for process in other.schedulers()]
            stack.enter_context(frozen(others))
            peer.answer(case.load(self._first_prompt(), requests_per_user=1), self._executor)  # warms it up
            before = peer.usage()
            outcome = peer.answer(case.load(self._first_prompt()), self._executor)
            after = peer.usage()
        measured = measures(
            outcome,
            peer=peer.name,
            concurrency=case.concurrency,
            is_stream=case.is_stream,
            max_tokens=case.max_tokens,
        )
        measured.rate_per_s, measured.num_prompt_words = case.rate_per_s, case.num_prompt_words
        cpu_s = after.cpu_since(before)
        measured.cpu_ms_per_request = {name: spent * 1000 / measured.num_requests for name, spent in cpu_s.items()}
        measured.rss_mib = after.rss_mib
        return measured

    def _first_prompt(self) -> int:
        self._num_loads += 1
        return self._num_loads * _PROMPTS_PER_LOAD
