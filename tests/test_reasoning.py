"""What a model thinks, told from what it answers: any cut of the text gives the same, and SGLang's parser agrees."""

from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.parser.reasoning_parser import ReasoningParser

from common.text.readers import PlainTextReader, ReasoningReader, hermes_reader
from common.wire import ProcessorChunk
from tests.processes import MODEL, Pipeline, cpu_s
from tests.streams import ask_stream
from tests.test_tool_calls import ROME, cuts
from tests.tokenizers_for_tests import few_examples

texts = st.text("ab <>/\n.é👍", max_size=8)
parts = st.lists(texts | st.sampled_from(["<think>", "</think>", "<think", "\n</thi"]), max_size=6).map("".join)


def read(pieces: Iterable[str], *, is_open: bool = False, has_tools: bool = False) -> tuple[str, str, bool]:
    """Thoughts, content, and whether there were thoughts."""
    reader = ReasoningReader(hermes_reader(["weather"]) if has_tools else PlainTextReader(), is_open=is_open)
    whole = ProcessorChunk()
    for piece in pieces:
        whole.add(reader.push(piece))
    whole.add(reader.flush())
    assert reader.has_called == bool(whole.tool_calls)
    return whole.reasoning_content, whole.content, reader.has_thought


@few_examples
@given(text=parts, is_open=st.booleans(), data=st.data())
def test_any_cut_of_any_text_gives_the_same(text: str, is_open: bool, data: st.DataObject) -> None:
    whole = read([text], is_open=is_open)
    assert read(list(text), is_open=is_open) == whole
    assert read(data.draw(cuts(text)), is_open=is_open) == whole


@few_examples
@given(thoughts=st.text("ab .é\n", max_size=8), answer=texts.filter(lambda text: "<" not in text))
@pytest.mark.parametrize(("is_open", "parser"), [(False, "qwen3"), (True, "deepseek-r1")])
def test_the_thoughts_are_those_that_sglang_finds(is_open: bool, parser: str, thoughts: str, answer: str) -> None:
    text = f"{'' if is_open else '<think>'}{thoughts}</think>{answer}"
    expected, content = ReasoningParser(parser).parse_non_stream(text)
    assert read([text], is_open=is_open) == (expected.strip(), content.lstrip(), True)


@few_examples
@given(text=texts)
def test_a_text_without_thoughts_is_the_answer_to_the_letter(text: str) -> None:
    assert read(list(text)) == ("", text, False)


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("\n<think>\nHm.\n</think>\n\nYes.", False, ("Hm.", "Yes.", True)),
        ("Hm.</think>Yes.", True, ("Hm.", "Yes.", True)),
        ("<think>Hm.</think>Yes.", True, ("Hm.", "Yes.", True)),  # some write what the prompt has written
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.", True)),
        ("<think>Hm", False, ("Hm", "", True)),  # cut off
        ("Hm", True, ("Hm", "", True)),
        ("", True, ("", "", True)),
        ("Yes: <think>Hm.</think>", False, ("", "Yes: <think>Hm.</think>", False)),
        ("<think>A</think>B<think>C</think>", False, ("A", "B<think>C</think>", True)),
    ],
)
def test_thoughts_come_first_or_not_at_all(text: str, is_open: bool, expected: tuple[str, str, bool]) -> None:
    assert read(list(text), is_open=is_open) == expected


def test_a_call_may_follow_the_thoughts() -> None:
    text = f"<think>I should ask: <tool_call></think>\n\n<tool_call>{ROME}</tool_call>"
    assert read(list(text), has_tools=True) == ("I should ask: <tool_call>", "", True)


def test_thoughts_come_as_they_are_made() -> None:
    reader = ReasoningReader(PlainTextReader(), is_open=False)
    assert [reader.push(piece).reasoning_content for piece in ("<think>", "\nI ", "think", " </th", "ing")] == [
        "", "I", " think", "", " </thing",
    ]  # fmt: skip


@pytest.mark.parametrize("before", ["", "<think>", "<think>a", "<think>a</think>"])
@pytest.mark.parametrize("pieces", [[" " * 1_000_000], [" "] * 200_000], ids=["at once", "one by one"])
@pytest.mark.parametrize("is_open", [False, True])
def test_no_white_space_stalls(is_open: bool, pieces: list[str], before: str) -> None:
    """One by one it took 23 s: the bar is what letters take."""
    letters = ["a" * len(piece) for piece in pieces]
    usual_s = cpu_s(lambda: read([before, *letters], is_open=is_open))
    assert cpu_s(lambda: read([before, *pieces], is_open=is_open)) < 1 + 4 * usual_s


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize("num_spaces", [98, 99, 100, 300])
def test_any_cut_of_much_white_space_gives_the_same(num_spaces: int, is_open: bool) -> None:
    space = "\n" * num_spaces
    text = f"{space}<think>{space}a{space}<{space}b{space}</think>{space}c{space}"
    whole = read([text], is_open=is_open)
    assert read(list(text), is_open=is_open) == whole
    assert read([text[at : at + 7] for at in range(0, len(text), 7)], is_open=is_open) == whole


@pytest.fixture
def client(echo: Pipeline) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=echo.url, timeout=60) as client:
        yield client


@pytest.mark.process
@pytest.mark.parametrize(
    ("model", "text", "thoughts", "content"),
    [
        ("closed", "<think>\nHm, let me see.\n</think>\n\nYes.", "Hm, let me see.", "Yes."),
        ("open", "Hm, let me see.\n</think>\n\nYes.", "Hm, let me see.", "Yes."),
        ("closed", "Yes.", None, "Yes."),
        ("open", "Hm, let", "Hm, let", None),
        (MODEL, "<think>Hm.</think>Yes.", None, "<think>Hm.</think>Yes."),
    ],
)
def test_thoughts_are_no_content_streamed_and_not(
    client: httpx.Client, model: str, text: str, thoughts: str | None, content: str | None
) -> None:
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
    answer = client.post("/v1/chat/completions", json=body).json()
    message = answer["choices"][0]["message"]
    assert (message.get("reasoning_content"), message["content"]) == (thoughts, content)
    stream = ask_stream(client, body | {"stream_options": {"include_usage": True}, "logprobs": True})
    assert (stream.reasoning[0], stream.contents[0]) == (thoughts or "", content or "")
    assert stream.usage == answer["usage"]
    assert len(stream.logprobs[0]) == answer["usage"]["completion_tokens"]


@pytest.mark.process
def test_the_usage_tells_how_many_tokens_were_thoughts(client: httpx.Client) -> None:
    def reasoning_tokens(model: str, text: str) -> int | None:
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        usage = client.post("/v1/chat/completions", json=body).json()["usage"]
        return usage.get("completion_tokens_details", {}).get("reasoning_tokens")

    assert reasoning_tokens("closed", "<think>a</think>b c d") == 3
    assert reasoning_tokens("open", "a</think>b c d") == 2
    assert reasoning_tokens("closed", "a b c") == 0
    assert reasoning_tokens(MODEL, "<think>a</think>b c d") is None
