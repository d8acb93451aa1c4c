"""OpenAI's `logprobs.content` entries for the tokens of an engine's chunk.

The bytes of all entries, joined, are the bytes of the text: a token that the text leaves out, such as the one that
ends the sequence, has null for its bytes.
"""

import functools
import math
from collections.abc import Set

from common.text.token_bytes import TokenBytes
from common.wire import EngineChunk, LogprobEntry, TokenLogprob

# JSON has no -Infinity; OpenAI sends this for a token that could not have been chosen.
_LOWEST = -9999.0


def _entry(token_bytes: TokenBytes, hidden_ids: Set[int], token_id: int, logprob: float) -> TokenLogprob:
    raw = token_bytes.bytes_of(token_id)
    return {
        "token": raw.decode("utf-8", errors="replace"),
        "logprob": max(logprob, _LOWEST) if math.isfinite(logprob) else _LOWEST,
        "bytes": None if token_id in hidden_ids else list(raw),
    }


def logprob_entries(
    chunk: EngineChunk, num_tokens: int, num_top_logprobs: int, token_bytes: TokenBytes, hidden_ids: Set[int]
) -> list[LogprobEntry] | None:
    """One entry for each of the chunk's first `num_tokens` tokens; None where the engine sent no logprobs.

    hidden_ids: the tokens that the text leaves out.
    """
    if chunk.log_probs is None:
        return None
    best = chunk.top_logprobs or [[]] * len(chunk.token_ids)
    entry = functools.partial(_entry, token_bytes, hidden_ids)
    return [
        {
            **entry(token_id, logprob),
            "top_logprobs": [entry(*alternative) for alternative in alternatives[:num_top_logprobs]],
        }
        for token_id, logprob, alternatives in zip(chunk.token_ids[:num_tokens], chunk.log_probs, best, strict=False)
    ]
