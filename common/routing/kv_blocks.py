"""Prompts in blocks of KV_BLOCK_SIZE tokens, and Dynamo's index of who has which: they need no runtime."""

import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate

from common.environment import prepare_environment
from common.wire import KV_BLOCK_SIZE

prepare_environment()

try:
    from dynamo.llm import RadixTree as RadixTree
    from dynamo.llm import compute_block_hash_for_seq
except ImportError as error:  # 0.x: another name for the hash, and a tree that tells less
    raise SystemExit(f"router.py and --kv-events need ai-dynamo-runtime 1.0 or later: {error}") from None


def block_hashes(token_ids: Sequence[int]) -> list[int]:
    """One for each complete block, of its own tokens alone."""
    hashes: list[int] = compute_block_hash_for_seq(token_ids, KV_BLOCK_SIZE)
    return hashes


def packed(hashes: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(hashes)}Q", *hashes)


def unpacked(hashes: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(hashes) // 8}Q", hashes))


def chained_hash(parent_hash: int | None, tokens_hash: int) -> int:
    """Of a block and all before it: two prompts may end alike. parent_hash: of all before it; None or 0: the first."""
    return hash((parent_hash or 0, tokens_hash)) & 0xFFFF_FFFF_FFFF_FFFF  # of numbers, so alike in all processes


def chained_hashes(tokens_hashes: Iterable[int]) -> list[int]:
    """Of each block of a prompt and all before it."""
    return list(accumulate(tokens_hashes, chained_hash, initial=0))[1:]
