"""The events of SGLang's cache, page by page (`engine.py --kv-events`), kept for the routers that ask."""

import asyncio
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from common.routing.kv_blocks import CachedBlocks

logger = logging.getLogger(__name__)

_FOLDER = "engine-kv-events-"
_CONNECT_TIMEOUT_S = 10.0
_EVENTS_AT_ONCE = 500  # about 2 ms; one prompt brings thousands where a page is a token
_ON_THE_DEVICE = (None, "GPU")  # SGLang's word for it, on a CPU too; its slower tiers are not counted


def kv_events_config() -> str:
    """For SGLang's `--kv-events-config`: a socket in a folder that only this user can enter."""
    return json.dumps({"publisher": "zmq", "endpoint": f"ipc://{tempfile.mkdtemp(prefix=_FOLDER)}/socket"})


class CacheEvents:
    """The scheduler's events, and what they amount to. endpoint: of SGLang's publisher, begins with ipc://."""

    def __init__(self, endpoint: str) -> None:
        from sglang.srt.disaggregation.kv_events import KVEventBatch

        self.cached = CachedBlocks()
        self._endpoint = endpoint
        self._next_number: int | None = None  # some may have come before us, without harm
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)

    async def connect(self) -> None:
        """Call before the first request, and then `follow`. The socket's file is removed: nobody else shall connect.

        Raises:
            TimeoutError: SGLang is not there.
        """
        self._socket = socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        socket.set(zmq.RCVHWM, 0)  # none may be lost
        socket.subscribe(b"")
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        socket.connect(self._endpoint)
        if not await monitor.poll(_CONNECT_TIMEOUT_S * 1000):
            raise TimeoutError(f"SGLang does not publish the events of its cache at {self._endpoint}")
        socket.disable_monitor()
        folder = Path(self._endpoint.removeprefix("ipc://")).parent
        if folder.name.startswith(_FOLDER):  # one of ours
            shutil.rmtree(folder, ignore_errors=True)

    async def follow(self) -> None:
        """As long as the process runs."""
        with self._socket as socket:
            while True:
                _topic, number, payload = await socket.recv_multipart()
                try:
                    await self._hear(int.from_bytes(number), payload)
                except Exception:
                    logger.exception("cannot read an event of SGLang's cache; all that was cached is forgotten")
                    self.cached.clear()
                    self.cached.publish()

    async def _hear(self, number: int, payload: bytes) -> None:
        """The next batch of events, with pauses for whoever else is on the event loop."""
        if self._next_number not in (None, number):
            logger.error("events of SGLang's cache were lost: %s is followed by %d", self._next_number, number)
            self.cached.clear()
        self._next_number = number + 1
        events = self._decoder.decode(payload).events
        for start in range(0, len(events), _EVENTS_AT_ONCE):
            for event in events[start : start + _EVENTS_AT_ONCE]:
                self._apply(event)
            self.cached.publish()
            await asyncio.sleep(0)

    def _apply(self, event: Any) -> None:
        """One of SGLang's `BlockStored`, `BlockRemoved` and `AllBlocksCleared`, where a block is a page."""
        if getattr(event, "medium", None) not in _ON_THE_DEVICE:
            return
        if hasattr(event, "token_ids"):
            (page_hash,) = event.block_hashes
            self.cached.store(page_hash, event.parent_block_hash, event.token_ids)
        elif hasattr(event, "block_hashes"):
            self.cached.remove(event.block_hashes)
        else:
            self.cached.clear()
