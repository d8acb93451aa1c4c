from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.text.generated_text import StopStringMatcher
from tests.tokenizers_for_tests import few_examples

texts = st.text(alphabet="ab👍é", max_size=12)
stops = st.lists(st.text(alphabet="ab👍é", min_size=1, max_size=4), min_size=1, max_size=4)


def reference(text: str, stop: list[str]) -> tuple[str, str | None]:
    """The rule, written as it reads: the first completion wins, then the earliest start."""
    for end in range(len(text) + 1):
        completed = [stop_string for stop_string in stop if text[:end].endswith(stop_string)]
        if completed:
            longest = max(completed, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(pieces: list[str], stop: list[str]) -> tuple[list[str], str | None]:
    """What each push returned, and flush last; and the stop string that matched."""
    matcher = StopStringMatcher(stop)
    return [*(matcher.push(piece) for piece in pieces), matcher.flush()], matcher.matched


@few_examples
@given(pieces=st.lists(texts, max_size=8), stop=stops)
def test_any_split_gives_what_the_rule_says_of_the_whole_text(pieces: list[str], stop: list[str]) -> None:
    sent, matched = run(pieces, stop)
    assert ("".join(sent), matched) == reference("".join(pieces), stop)


@few_examples
@given(text=texts, stop=stops)
def test_one_character_at_a_time_gives_what_the_whole_text_gives(text: str, stop: list[str]) -> None:
    one_by_one, whole = run(list(text), stop), run([text], stop)
    assert ("".join(one_by_one[0]), one_by_one[1]) == ("".join(whole[0]), whole[1])


@few_examples
@given(pieces=st.lists(texts, max_size=8), stop=stops)
def test_no_stop_string_is_ever_in_the_output(pieces: list[str], stop: list[str]) -> None:
    sent, _ = run(pieces, stop)
    assert not any(stop_string in "".join(sent) for stop_string in stop)


@few_examples
@given(pieces=st.lists(texts, max_size=8), stop=stops)
def test_no_more_is_held_back_than_the_longest_suffix_that_may_become_a_stop_string(
    pieces: list[str], stop: list[str]
) -> None:
    matcher, text, sent = StopStringMatcher(stop), "", ""
    for piece in pieces:
        text, sent = text + piece, sent + matcher.push(piece)
        if matcher.matched is None:
            beginnings = [stop_string[:length] for stop_string in stop for length in range(len(stop_string))]
            num_held = max(len(beginning) for beginning in beginnings if text.endswith(beginning))
            assert sent == text[: len(text) - num_held]


@pytest.mark.parametrize(
    ("pieces", "stop", "sent", "matched"),
    [
        (["xabc", "d"], ["abcd", "bc"], ["xa", "", ""], "bc"),
        (["xabcd"], ["abcd", "bc"], ["xa", ""], "bc"),
        (["xab", "c"], ["bc", "abc"], ["x", "", ""], "abc"),
        (["xa", "b"], ["a", "ab"], ["x", "", ""], "a"),
        (["aab", "aaa", "b"], ["aaab"], ["aab", "", "", ""], "aaab"),
        (["a\n", "\n", "\nb"], ["\n\n"], ["a", "", "", ""], "\n\n"),
        (["hello wor", "k"], ["world"], ["hello ", "work", ""], None),
        (["hello wor"], ["world"], ["hello ", "wor"], None),
        (["a👍", "b"], ["👍👍"], ["a", "👍b", ""], None),
        (["a👍", "👍b"], ["👍👍"], ["a", "", ""], "👍👍"),
        (["e", "\u0301 fin"], ["e\u0301"], ["", "", ""], "e\u0301"),
        (["👩\u200d", "👧 STOP"], ["👩\u200d👦", "STOP"], ["", "👩\u200d👧 ", ""], "STOP"),
        (["END"], ["END"], ["", ""], "END"),
        ([], ["END"], [""], None),
        (["", "x", ""], ["END"], ["", "x", "", ""], None),
    ],
)
def test_each_push_sends_what_can_no_longer_be_part_of_a_stop_string(
    pieces: list[str], stop: list[str], sent: list[str], matched: str | None
) -> None:
    assert run(pieces, stop) == (sent, matched)


@pytest.mark.parametrize("end", range(len("well, ###END### of it") + 1))
def test_a_stop_string_is_found_at_every_split_point(end: int) -> None:
    text = "well, ###END### of it"
    sent, matched = run([text[:end], text[end:]], ["###END###"])
    assert ("".join(sent), matched) == ("well, ", "###END###")


def test_everything_after_a_match_is_dropped() -> None:
    assert run(["a STOP b", " c", "STOP", "d"], ["STOP"]) == (["a ", "", "", "", ""], "STOP")


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert run(["a", "b"], []) == (["a", "b", ""], None)


@pytest.mark.parametrize("text", ["a" * 20_000, ("a" * 255 + "c") * 80])
def test_matching_costs_what_the_text_costs(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    num_compared = 0

    class Counted(str):
        def startswith(self, *args: Any) -> bool:
            nonlocal num_compared
            num_compared += 1
            return super().startswith(*args)

    matcher = StopStringMatcher([Counted("a" * 255 + "b"), Counted("ab" * 128)])
    assert "".join([*map(matcher.push, text), matcher.flush()]) == text
    assert num_compared <= 4 * len(text)
