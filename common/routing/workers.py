"""What the router knows of each engine: what it has cached, as it tells, and what it has to do, as it was booked."""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from common.dynamo.runtime import Client, Context
from common.routing.kv_blocks import RadixTree
from common.wire import KvEvent, KvEvents

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
# Dynamo's tree keeps something of blocks that are gone, up to 1.4 KB each. It takes about 3 us per cached block to
# build it anew.
MAX_REMOVED = 1_000_000


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
        while num_cached < len(block_hashes) and block_hashes[num_cached] in self.to_cache:
            num_cached += 1
        return num_cached

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


class KvIndex:
    """Follows every engine that tells what it has cached. loads: by worker.

    lost: those that stopped telling and are still listed; they are probably dead. telling: whose caches are known.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._tree, self._num_removed = RadixTree(), 0
        self._followed: dict[int, asyncio.Task[None]] = {}
        self.loads: defaultdict[int, WorkerLoad] = defaultdict(WorkerLoad)
        self.lost: set[int] = set()
        self.telling: set[int] = set()

    def num_cached_blocks(self, block_hashes: list[int]) -> dict[int, int]:
        """By worker, how many of a prompt's first blocks it has; workers that have none are missing."""
        scores: dict[tuple[int, int], int] = self._tree.find_matches(block_hashes).scores
        return {worker_id: num_blocks for (worker_id, _), num_blocks in scores.items()}

    async def follow(self) -> None:
        """As long as the process runs."""
        while True:
            try:
                instance_ids = set(await self._client.instance_ids())
            except Exception as error:  # etcd is away: those who tell go on
                logger.warning("cannot look for engines: %r", error)
            else:
                self.lost &= instance_ids
                for worker_id in self._followed.keys() - instance_ids:
                    self._followed.pop(worker_id).cancel()
                for worker_id in instance_ids:
                    if worker_id not in self._followed or self._followed[worker_id].done():
                        self._followed[worker_id] = asyncio.create_task(self._follow(worker_id))
            await asyncio.sleep(_LOOK_S)

    async def _follow(self, worker_id: int) -> None:
        """Until its stream breaks, or it leaves etcd."""
        context = Context()
        try:
            async for item in await self._client.direct({}, worker_id, context):
                self.lost.discard(worker_id)
                self.telling.add(worker_id)
                for event in msgspec.convert(item, KvEvents).events:
                    self._apply(worker_id, event)
        except Exception as error:
            if worker_id not in self.lost:
                logger.warning("engine %x tells no more of its cache: %s", worker_id, error)
        finally:
            context.stop_generating()
            self._tree.remove_worker(worker_id)
            self.telling.discard(worker_id)
            self.lost.add(worker_id)

    def _apply(self, worker_id: int, event: KvEvent) -> None:
        try:
            self._tree.apply_event(worker_id, msgspec.json.encode({"event_id": 0, "data": event}))
        except RuntimeError:  # blocks whose parent is gone: nobody finds them
            return
        if event.stored is not None:
            self.loads[worker_id].has_cached(block.block_hash for block in event.stored.blocks)
        if event.removed is not None:
            self._num_removed += len(event.removed.block_hashes)
            if self._num_removed > MAX_REMOVED:
                dumped = map(msgspec.json.decode, self._tree.dump_tree_as_events())
                self._tree, self._num_removed = RadixTree(), 0
                for each in dumped:
                    self._tree.apply_event(each["worker_id"], msgspec.json.encode(each["event"]))
