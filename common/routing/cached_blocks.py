"""What an engine has cached, in blocks of KV_BLOCK_SIZE tokens, and the endpoint that tells routers of it.

Engines cache in pages of their own size: 1 on a CPU, more on a GPU. A block is complete with the page that has its last
token, and goes with it; where several pages complete it, because they branch within it, with the last of them.
"""

import asyncio
import heapq
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

from common.dynamo.context import when_stopped
from common.dynamo.releases import Context
from common.routing.kv_blocks import block_hashes, chained_hash
from common.wire import (
    KV_BLOCK_SIZE,
    NUM_LOWEST_HASHES,
    BlocksRemoved,
    BlocksStored,
    CacheDescription,
    KvBlock,
    KvEvent,
    KvEvents,
    to_wire,
)

MAX_EVENTS = 64  # in one dict, of what is cached now
MAX_BEHIND = 100_000  # blocks; a router that has yet to hear of more than these begins anew


class _Page(NamedTuple):
    """completed: the blocks that end within it. last_block: the last one at its end. rest: the tokens after that."""

    completed: list[int]
    last_block: int | None
    rest: list[int]


class _Listener(asyncio.Queue[dict[str, Any] | None]):
    """What a router has yet to hear; None: there is no more. num_behind: changed blocks since it had heard of all."""

    num_behind = 0

    def cut_off(self) -> None:
        """It hears no more, nor of what waits."""
        while not self.empty():
            self.get_nowait()
        self.put_nowait(None)


class CachedBlocks:
    """The engine says what it stores and removes, page by page, and then `publish`."""

    def __init__(self) -> None:
        self._listeners: set[_Listener] = set()
        self.forget()

    def forget(self) -> None:
        """Everything: nothing is known any more. Those who listen hear of it by the end of their streams."""
        self._pages: dict[int | None, _Page] = {None: _Page([], None, [])}  # before the first one of a sequence
        self._blocks: dict[int, tuple[int | None, KvBlock]] = {}  # with the hash of the parent, which is further up
        self._num_pages: Counter[int] = Counter()  # that complete a block
        self._changes: list[KvEvent] = []
        for listener in self._listeners:
            listener.cut_off()

    def store(self, page_hash: int, parent_hash: int | None, token_ids: Sequence[int]) -> None:
        """A page of tokens that follows another one; None: that begins a sequence."""
        parent = self._pages.get(parent_hash)
        if parent is None or page_hash in self._pages:
            return
        tokens, last_block, completed = [*parent.rest, *token_ids], parent.last_block, []
        for tokens_hash in block_hashes(tokens):
            block = KvBlock(chained_hash(last_block, tokens_hash), tokens_hash)
            self._num_pages[block.block_hash] += 1
            if self._num_pages[block.block_hash] == 1:
                self._blocks[block.block_hash] = (last_block, block)
                _append(self._changes, last_block, block)
            last_block = block.block_hash
            completed.append(last_block)
        self._pages[page_hash] = _Page(completed, last_block, tokens[len(completed) * KV_BLOCK_SIZE :])

    def remove(self, page_hashes: Sequence[int]) -> None:
        pages = [self._pages.pop(page_hash) for page_hash in page_hashes if page_hash in self._pages]
        completed = [block_hash for page in pages for block_hash in page.completed]
        self._num_pages.subtract(completed)
        if removed := [each for each in dict.fromkeys(completed) if not self._num_pages[each]]:
            for block_hash in removed:
                del self._blocks[block_hash], self._num_pages[block_hash]
            self._changes.append(KvEvent(removed=BlocksRemoved(removed)))

    def clear(self) -> None:
        self.remove([page_hash for page_hash in self._pages if page_hash is not None])

    def describe(self, max_num_tokens: int) -> CacheDescription:
        lowest = heapq.nsmallest(NUM_LOWEST_HASHES, self._blocks)
        return CacheDescription(len(self._blocks) * KV_BLOCK_SIZE, max_num_tokens, lowest)

    def publish(self) -> None:
        """Tell everybody who listens of the changes since the last time."""
        if self._changes and self._listeners:
            message, num_blocks = to_wire(KvEvents(self._changes)), sum(map(_num_blocks, self._changes))
            for listener in self._listeners:
                if listener.empty():
                    listener.num_behind = 0
                if listener.num_behind > MAX_BEHIND:
                    listener.cut_off()
                else:
                    listener.put_nowait(message)
                    listener.num_behind += num_blocks
        self._changes = []

    async def events(self, _request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        """`KvEvents` as dicts: those that make up what is cached now, and then each change."""
        listener = _Listener()
        for cached_now in self._snapshot():
            listener.put_nowait(cached_now)
        self._listeners.add(listener)
        try:
            with when_stopped(context, listener.cut_off):
                while (message := await listener.get()) is not None:
                    yield message
        finally:
            self._listeners.discard(listener)

    def _snapshot(self) -> list[dict[str, Any]]:
        self.publish()  # what others have not heard of yet is in the snapshot
        events: list[KvEvent] = []
        for parent_hash, block in self._blocks.values():
            _append(events, parent_hash, block)
        return [to_wire(KvEvents(events[at : at + MAX_EVENTS])) for at in range(0, max(1, len(events)), MAX_EVENTS)]


def _num_blocks(event: KvEvent) -> int:
    num_removed = len(event.removed.block_hashes) if event.removed is not None else 0
    return num_removed + (len(event.stored.blocks) if event.stored is not None else 0)


def _append(events: list[KvEvent], parent_hash: int | None, block: KvBlock) -> None:
    """To the last event where it follows that one's last block, else as an event of its own."""
    last = events[-1].stored if events else None
    if last is not None and last.blocks[-1].block_hash == parent_hash:
        last.blocks.append(block)
    else:
        events.append(KvEvent(stored=BlocksStored(parent_hash, [block])))
