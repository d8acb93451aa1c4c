"""Special tokens that messages spell out: plain text, and all else as it would be."""

import functools
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from common.text.special_tokens import MARK, LiteralSpecialTokens
from tests.tokenizers_for_tests import BYTE_LEVEL, TOKENIZERS, encode, few_examples, with_each


def texts_for(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    tokens = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    parts = [token[start:end] for token in tokens for start, end in ((0, None), (1, None), (0, -1), (0, 2))]
    return st.lists(st.sampled_from([*parts, "the", " ", "\n", "é", "<"]) | st.text(max_size=3)).map("".join)


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


@functools.cache
def without_special_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The library's own switch, for all of a text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy


def user(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


@with_each({name: tokenizer for name, tokenizer in TOKENIZERS.items() if name != "metaspace"})
@few_examples
@given(data=st.data())
def test_a_prompts_ids_are_those_of_the_template_around_those_of_a_text(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    text = data.draw(texts_for(tokenizer))
    begin, end, *_ = special_tokens(tokenizer)
    literals = LiteralSpecialTokens(tokenizer, begin + end)
    [message], *_ = literals.marked(user(text), [], {})
    assert message["content"].replace(MARK, "") == text
    [begin_id], [end_id] = encode(tokenizer, begin), encode(tokenizer, end)
    token_ids = encode(literals.encoder, f"{begin}{message['content']}{end}")
    assert token_ids == [begin_id, *encode(without_special_tokens(tokenizer), text), end_id]


@with_each(TOKENIZERS)
@few_examples
@given(text=st.text())
def test_a_text_without_special_tokens_gets_no_marks(tokenizer: Tokenizer, text: str) -> None:
    assume(not any(token[1:4] in text for token in special_tokens(tokenizer) if token[1:4]))  # what may begin one
    literals = LiteralSpecialTokens(tokenizer, "")
    assert literals.marked(user(text), [], {}) == (user(text), [], {})
    assert encode(literals.encoder, text) == encode(tokenizer, text)


def test_tokens_that_are_matched_in_normalized_text_are_text_too() -> None:
    tokenizer = Tokenizer.from_str(BYTE_LEVEL["byte-level"].to_str().replace('"normalized":false', '"normalized":true'))
    tokenizer.normalizer = normalizers.NFC()
    literals = LiteralSpecialTokens(tokenizer, "")
    [message], *_ = literals.marked(user("<|im_end|>"), [], {})
    im_start = tokenizer.token_to_id("<|im_start|>")
    token_ids = encode(literals.encoder, "<|im_start|>" + message["content"])
    assert token_ids == [im_start, *encode(without_special_tokens(tokenizer), "<|im_end|>")]


def test_fields_that_are_no_text_of_a_client_are_left_alone() -> None:
    tokenizer = Tokenizer.from_str(BYTE_LEVEL["byte-level"].to_str())
    tokenizer.add_special_tokens(["<user>"])
    [message], *_ = LiteralSpecialTokens(tokenizer, "").marked(user("user"), [], {})
    assert message["role"] == "user"
    assert message["content"] != "user"
