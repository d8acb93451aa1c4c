import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from common.text.vocabulary import Vocabulary
from tests.tokenizers_for_tests import (
    BYTE_FALLBACK,
    BYTE_LEVEL,
    BYTE_TOKENIZERS,
    TOKENIZERS,
    detokenize,
    encode,
    few_examples,
    generated_text,
    id_chunks,
    ids_of_bytes,
    special_ids,
    with_each,
    with_each_text,
)

# The bytes that begin a character and do not end it (RFC 3629, section 4, and the surrogates it excludes).
CUT_OFF_CHARACTER = re.compile(
    rb"([\xc2-\xdf\xe0-\xef\xf0-\xf4]|\xe0[\xa0-\xbf]|[\xe1-\xef][\x80-\xbf]"
    rb"|(\xf0[\x90-\xbf]|[\xf1-\xf3][\x80-\xbf]|\xf4[\x80-\x8f])[\x80-\xbf]?)\Z"
)


def pushes(tokenizer: Tokenizer, chunks: list[list[int]]) -> list[str]:
    """What each push returned."""
    generated = generated_text(tokenizer)
    return [generated.push(chunk) for chunk in chunks]


def joined(chunks: list[list[int]]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk]


@with_each(TOKENIZERS)
@few_examples
@given(data=st.data())
def test_any_split_of_any_ids_gives_the_text_of_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    chunks = data.draw(id_chunks(tokenizer))
    assert "".join(pushes(tokenizer, chunks)) == detokenize(tokenizer, joined(chunks))


@with_each(TOKENIZERS)
@few_examples
@given(data=st.data())
def test_the_text_is_the_tokenizers_own_where_its_bytes_are_valid(tokenizer: Tokenizer, data: st.DataObject) -> None:
    token_ids = joined(data.draw(id_chunks(tokenizer)))
    expected = tokenizer.decode(token_ids)
    if "\ufffd" not in expected:
        assert detokenize(tokenizer, token_ids) == expected


