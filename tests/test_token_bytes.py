import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from common.text.vocabulary import Vocabulary, decoder_types
from tests.tokenizers_for_tests import (
    BYTE_FALLBACK,
    BYTE_LEVEL,
    BYTE_TOKENIZERS,
    TOKENIZERS,
    encode,
    few_examples,
    id_chunks,
    id_of_byte,
    with_each,
    with_each_text,
)


def joined_bytes(tokenizer: Tokenizer, token_ids: list[int]) -> bytes:
    return b"".join(map(Vocabulary(tokenizer).bytes_of, token_ids))


def leading_space(tokenizer: Tokenizer) -> str:
    """The space that a Llama tokenizer puts in front of a text, and its decoder takes away again."""
    return " " if "Strip" in decoder_types(tokenizer) else ""


@with_each(BYTE_TOKENIZERS)
@with_each_text()
def test_the_bytes_of_a_texts_tokens_are_the_utf8_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    expected = leading_space(tokenizer) + text
    assert joined_bytes(tokenizer, encode(tokenizer, text)).decode() == expected


@with_each(BYTE_TOKENIZERS)
@few_examples
@given(data=st.data())
def test_the_bytes_of_any_valid_generation_are_the_utf8_of_its_decoded_text(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    token_ids = [token_id for chunk in data.draw(id_chunks(tokenizer)) for token_id in chunk]
    decoded = tokenizer.decode(token_ids, skip_special_tokens=False)
    if "\ufffd" not in decoded:
        text = joined_bytes(tokenizer, token_ids).decode()
        assert decoded in (text, text.removeprefix(" "))


@with_each(BYTE_TOKENIZERS)
def test_the_token_of_a_byte_is_that_byte(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    for byte in range(256):
        token_id = id_of_byte(tokenizer, byte)
        assert token_id is None or vocabulary.bytes_of(token_id) == bytes([byte])


@with_each(BYTE_LEVEL)
def test_every_token_of_a_byte_level_vocabulary_is_what_the_decoder_makes_of_it(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    for token_id in range(min(tokenizer.get_vocab_size(), 5000)):
        text = vocabulary.bytes_of(token_id).decode(errors="replace")
        assert text == tokenizer.decode([token_id], skip_special_tokens=False)


@with_each(BYTE_FALLBACK)
def test_a_metaspace_is_a_space_wherever_the_token_stands(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.bytes_of(tokenizer.token_to_id("▁the")) == b" the"
    assert vocabulary.bytes_of(tokenizer.token_to_id("▁▁")) == b"  "


@pytest.mark.parametrize(("name", "expected"), [("llama", b"the"), ("gemma", b" the")])
def test_the_first_token_loses_the_space_that_the_decoder_strips(name: str, expected: bytes) -> None:
    tokenizer = BYTE_FALLBACK[name]
    assert Vocabulary(tokenizer).leading_bytes_of(tokenizer.token_to_id("▁the")) == expected


@with_each(BYTE_TOKENIZERS)
def test_added_and_special_tokens_are_their_literal_content(tokenizer: Tokenizer) -> None:
    vocabulary = Vocabulary(tokenizer)
    for token_id, token in tokenizer.get_added_tokens_decoder().items():
        assert vocabulary.bytes_of(token_id) == token.content.encode()


@with_each(TOKENIZERS)
@pytest.mark.parametrize("beyond", [0, 1, 2**32, 2**64, -(2**63)])
def test_an_id_outside_the_vocabulary_has_no_bytes(tokenizer: Tokenizer, beyond: int) -> None:
    token_id = beyond + tokenizer.get_vocab_size()
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.bytes_of(token_id) == vocabulary.leading_bytes_of(token_id) == b""


def test_a_tokenizer_without_a_decoder_has_no_decoder_types() -> None:
    assert decoder_types(Tokenizer(models.WordLevel())) == frozenset()


def test_a_token_of_any_other_decoder_is_what_it_adds_inside_a_text() -> None:
    tokenizer = TOKENIZERS["word-piece"]
    vocabulary = Vocabulary(tokenizer)
    token_ids = encode(tokenizer, "hello tokenizers.")
    assert list(map(vocabulary.bytes_of, token_ids)) == [b" hello", b" token", b"ize", b"r", b"s", b"."]
