"""Tool calls read from a model's text: any cut of the text gives the same, and SGLang's parser agrees."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.hermes_detector import HermesDetector

from common.text.readers import TextReader, ToolCallReader, forced_calls_reader, hermes_reader
from common.wire import ProcessorChunk
from tests.processes import cpu_s
from tests.tokenizers_for_tests import few_examples

NAMES = ("weather", "get-time", "f")
TOOLS = [Tool(type="function", function=Function(name=name)) for name in NAMES]
READERS = {"hermes": hermes_reader, "forced": forced_calls_reader}
ROME = '{"name": "weather", "arguments": {"city": "Rome"}}'

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[]<>\n é👍', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('k{"<', max_size=2), inner, max_size=3),
    max_leaves=6,
)
arguments = st.dictionaries(st.text('ab"\\}<', max_size=3), values, max_size=3)
contents = st.text("ab <>{}\n[,]é", max_size=8)


@dataclass
class Read:
    """What a reader made of a text. deltas: each in the order it came."""

    content: str
    calls: list[tuple[str, str]]
    deltas: list[tuple[int, str | None, str]]
    has_called: bool


def read_whole(reader: TextReader, pieces: Iterable[str]) -> ProcessorChunk:
    """All chunks as one."""
    whole = ProcessorChunk()
    for piece in pieces:
        whole.add(reader.push(piece))
    whole.add(reader.flush())
    return whole


def read(reader: ToolCallReader, pieces: Iterable[str]) -> Read:
    whole = read_whole(reader, pieces)
    calls: list[tuple[str, str]] = []
    for delta in whole.tool_calls:
        if delta.name is not None:
            assert (delta.index, delta.arguments) == (len(calls), ""), "the name comes first, and alone"
            calls.append((delta.name, ""))
        assert delta.index == len(calls) - 1
        calls[delta.index] = (calls[delta.index][0], calls[delta.index][1] + delta.arguments)
    deltas = [(delta.index, delta.name, delta.arguments) for delta in whole.tool_calls]
    return Read(whole.content, calls, deltas, reader.has_called)


def cuts(text: str) -> st.SearchStrategy[list[str]]:
    positions = st.lists(st.integers(0, len(text)), max_size=8).map(sorted)
    return positions.map(lambda cut: [text[a:b] for a, b in pairwise([0, *cut, len(text)])])


@st.composite
def called(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    return draw(st.sampled_from(NAMES)), draw(arguments)


@st.composite
def texts_of_hermes(draw: st.DrawFn) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """As models write them: some text, then calls, one below the other; and these calls."""
    calls = draw(st.lists(called(), min_size=1, max_size=3))
    space = draw(st.sampled_from(["", "\n", " "]))
    names = draw(st.sampled_from([("name", "arguments"), ("arguments", "name")]))
    written = [
        json.dumps({key: {"name": name, "arguments": args}[key] for key in names}, ensure_ascii=draw(st.booleans()))
        for name, args in calls
    ]
    before = draw(st.text("ab .é", max_size=6))
    return before + "\n".join(f"<tool_call>{space}{call}{space}</tool_call>" for call in written), calls


@few_examples
@given(given_text=texts_of_hermes(), data=st.data())
def test_any_cut_gives_what_sglang_makes_of_the_whole(
    given_text: tuple[str, list[tuple[str, dict[str, Any]]]], data: st.DataObject
) -> None:
    text, calls = given_text
    oracle = HermesDetector().detect_and_parse(text, TOOLS)
    assert [(call.name, json.loads(call.parameters)) for call in oracle.calls] == calls
    for pieces in ([text], list(text), data.draw(cuts(text))):
        found = read(hermes_reader(NAMES), pieces)
        assert [(name, json.loads(args)) for name, args in found.calls] == calls
        assert found.content.strip() == oracle.normal_text
        assert found.has_called


@few_examples
@given(
    parts=st.lists(
        contents | st.sampled_from(["<tool_call>", "</tool_call>", "<tool_call>\n", ROME, ROME[:30], '"f"', "}", "["]),
        max_size=8,
    ),
    data=st.data(),
)
@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
def test_any_cut_of_any_text_gives_the_same(
    reader: Callable[[Iterable[str]], ToolCallReader], parts: list[str], data: st.DataObject
) -> None:
    text = "".join(parts)
    whole = read(reader(NAMES), [text])
    for pieces in (list(text), data.draw(cuts(text))):
        found = read(reader(NAMES), pieces)
        assert (found.content, found.calls, found.has_called) == (whole.content, whole.calls, whole.has_called)


@few_examples
@given(text=contents)
def test_a_text_without_calls_is_content_to_the_letter(text: str) -> None:
    assert read(hermes_reader(NAMES), list(text)).content == text


@few_examples
@given(calls=st.lists(called(), min_size=1, max_size=3), data=st.data())
def test_a_forced_array_is_calls_and_nothing_else(calls: list[tuple[str, dict[str, Any]]], data: st.DataObject) -> None:
    separators = data.draw(st.sampled_from([(",", ":"), (", ", ": ")]))
    text = json.dumps([{"name": name, "arguments": args} for name, args in calls], separators=separators)
    found = read(forced_calls_reader(NAMES), data.draw(cuts(text)))
    assert [(name, json.loads(args)) for name, args in found.calls] == calls
    assert (found.content, found.has_called) == ("", True)


def test_the_name_comes_as_soon_as_it_is_sure_and_arguments_as_they_are_made() -> None:
    reader = hermes_reader(NAMES)
    pieces = ['<tool_call>{"name": "weather", "arguments": ', '{"city"', ': "Ro', 'me"}', "}</tool_call>"]
    made = [[(delta.name, delta.arguments) for delta in reader.push(piece).tool_calls] for piece in pieces]
    assert made == [[], [("weather", ""), (None, '{"city"')], [(None, ': "Ro')], [(None, 'me"}')], []]


NO_CALLS = [
    "<tool_call>",
    "<tool_call> I would write <tool_call>\n",
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": 7}</tool_call> and then',
    '<tool_call>{"name": "f", ',
    "<tool_call>[1]</tool_call>",
    "</tool_call>",
    " \n ",
]


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_only_looks_like_a_call_is_content(text: str) -> None:
    found = read(hermes_reader(NAMES), list(text))
    assert (found.content, found.calls, found.has_called) == (text, [], False)


@pytest.mark.parametrize(
    ("text", "content", "call"),
    [
        ('<tool_call>{"arguments": "{\\"a\\": 1}", "name": "f"}</tool_call>', "", ("f", '{"a": 1}')),
        ('<tool_call>{"name": "f"}</tool_call>', "", ("f", "{}")),
        ('<tool_call>{"name": "f", "parameters": {"a": 1}, "id": 7}</tool_call>', "", ("f", '{"a": 1}')),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>', "", ("f", '{"a": 1}')),  # a brace too few
        ('A\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\nB', "AB", ("f", "{}")),
        ('<tool_call>{"name": "f", "arguments": {}} B', "B", ("f", "{}")),
    ],
)
def test_what_models_make_of_the_form_is_understood(text: str, content: str, call: tuple[str, str]) -> None:
    found = read(hermes_reader(NAMES), list(text))
    assert (found.content, found.calls, found.has_called) == (content, [call], True)


def test_a_call_that_is_cut_off_is_no_finished_call() -> None:
    found = read(hermes_reader(NAMES), [f"<tool_call>{ROME}</tool_call><tool_call>{ROME[:-5]}"])
    assert [args for _, args in found.calls] == ['{"city": "Rome"}', '{"city": "Ro']
    assert not found.has_called


@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
@pytest.mark.parametrize(
    "pieces", [[" " * 1_000_000], [" "] * 100_000, [" " * 99 + "<"] * 10_000, ["<tool_call> "] * 9999]
)
def test_no_white_space_stalls(reader: Callable[[Iterable[str]], ToolCallReader], pieces: list[str]) -> None:
    """A million at once took 5 s: the bar is what letters take."""
    letters = ["a" * len(piece) for piece in pieces]
    usual_s = cpu_s(lambda: read(reader(NAMES), letters))
    assert read(reader(NAMES), pieces).content == "".join(pieces)
    assert cpu_s(lambda: read(reader(NAMES), pieces)) < 1 + 4 * usual_s


def test_a_long_object_that_is_no_call_yet_does_not_stall() -> None:
    """It took 18 s, and grew with the square of the length: the bar is what the words alone take."""
    words = ["word "] * 200_000
    pieces = ["<tool_call>{", *words]
    usual_s = cpu_s(lambda: read(hermes_reader(NAMES), words))
    assert read(hermes_reader(NAMES), pieces).content == "".join(pieces)
    assert cpu_s(lambda: read(hermes_reader(NAMES), pieces)) < 1 + 4 * usual_s


@pytest.mark.parametrize(("reader", "part"), [("forced", "[{}"), ("hermes", '<tool_call>{"name": "f"}')])
def test_many_calls_in_one_piece_do_not_stall(reader: str, part: str) -> None:
    """The time grew with the square of their number."""
    few_s, many_s = (
        cpu_s(lambda number=number: READERS[reader](NAMES).push((part + "x" * 60) * number))
        for number in (10_000, 40_000)
    )
    assert many_s < 1 + 8 * few_s


@pytest.mark.parametrize("num_spaces", [98, 99, 100, 300])
@pytest.mark.parametrize("reader", READERS.values(), ids=list(READERS))
def test_any_cut_of_much_white_space_gives_the_same(
    reader: Callable[[Iterable[str]], ToolCallReader], num_spaces: int
) -> None:
    space = " " * num_spaces
    text = f"a{space}<tool_call>{space}{ROME}{space}</tool_call>b{space}[{ROME},{space}{ROME}{space}]{space}<tool_call>"
    whole = read(reader(NAMES), [text])
    for pieces in (list(text), [text[at : at + 7] for at in range(0, len(text), 7)]):
        found = read(reader(NAMES), pieces)
        assert (found.content, found.calls) == (whole.content, whole.calls)
    assert whole.content.startswith("a" + " " * max(0, num_spaces - 99))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": "\\ud800"}', '{"a": "\\ud800"}'), ('{"a": "\\ud83d\\udc4d \\u00e9"}', '{"a": "👍 é"}')],
)
def test_rewritten_arguments_are_json_in_utf_8(arguments: str, expected: str) -> None:
    for value in (arguments, json.dumps(arguments)):
        found = read(hermes_reader(NAMES), [f'<tool_call>{{"arguments": {value}, "name": "f"}}</tool_call>'])
        assert found.calls == [("f", expected)]
        assert json.loads(expected.encode()) == json.loads(arguments)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_call_with_a_number_that_json_does_not_have_is_content_where_it_would_be_rewritten(number: str) -> None:
    text = f'<tool_call>{{"arguments": {{"a": {number}}}, "name": "f"}}</tool_call>'
    assert (read(hermes_reader(NAMES), [text]).calls, read(hermes_reader(NAMES), [text]).content) == ([], text)
