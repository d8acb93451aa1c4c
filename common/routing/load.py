"""What each worker has to do, as the router has booked it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Booking:
    """A prompt that a worker was chosen for. In blocks: all of it, and those that are new there.

    to_cache: the block hashes whose caching the worker will tell, in order; none where it will tell nothing.
    """

    num_blocks: int
    num_new_blocks: int
    to_cache: Sequence[int] = ()


@dataclass(slots=True)
class WorkerLoad:
    """num_requests: at a worker. num_prefill_blocks: yet to be computed. num_decode_blocks: of prompts that have been.

    last_chosen: the number of the choice. to_cache: how many bookings are about to cache a block.
    """

    num_requests: int = 0
    num_prefill_blocks: int = 0
    num_decode_blocks: int = 0
    last_chosen: int = 0
    to_cache: Counter[int] = field(default_factory=Counter)
    prefilling: set[Booking] = field(default_factory=set)

    def num_blocks_soon(self, block_hashes: Sequence[int], num_cached: int) -> int:
        """How many of a prompt's first blocks it will have once it has done what is booked; now it has num_cached."""
        num_soon = num_cached
        while num_soon < len(block_hashes) and block_hashes[num_soon] in self.to_cache:
            num_soon += 1
        return num_soon

    def has_cached(self, block_hashes: Iterable[int]) -> None:
        """Prompts that end with one of these blocks are computed: their first tokens are on the way."""
        cached = set(block_hashes)
        for booking in [each for each in self.prefilling if each.to_cache[-1] in cached]:
            self._end_prefill(booking)
            self.num_decode_blocks += booking.num_blocks

    @contextmanager
    def booked(self, booking: Booking) -> Iterator[None]:
        """For as long as the worker is at it."""
        self.num_requests += 1
        if booking.to_cache:
            self.num_prefill_blocks += booking.num_new_blocks
            self.to_cache.update(booking.to_cache)
            self.prefilling.add(booking)
        else:
            self.num_decode_blocks += booking.num_blocks
        try:
            yield
        finally:
            self.num_requests -= 1
            if booking in self.prefilling:
                self._end_prefill(booking)
            else:
                self.num_decode_blocks -= booking.num_blocks

    def _end_prefill(self, booking: Booking) -> None:
        self.prefilling.remove(booking)
        self.num_prefill_blocks -= booking.num_new_blocks
        for block_hash in booking.to_cache:
            self.to_cache[block_hash] -= 1
            if not self.to_cache[block_hash]:
                del self.to_cache[block_hash]