@with_each(BYTE_LEVEL)
@few_examples
@given(data=st.data())
def test_invalid_bytes_become_what_a_byte_level_tokenizer_makes_of_them(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    hidden_ids = special_ids(tokenizer)
    token_ids = [token_id for token_id in joined(data.draw(id_chunks(tokenizer))) if token_id not in hidden_ids]
    text_bytes = b"".join(map(Vocabulary(tokenizer).bytes_of, token_ids))
    expected = CUT_OFF_CHARACTER.sub(b"", text_bytes).decode(errors="replace")
    assert tokenizer.decode(token_ids) == text_bytes.decode(errors="replace")
    assert detokenize(tokenizer, token_ids) == expected


@with_each(BYTE_TOKENIZERS)
@with_each_text()
def test_a_text_comes_back_one_token_at_a_time(tokenizer: Tokenizer, text: str) -> None:
    token_ids = encode(tokenizer, text)
    assert "".join(pushes(tokenizer, [[token_id] for token_id in token_ids])) == text


@with_each(BYTE_TOKENIZERS)
@with_each_text()
def test_a_text_comes_back_one_byte_at_a_time(tokenizer: Tokenizer, text: str) -> None:
    token_ids = [*encode(tokenizer, "a"), *ids_of_bytes(tokenizer, text.encode())]
    assert "".join(pushes(tokenizer, [[token_id] for token_id in token_ids])) == "a" + text


@with_each(BYTE_TOKENIZERS)
@with_each_text()
def test_a_generation_cut_anywhere_ends_with_a_whole_character(tokenizer: Tokenizer, text: str) -> None:
    token_ids = encode(tokenizer, text)
    for num_tokens in range(len(token_ids)):
        cut = token_ids[:num_tokens]
        assert text.startswith(detokenize(tokenizer, cut))
        assert "".join(pushes(tokenizer, [[token_id] for token_id in cut])) == detokenize(tokenizer, cut)


@with_each(TOKENIZERS)
@few_examples
@given(data=st.data())
def test_no_push_has_a_replacement_character_where_the_whole_text_has_none(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    chunks = data.draw(id_chunks(tokenizer))
    if "\ufffd" not in tokenizer.decode(joined(chunks)):
        assert "\ufffd" not in "".join(pushes(tokenizer, chunks))


@with_each(BYTE_TOKENIZERS)
def test_a_character_is_sent_with_its_last_byte_and_not_before(tokenizer: Tokenizer) -> None:
    one_by_one = [[token_id] for token_id in ids_of_bytes(tokenizer, "aé👍".encode())]
    assert pushes(tokenizer, one_by_one) == ["a", "", "é", "", "", "", "👍"]


@with_each(BYTE_TOKENIZERS)
def test_a_chunk_sends_all_but_its_unfinished_character(tokenizer: Tokenizer) -> None:
    before, after = ids_of_bytes(tokenizer, "ab👍".encode()[:4]), ids_of_bytes(tokenizer, "👍".encode()[2:])
    assert pushes(tokenizer, [before, after]) == ["ab", "👍"]


@with_each(BYTE_TOKENIZERS)
@pytest.mark.parametrize("num_bytes", [1, 2, 3])
def test_an_emoji_cut_off_by_the_end_is_dropped(tokenizer: Tokenizer, num_bytes: int) -> None:
    token_ids = ids_of_bytes(tokenizer, b"ok" + "👍".encode()[:num_bytes])
    assert detokenize(tokenizer, token_ids) == "ok"
    assert pushes(tokenizer, [token_ids]) == ["ok"]


@with_each(BYTE_TOKENIZERS)
def test_invalid_bytes_in_the_middle_become_replacement_characters(tokenizer: Tokenizer) -> None:
    token_ids = ids_of_bytes(tokenizer, b"a\x80b\xe2\x82c")
    assert detokenize(tokenizer, token_ids) == "a\ufffdb\ufffdc"


@with_each(BYTE_FALLBACK)
def test_a_character_already_sent_stays_when_an_invalid_byte_follows(tokenizer: Tokenizer) -> None:
    chunks = [ids_of_bytes(tokenizer, "€".encode()), ids_of_bytes(tokenizer, b"\xff")]
    assert pushes(tokenizer, chunks) == ["€", "\ufffd"]


@with_each(BYTE_TOKENIZERS)
def test_special_and_unknown_ids_inside_a_character_do_not_break_it(tokenizer: Tokenizer) -> None:
    first, *rest = ids_of_bytes(tokenizer, "é".encode())
    inside = [*special_ids(tokenizer), tokenizer.get_vocab_size()]
    assert detokenize(tokenizer, [first, *inside, *rest]) == "é"


def test_the_leading_space_is_stripped_once_and_only_where_the_decoder_does() -> None:
    pieces = ["<s>", "▁", "▁wor", "<s>", "▁the"]
    assert pushes_of_pieces(BYTE_FALLBACK["llama"], pieces) == ["", "", " wor", "", " the"]
    assert pushes_of_pieces(BYTE_FALLBACK["gemma"], pieces) == ["", " ", " wor", "", " the"]


def pushes_of_pieces(tokenizer: Tokenizer, pieces: list[str]) -> list[str]:
    return pushes(tokenizer, [[tokenizer.token_to_id(piece)] for piece in pieces])


@with_each(BYTE_TOKENIZERS)
def test_a_long_run_of_invalid_bytes_is_looked_at_once(tokenizer: Tokenizer) -> None:
    num_bytes = 20_000  # minutes, if every push decoded the run again
    chunks = [ids_of_bytes(tokenizer, b"\x80")] * num_bytes
    assert "".join(pushes(tokenizer, chunks)) == "\ufffd" * num_bytes


@with_each(TOKENIZERS)
def test_no_ids_give_no_text(tokenizer: Tokenizer) -> None:
    assert detokenize(tokenizer, []) == ""
    assert pushes(tokenizer, [[], []]) == ["", ""]
