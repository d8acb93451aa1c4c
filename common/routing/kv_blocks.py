"""Prompts and caches in blocks of KV_BLOCK_SIZE tokens, and the endpoint by which an engine tells routers of its cache.

Engines cache in pages of their own size: 1 on a CPU, more on a GPU. A block is complete with the page that has its last
token, and goes with it; where several pages complete it, because they branch within it, with the last of them.
"""

import asyncio
import heapq
import struct
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from common.dynamo.releases import Context
from common.dynamo.service import when_stopped
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

try:
    from dynamo.llm import RadixTree as RadixTree
    from dynamo.llm import compute_block_hash_for_seq
except ImportError as error:  # 0.x: another name for the hash, and a tree that tells less
    raise SystemExit(f"router.py and --kv-events need ai-dynamo-runtime 1.0 or later: {error}") from None

MAX_EVENTS = 64  # in one dict, of what is cached now
MAX_BEHIND = 1000  # dicts of changes; a router that has yet to hear of more begins anew


def block_hashes(token_ids: Sequence[int]) -> list[int]:
    """One for each complete block, of its own tokens alone."""
    hashes: list[int] = compute_block_hash_for_seq(token_ids, KV_BLOCK_SIZE)
    return hashes


def packed(hashes: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(hashes)}Q", *hashes)


def unpacked(hashes: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(hashes) // 8}Q", hashes))


def chained_hashes(tokens_hashes: Iterable[int], parent_hash: int | None = None) -> list[int]:
    """Of each block and all before it: two prompts may end alike. parent_hash: of what is before the first one."""

    def chained(parent_hash: int, tokens_hash: int) -> int:
        return hash((parent_hash, tokens_hash)) & 0xFFFF_FFFF_FFFF_FFFF  # of numbers, so alike in all processes

    return list(accumulate(tokens_hashes, chained, initial=parent_hash or 0))[1:]


class _Page(NamedTuple):
    """completed: the blocks that end within it. last_block: the last one at its end. rest: the tokens after that."""

    completed: list[int]
    last_block: int | None
    rest: list[int]


class CachedBlocks:
    """The engine says what it stores and removes, page by page, and then `publish`."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[dict[str, Any] | None]] = set()  # None: there is no more
        self._blocks: dict[int, tuple[int | None, KvBlock]] = {}  # with the hash of the parent, which is further up
        self._changes: list[KvEvent] = []
        self.clear()

    def store(self, page_hash: int, parent_hash: int | None, token_ids: Sequence[int]) -> None:
        """A page of tokens that follows another one; None: that begins a sequence."""
        parent = self._pages.get(parent_hash)
        if parent is None or page_hash in self._pages:
            return
        tokens, last_block = [*parent.rest, *token_ids], parent.last_block
        tokens_hashes = block_hashes(tokens)
        completed = chained_hashes(tokens_hashes, last_block)
        for block in map(KvBlock, completed, tokens_hashes):
            self._num_pages[block.block_hash] += 1
            if self._num_pages[block.block_hash] == 1:
                self._blocks[block.block_hash] = (last_block, block)
                _append(self._changes, last_block, block)
            last_block = block.block_hash
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
        if self._blocks:
            self._changes.append(KvEvent(removed=BlocksRemoved(list(self._blocks))))
        self._pages: dict[int | None, _Page] = {None: _Page([], None, [])}  # before the first one of a sequence
        self._blocks.clear()
        self._num_pages: Counter[int] = Counter()  # that complete a block

    def describe(self, max_num_tokens: int) -> CacheDescription:
        lowest = heapq.nsmallest(NUM_LOWEST_HASHES, self._blocks)
        return CacheDescription(len(self._blocks) * KV_BLOCK_SIZE, max_num_tokens, lowest)

    def publish(self) -> None:
        """Tell everybody who listens of the changes since the last time."""
        if self._changes and self._listeners:
            message = to_wire(KvEvents(self._changes))
            for listener in self._listeners:
                if listener.full():
                    _cut_off(listener)
                else:
                    listener.put_nowait(message)
        self._changes = []

    async def events(self, _request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        """`KvEvents` as dicts: those that make up what is cached now, and then each change."""
        cached_now, listener = self._snapshot(), asyncio.Queue[dict[str, Any] | None](MAX_BEHIND)
        self._listeners.add(listener)
        try:
            with when_stopped(context, lambda: _cut_off(listener)):
                for message in cached_now:
                    yield message
                while (change := await listener.get()) is not None:
                    yield change
        finally:
            self._listeners.discard(listener)

    def _snapshot(self) -> list[dict[str, Any]]:
        self.publish()  # what others have not heard of yet is in the snapshot
        events: list[KvEvent] = []
        for parent_hash, block in self._blocks.values():
            _append(events, parent_hash, block)
        return [to_wire(KvEvents(events[at : at + MAX_EVENTS])) for at in range(0, max(1, len(events)), MAX_EVENTS)]


def _cut_off(listener: asyncio.Queue[dict[str, Any] | None]) -> None:
    """It hears no more, nor of what waits."""
    while not listener.empty():
        listener.get_nowait()
    listener.put_nowait(None)


def _append(events: list[KvEvent], parent_hash: int | None, block: KvBlock) -> None:
    """To the last event where it follows that one's last block, else as an event of its own."""
    last = events[-1].stored if events else None
    if last is not None and last.blocks[-1].block_hash == parent_hash:
        last.blocks.append(block)
    else:
        events.append(KvEvent(stored=BlocksStored(parent_hash, [block])))
