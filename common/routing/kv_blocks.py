"""Prompts in blocks of KV_BLOCK_SIZE tokens, and Dynamo's index of who has which: they need no runtime."""

from collections.abc import Sequence

from common.environment import prepare_environment
from common.wire import KV_BLOCK_SIZE

prepare_environment()

from dynamo.llm import RadixTree as RadixTree  # noqa: E402
from dynamo.llm import compute_block_hash_for_seq  # noqa: E402


def block_hashes(token_ids: Sequence[int]) -> list[int]:
    """One for each complete block, of its own tokens alone."""
    hashes: list[int] = compute_block_hash_for_seq(token_ids, KV_BLOCK_SIZE)
    return hashes
