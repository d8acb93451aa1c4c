"""What an engine has cached, in blocks of KV_BLOCK_SIZE tokens, and the endpoint that tells routers of it.

Engines cache in pages of their own size: 1 on a CPU, more on a GPU. A block is complete with the page that has its last
token, and goes with it.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, NamedTuple

from common.dynamo.context import when_stopped
from common.dynamo.releases import Context
from common.routing.kv_blocks import block_hashes
from common.wire import KV_BLOCK_SIZE, BlocksRemoved, BlocksStored, KvBlock, KvEvent, KvEvents, to_wire

MAX_EVENTS = 64  # in one dict, of what is cached now
MAX_BEHIND = 10_000  # dicts; a router that is slower begins anew


class _Page(NamedTuple):
    """completed: the blocks that end within it. last_block: the last one at its end. rest: the tokens after that."""

    completed: list[int]
    last_block: int | None
    rest: list[int]


_ROOT = _Page([], None, [])


class CachedBlocks:
    """The engine says what it stores and removes, page by page, and then `publish`."""

    def __init__(self) -> None:
        self._pages: dict[int, _Page] = {}
        self._blocks: dict[int, tuple[int | None, KvBlock]] = {}  # with the hash of the parent, which is further up
        self._changes: list[KvEvent] = []
        self._listeners: set[asyncio.Queue[dict[str, Any] | None]] = set()

    def store(self, page_hash: int, parent_hash: int | None, token_ids: Sequence[int]) -> None:
        """A page of tokens that follows another one; None: that begins a sequence."""
        parent = _ROOT if parent_hash is None else self._pages.get(parent_hash)
        if parent is None or page_hash in self._pages:
            return
        completed, last_block, rest = [], parent.last_block, [*parent.rest, *token_ids]
        while len(rest) >= KV_BLOCK_SIZE:
            block, rest = _block_of(last_block, rest[:KV_BLOCK_SIZE]), rest[KV_BLOCK_SIZE:]
            self._blocks[block.block_hash] = (last_block, block)
            _append(self._changes, last_block, block)
            last_block = block.block_hash
            completed.append(last_block)
        self._pages[page_hash] = _Page(completed, last_block, rest)

    def remove(self, page_hashes: Sequence[int]) -> None:
        pages = [self._pages.pop(page_hash) for page_hash in page_hashes if page_hash in self._pages]
        if removed := [block_hash for page in pages for block_hash in page.completed]:
            for block_hash in removed:
                self._blocks.pop(block_hash, None)
            self._changes.append(KvEvent(removed=BlocksRemoved(removed)))

    def clear(self) -> None:
        self.remove(list(self._pages))

    def publish(self) -> None:
        """Tell everybody who listens of the changes since the last time."""
        if self._changes and self._listeners:
            message = to_wire(KvEvents(self._changes))
            for listener in list(self._listeners):
                listener.put_nowait(message)
                if listener.qsize() > MAX_BEHIND:
                    self._listeners.discard(listener)
                    listener.put_nowait(None)
        self._changes = []

    async def events(self, _request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        """`KvEvents` as dicts: those that make up what is cached now, and then each change."""
        listener: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        for cached_now in self._snapshot():
            listener.put_nowait(cached_now)
        self._listeners.add(listener)
        try:
            with when_stopped(context, lambda: listener.put_nowait(None)):
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


def _block_of(parent_hash: int | None, token_ids: list[int]) -> KvBlock:
    (tokens_hash,) = block_hashes(token_ids)
    return KvBlock(hash((parent_hash or 0, tokens_hash)) & 0xFFFF_FFFF_FFFF_FFFF, tokens_hash)


def _append(events: list[KvEvent], parent_hash: int | None, block: KvBlock) -> None:
    """To the last event where it follows that one's last block, else as an event of its own."""
    last = events[-1].stored if events else None
    if last is not None and last.blocks[-1].block_hash == parent_hash:
        last.blocks.append(block)
    else:
        events.append(KvEvent(stored=BlocksStored(parent_hash, [block])))
