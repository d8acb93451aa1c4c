import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.tokenizers_for_tests import (
    BYTE_TOKENIZERS,
    TOKENIZERS,
    detokenize,
    encode,
    few_examples,
    generated_text,
    id_chunks,
    ids_of_bytes,
    special_ids,
    splits,
    with_each,
    with_each_text,
)


def run(tokenizer: Tokenizer, chunks: list[list[int]], *stop: str) -> tuple[str, int, str | None]:
    """The whole text, the number of tokens counted and the stop string that matched."""
    generated = generated_text(tokenizer, *stop)
    text = "".join([*(generated.push(chunk) for chunk in chunks), generated.finish()])
    return text, generated.num_tokens, generated.stopped


def reference(tokenizer: Tokenizer, token_ids: list[int], *stop: str) -> tuple[str, int, str | None]:
    """The fewest tokens whose text has a stop string, cut before the one that completes first."""
    for num_tokens in range(len(token_ids) + 1):
        text = detokenize(tokenizer, token_ids[:num_tokens])
        found = [(text.index(string) + len(string), text.index(string)) for string in stop if string in text]
        if found:
            end, start = min(found)
            return text[:start], num_tokens, text[start:end]
    return detokenize(tokenizer, token_ids), len(token_ids), None


@with_each(TOKENIZERS)
@few_examples
@given(data=st.data())
def test_without_stop_strings_it_is_the_detokenized_text_of_all_tokens(
    tokenizer: Tokenizer, data: st.DataObject
) -> None:
    chunks = data.draw(id_chunks(tokenizer))
    token_ids = [token_id for chunk in chunks for token_id in chunk]
    assert run(tokenizer, chunks) == (detokenize(tokenizer, token_ids), len(token_ids), None)


@with_each(TOKENIZERS)
@few_examples
@given(data=st.data())
def test_any_split_stops_at_the_same_text_and_token(tokenizer: Tokenizer, data: st.DataObject) -> None:
    chunks = data.draw(id_chunks(tokenizer))
    token_ids = [token_id for chunk in chunks for token_id in chunk]
    text = detokenize(tokenizer, token_ids) or "x"
    parts_of_the_text = st.integers(0, len(text) - 1).flatmap(
        lambda start: st.integers(start + 1, min(start + 4, len(text))).map(lambda end: text[start:end])
    )
    stop = data.draw(st.lists(parts_of_the_text | st.text(min_size=1, max_size=2), min_size=1, max_size=4))
    assert run(tokenizer, chunks, *stop) == reference(tokenizer, token_ids, *stop)


@with_each(BYTE_TOKENIZERS)
@with_each_text()
@pytest.mark.parametrize("stop", ["STOP", "👍STOP", "é"])
def test_a_stop_string_leaves_the_multibyte_characters_next_to_it_whole(
    tokenizer: Tokenizer, text: str, stop: str
) -> None:
    token_ids = encode(tokenizer, text + stop + text)
    one_by_one = [[token_id] for token_id in token_ids]
    assert run(tokenizer, one_by_one, stop)[0] == text
    assert run(tokenizer, [token_ids], stop) == run(tokenizer, one_by_one, stop)


@with_each(BYTE_TOKENIZERS)
def test_tokens_after_the_one_that_completed_the_stop_string_are_not_counted(tokenizer: Tokenizer) -> None:
    token_ids = ids_of_bytes(tokenizer, "ab👍👍cd".encode())
    assert run(tokenizer, [token_ids], "👍c") == ("ab👍", 11, "👍c")
    assert run(tokenizer, [token_ids], "👍") == ("ab", 6, "👍")


@with_each(BYTE_TOKENIZERS)
@few_examples
@given(data=st.data())
def test_a_stop_string_may_span_any_number_of_pushes(tokenizer: Tokenizer, data: st.DataObject) -> None:
    token_ids = encode(tokenizer, "the fox. 你好, the END of the world")
    assert run(tokenizer, data.draw(splits(token_ids)), "好, the END")[0] == "the fox. 你"


@with_each(BYTE_TOKENIZERS)
def test_the_beginning_of_a_stop_string_is_sent_when_the_generation_ends(tokenizer: Tokenizer) -> None:
    generated = generated_text(tokenizer, "world")
    assert generated.push(encode(tokenizer, "hello wor")) == "hello "
    assert generated.finish() == "wor"
    assert generated.stopped is None


@with_each(BYTE_TOKENIZERS)
def test_a_character_cut_off_by_the_end_is_dropped_after_a_held_beginning(tokenizer: Tokenizer) -> None:
    token_ids = ids_of_bytes(tokenizer, b"a ST" + "👍".encode()[:2])
    assert run(tokenizer, [token_ids], "STOP") == ("a ST", 6, None)


@with_each(BYTE_TOKENIZERS)
def test_nothing_is_sent_or_counted_after_a_stop_string(tokenizer: Tokenizer) -> None:
    generated = generated_text(tokenizer, ".")
    assert generated.push(encode(tokenizer, "one.")) == "one"
    num_tokens = generated.num_tokens
    assert generated.push(encode(tokenizer, "two.")) == ""
    assert generated.finish() == ""
    assert (generated.num_tokens, generated.stopped) == (num_tokens, ".")


@with_each(BYTE_TOKENIZERS)
def test_special_tokens_are_counted_and_not_shown(tokenizer: Tokenizer) -> None:
    token_ids = [*special_ids(tokenizer), *ids_of_bytes(tokenizer, b"ok"), *special_ids(tokenizer)]
    assert run(tokenizer, [token_ids]) == ("ok", len(token_ids), None)
    assert run(tokenizer, [token_ids], "STOP") == ("ok", len(token_ids), None)
