"""What SGLang tells of its cache, page by page (`engine.py --kv-events`), kept for the routers that ask."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import zmq
import zmq.asyncio

from common.routing.cached_blocks import CachedBlocks

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

_FOLDER = "engine-kv-events-"
_CONNECT_TIMEOUT_S = 10.0
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
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)

    @classmethod
    def of(cls, server_args: "ServerArgs") -> "CacheEvents | None":
        """None where SGLang tells nobody, or somebody else."""
        endpoint: str = json.loads(server_args.kv_events_config or "{}").get("endpoint", "")
        return cls(endpoint) if endpoint.startswith("ipc://") else None

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
            raise TimeoutError(f"SGLang does not tell of its cache at {self._endpoint}")
        socket.disable_monitor()
        folder = Path(self._endpoint.removeprefix("ipc://")).parent
        if folder.name.startswith(_FOLDER):  # one of ours
            shutil.rmtree(folder, ignore_errors=True)

    async def follow(self) -> None:
        """As long as the process runs."""
        with self._socket as socket:
            while True:
                _topic, _number, payload = await socket.recv_multipart()
                for event in self._decoder.decode(payload).events:
                    self.apply(event)
                self.cached.publish()

    def apply(self, event: Any) -> None:
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
