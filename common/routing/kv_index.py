"""What each engine has cached, as the engines tell it: the client of `inference/engine/kv_events`."""

import asyncio
import logging
from collections.abc import Callable

import msgspec
import orjson

from common.dynamo.runtime import Client, Context
from common.routing.kv_blocks import RadixTree
from common.wire import KvEvent, KvEvents

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
# Dynamo's tree keeps something of blocks that are gone, up to 1.4 KB each. It takes about 3 us per cached block to
# build it anew.
MAX_REMOVED = 1_000_000


class KvIndex:
    """Follows every engine that tells. lost: those that stopped telling and are still listed; they are probably dead.

    telling: those whose caches are known. on_stored: called with a worker and the block hashes of what it has just
    cached.
    """

    def __init__(self, client: Client, on_stored: Callable[[int, list[int]], None]) -> None:
        self._client, self._on_stored = client, on_stored
        self._tree, self._num_removed = RadixTree(), 0
        self._followed: dict[int, asyncio.Task[None]] = {}
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
            self._on_stored(worker_id, [block.block_hash for block in event.stored.blocks])
        if event.removed is not None:
            self._num_removed += len(event.removed.block_hashes)
            if self._num_removed > MAX_REMOVED:
                self._rebuild()

    def _rebuild(self) -> None:
        """Without what the tree still has of blocks that are gone."""
        dumped = [orjson.loads(event) for event in self._tree.dump_tree_as_events()]
        self._tree, self._num_removed = RadixTree(), 0
        for each in dumped:
            self._tree.apply_event(each["worker_id"], orjson.dumps(each["event"]))
