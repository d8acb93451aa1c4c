import math

from common.text.choice import logprob_entries
from common.text.vocabulary import Vocabulary
from common.wire import EngineChunk
from tests.tokenizers_for_tests import byte_level, detokenize, encode, special_ids

TOKENIZER = byte_level()
VOCABULARY = Vocabulary(TOKENIZER)


def entries_for(chunk: EngineChunk, num_tokens: int, num_top_logprobs: int = 0) -> list[dict]:
    entries = logprob_entries(chunk, num_tokens, num_top_logprobs, VOCABULARY, VOCABULARY.special_ids)
    assert entries is not None
    return entries


def test_the_bytes_of_all_entries_are_the_bytes_of_the_text() -> None:
    token_ids = [*encode(TOKENIZER, "ok 👍 你好"), special_ids(TOKENIZER)[0]]
    entries = entries_for(EngineChunk(token_ids=token_ids, log_probs=[-0.5] * len(token_ids)), len(token_ids))
    assert b"".join(bytes(entry["bytes"] or []) for entry in entries).decode() == detokenize(TOKENIZER, token_ids)
    assert len(entries) == len(token_ids)


def test_a_token_that_the_text_leaves_out_has_a_name_but_no_bytes() -> None:
    end_id = special_ids(TOKENIZER)[1]
    (entry,) = entries_for(EngineChunk(token_ids=[end_id], log_probs=[-0.5]), 1)
    assert entry == {"token": "<|im_end|>", "logprob": -0.5, "bytes": None, "top_logprobs": []}


def test_tokens_after_a_stop_string_have_no_entries() -> None:
    chunk = EngineChunk(token_ids=encode(TOKENIZER, "abcdef")[:3], log_probs=[-1.0, -2.0, -3.0])
    assert [entry["logprob"] for entry in entries_for(chunk, 2)] == [-1.0, -2.0]


def test_only_as_many_alternatives_as_asked_for() -> None:
    (token_id,) = encode(TOKENIZER, "a")
    chunk = EngineChunk(token_ids=[token_id], log_probs=[-1.0], top_logprobs=[[(token_id, -1.0), (token_id, -2.0)]])
    assert [top["logprob"] for top in entries_for(chunk, 1, 1)[0]["top_logprobs"]] == [-1.0]


def test_an_impossible_token_has_a_number_that_json_can_carry() -> None:
    token_ids = encode(TOKENIZER, "ab")[:1] * 2
    entries = entries_for(EngineChunk(token_ids=token_ids, log_probs=[-math.inf, math.nan]), 2)
    assert [entry["logprob"] for entry in entries] == [-9999.0, -9999.0]


def test_an_engine_that_sends_no_logprobs_gives_no_entries() -> None:
    assert logprob_entries(EngineChunk(token_ids=[1]), 1, 0, VOCABULARY, VOCABULARY.special_ids) is None
