"""How often a stream sends something.

Every item costs each of the three processes about as much as ten tokens do, so a busy engine puts several tokens
into one. It is paced by time: a few streams get every token as it is made; more of them share a budget of items per
second, as long as none waits longer than MAX_GAP_S for its next one; and beyond what the processes can carry at all,
the gaps grow. The first token always comes at once.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypedDict

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
                if (
                    output["meta_info"]["finish_reason"] is None
                    and (wait_s := self.gap_s / 2 - (clock() - now)) > 0.001
                ):
                    await asyncio.sleep(wait_s)
        finally:
            self.num_streams -= 1

    def _measure(self, seconds: float, num_tokens: int) -> None:
        self._seconds = self._seconds * _MEMORY + seconds
        self._tokens = self._tokens * _MEMORY + num_tokens
