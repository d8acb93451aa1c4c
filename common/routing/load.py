"""What each worker has to do, as the router has booked it."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Booking:
    """A prompt that a worker was chosen for. In blocks: all of it, and those that were not cached there."""

    num_blocks: int
    num_new_blocks: int


@dataclass(slots=True)
class WorkerLoad:
    """num_requests: at a worker. num_prefill_blocks: yet to be computed. num_decode_blocks: of prompts that have been.

    last_chosen: the number of the choice.
    """

    num_requests: int = 0
    num_prefill_blocks: int = 0
    num_decode_blocks: int = 0
    last_chosen: int = 0
    prefilling: defaultdict[int, set[Booking]] = field(default_factory=lambda: defaultdict(set))  # by last_block

    def _decodes(self, booking: Booking) -> None:
        self.num_prefill_blocks -= booking.num_new_blocks
        self.num_decode_blocks += booking.num_blocks

    def has_cached(self, block_hashes: Iterable[int]) -> None:
        """Prompts that end with one of these blocks are computed: their first tokens are on the way."""
        for block_hash in self.prefilling.keys() & block_hashes:
            for booking in self.prefilling.pop(block_hash):
                self._decodes(booking)

    @contextmanager
    def booked(self, booking: Booking, last_block: int | None) -> Iterator[None]:
        """For as long as the worker is at it. last_block: whose caching ends the prefill; None: nothing will."""
        self.num_requests += 1
        self.num_prefill_blocks += booking.num_new_blocks
        if last_block is None:
            self._decodes(booking)
        else:
            self.prefilling[last_block].add(booking)
        try:
            yield
        finally:
            self._free(booking, last_block)

    def _free(self, booking: Booking, last_block: int | None) -> None:
        self.num_requests -= 1
        if last_block is None or booking not in self.prefilling.get(last_block, ()):
            self.num_decode_blocks -= booking.num_blocks
            return
        self.num_prefill_blocks -= booking.num_new_blocks
        self.prefilling[last_block].discard(booking)
        if not self.prefilling[last_block]:
            del self.prefilling[last_block]
