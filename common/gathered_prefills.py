"""Let newcomers gather before SGLang's scheduler takes them, so that a busy engine is interrupted less often.

SGLang takes requests one by one as they come, and each time stops all running streams for a prefill: about ten
milliseconds on an H100, for one prompt as for thirty. Under load that is half of the time. Here a newcomer waits a
moment for others, the longer the more streams it would interrupt, and never where none is running.

SGLang finds `register` through the entry point group `sglang.srt.plugins`, in every process it spawns. Its own
`--scheduler-recv-interval` counts steps instead of time, so that what suits a small model delays a large one's first
tokens by half a second; `--enable-prefill-delayer` costs an exchange among ranks in each step (measured, see
docs/performance.md).
"""

import time
from collections.abc import Callable
from typing import Any

# What an interruption is worth: this much waiting for each stream that goes on meanwhile.
WAIT_S_PER_STREAM = 0.001
MAX_WAIT_S = 0.06


class Gathering:
    """Decides when to take newcomers in. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._num_streams = 0
        self._last_taken_at = -MAX_WAIT_S

    def is_time(self, last_batch: Any) -> bool:
        """May newcomers be taken now? last_batch: SGLang's ScheduleBatch of the last step, None where it idles."""
        if last_batch is None:
            self._num_streams = 0
        elif last_batch.forward_mode.is_decode():  # a prefill's batch does not tell how many streams it stopped
            self._num_streams = last_batch.batch_size()
        wait_s = min(MAX_WAIT_S, self._num_streams * WAIT_S_PER_STREAM)
        return self._clock() - self._last_taken_at >= wait_s

    def taken(self) -> None:
        """Some were: those that come next wait for each other."""
        self._last_taken_at = self._clock()


_gathering = Gathering()


def take_when_gathered(pull: Callable[[Any], list[Any] | None], receiver: Any) -> list[Any] | None:
    """Stands around `SchedulerRequestReceiver._pull_raw_reqs`, which reads the socket on one rank and tells the others.

    So only that rank decides, and all of them see the same.
    """
    ranks = receiver.ps
    if not ranks.pp_rank == ranks.attn_tp_rank == ranks.attn_cp_rank == 0:
        return pull(receiver)
    if not _gathering.is_time(receiver.get_last_batch()):
        return []
    if requests := pull(receiver):
        _gathering.taken()
    return requests


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver._pull_raw_reqs",
        take_when_gathered,
        HookType.AROUND,
    )
