"""A router's parts, without a process."""

from typing import Any, cast

import msgspec

from common.dynamo.runtime import Client
from common.routing.kv_blocks import block_hashes
from common.routing.workers import KvIndex
from common.wire import KvEvents


class Told:
    """A router's index, told by hand."""

    def __init__(self) -> None:
        self.index = KvIndex(cast("Client", None))
        self.loads = self.index.loads

    def tell(self, worker_id: int, message: dict[str, Any]) -> None:
        self.index.telling.add(worker_id)
        for event in msgspec.convert(message, KvEvents).events:
            self.index._apply(worker_id, event)

    def has(self, worker_id: int, token_ids: list[int]) -> int:
        return self.index.num_cached_blocks(block_hashes(token_ids)).get(worker_id, 0)
