"""Prefill batching: new requests wait for each other, so that a busy engine is interrupted less often.

SGLang takes requests one by one as they arrive, and each time stops all running streams for a prefill: more than ten
milliseconds on an H100, for one prompt as for thirty. Under load that is half of the time. Here the first of some
new requests waits a moment for the others: the longer, the more streams they would interrupt and the longer the last
interruption took, and never where nothing is running.

common/sglang/plugins.py calls `register` in the engine's processes. What SGLang has itself:
`--scheduler-recv-interval` counts steps, so it also delays one new request beside one stream;
`--enable-prefill-delayer` costs an exchange among ranks in each step (both measured, see docs/performance.md).
"""

import time
from collections.abc import Callable
from typing import Any

# New requests wait for as long as they would interrupt, times this: for each running stream, and at most.
INTERRUPTIONS_PER_STREAM = 1 / 32
MAX_INTERRUPTIONS = 2.0
MAX_WAIT_S = 0.1


class PrefillBatching:
    """Decides when waiting requests are prefilled. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_streams = 0
        self._interruption_s = 0.0
        self._taken_at: float | None = None
        self._first_came_at: float | None = None

    def is_due(self, last_batch: Any, is_any_waiting: Callable[[], bool]) -> bool:
        """Whether waiting requests may be taken now. last_batch: SGLang's of the last step, None where it idles."""
        now = self._clock()
        if last_batch is None:
            self._num_streams, self._taken_at = 0, None  # the last prefill interrupted no stream
        elif last_batch.forward_mode.is_decode():  # a prefill's batch does not tell how many streams it stopped
            self._num_streams = last_batch.batch_size()
            if self._taken_at is not None:
                self._interruption_s, self._taken_at = now - self._taken_at, None
        if not self._num_streams:
            return True
        if self._first_came_at is None:
            if not is_any_waiting():
                return False
            self._first_came_at = now
        return now - self._first_came_at >= self._wait_s()

    def _wait_s(self) -> float:
        num_interruptions = min(MAX_INTERRUPTIONS, self._num_streams * INTERRUPTIONS_PER_STREAM)
        return min(MAX_WAIT_S, num_interruptions * self._interruption_s)

    def taken(self) -> None:
        """Some were taken, and the running streams stand still for their prefill."""
        self._taken_at, self._first_came_at = self._clock(), None


_batching = PrefillBatching()


def take_in_batches(pull: Callable[[Any], list[Any] | None], receiver: Any) -> list[Any] | None:
    """Stands around `SchedulerRequestReceiver._pull_raw_reqs`, which reads the sockets on one rank.

    That rank tells the others what came, so all of them see the same.
    """
    ranks = receiver.ps
    if not ranks.pp_rank == ranks.attn_tp_rank == ranks.attn_cp_rank == 0:
        return pull(receiver)

    def is_any_waiting() -> bool:
        return bool(receiver.recv_from_tokenizer.poll(0) or (receiver.recv_from_rpc and receiver.recv_from_rpc.poll(0)))

    if not _batching.is_due(receiver.get_last_batch(), is_any_waiting):
        return []
    if requests := pull(receiver):
        _batching.taken()
    return requests


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver._pull_raw_reqs",
        take_in_batches,
        HookType.AROUND,
    )
