"""How a busy engine does more at once: several new requests in a prefill, several tokens in an item of a stream.

Prefill batching: SGLang takes requests one by one as they arrive, and each time stops all running streams for a
prefill: more than ten milliseconds on an H100, for one prompt as for thirty. Under load that is half of the time. Here
the first of some new requests waits a moment for the others: the longer, the more streams they would interrupt and the
longer the last interruption took, and never where nothing is running. common/sglang/plugins.py calls `register` in the
engine's processes. What SGLang has itself: `--scheduler-recv-interval` counts steps, so it also delays one new request
beside one stream; `--enable-prefill-delayer` costs an exchange among ranks in each step (both measured, see
docs/performance.md).

Stream pace: every item costs each of the three processes about as much as ten tokens do, so a busy engine puts several
tokens into one. It is paced by time: a few streams get every token as it is made; more of them share a budget of items
per second, as long as none waits longer than MAX_GAP_S for its next one; and beyond what the processes can carry at
all, the gaps grow. The first token always comes at once.
"""

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any, TypedDict

# New requests wait for as long as they would interrupt, times this: for each running stream, and at most.
INTERRUPTIONS_PER_STREAM = 1 / 32
MAX_INTERRUPTIONS = 2.0
MAX_WAIT_S = 0.1

MAX_GAP_S = 0.05
# What the processes pass on at ease; more streams than this allows make the gaps grow towards MAX_GAP_S.
ITEMS_PER_SECOND = 800
# What they carry at most is 5000 (an H100's machine, streaming to 256). Near that, tokens come as slowly as items do,
# and the measured speed asks for items as small as they are: it has to ask for larger ones.
MAX_ITEMS_PER_SECOND = 3500
MAX_TOKENS_PER_ITEM = 64
# However slow they are: each token of up to this many streams may be an item of its own, of twice as many every second.
STREAMS_PER_TOKEN = 64
# How much of what was measured is kept with each item: the speed of the last few thousand tokens counts.
_MEMORY = 0.998


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
        num_interruptions = min(MAX_INTERRUPTIONS, self._num_streams * INTERRUPTIONS_PER_STREAM)
        return now - self._first_came_at >= min(MAX_WAIT_S, num_interruptions * self._interruption_s)

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

    receiver = "sglang.srt.managers.scheduler_components.request_receiver.SchedulerRequestReceiver"
    HookRegistry.register(f"{receiver}._pull_raw_reqs", take_in_batches, HookType.AROUND)


class Output(TypedDict):
    """What SGLang yields. output_ids: all tokens of the answer so far, the newest last."""

    output_ids: list[int]
    meta_info: dict[str, Any]


class StreamPace:
    """Knows the streams of one engine and how fast their tokens come.

    seconds_per_token: of one stream, averaged over the latest tokens of all of them; 0.0 before the first ones.
    """

    def __init__(self) -> None:
        self.num_streams = 0
        self._seconds = self._tokens = 0.0

    @property
    def seconds_per_token(self) -> float:
        return self._seconds / self._tokens if self._tokens else 0.0

    @property
    def gap_s(self) -> float:
        """The time between two items of one stream to aim at."""
        at_ease_s = self.num_streams / ITEMS_PER_SECOND
        return max(min(MAX_GAP_S, at_ease_s), self.num_streams / MAX_ITEMS_PER_SECOND)

    def tokens_per_item(self) -> int:
        """SGLang's `stream_interval` for a stream that begins now."""
        # The least size depends on nothing that was measured: a way out of an overload in which tokens take even
        # longer than the gap.
        least = math.ceil(self.num_streams / STREAMS_PER_TOKEN)
        wanted = math.ceil(self.gap_s / self.seconds_per_token) if self.seconds_per_token else 1
        return min(MAX_TOKENS_PER_ITEM, max(1, least, wanted))

    async def paced(self, outputs: AsyncIterator[Output]) -> AsyncGenerator[Output, None]:
        """The items of one stream, fewer where they come too fast: each holds the whole answer so far.

        While this waits, SGLang replaces the item that nobody has taken by a newer one.
        """
        clock = asyncio.get_running_loop().time
        self.num_streams += 1
        try:
            last_s, num_tokens = 0.0, 0
            async for output in outputs:
                now = clock()
                if num_tokens:
                    self._measure(now - last_s, len(output["output_ids"]) - num_tokens)
                last_s, num_tokens = now, len(output["output_ids"])
                yield output
                # Half the gap: SGLang does the pacing by its own interval, which is chosen once per stream.
                wait_s = self.gap_s / 2 - (clock() - now)
                if output["meta_info"]["finish_reason"] is None and wait_s > 0.001:
                    await asyncio.sleep(wait_s)
        finally:
            self.num_streams -= 1

    def _measure(self, seconds: float, num_tokens: int) -> None:
        self._seconds = self._seconds * _MEMORY + seconds
        self._tokens = self._tokens * _MEMORY + num_tokens
