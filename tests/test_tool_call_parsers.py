"""Other forms of tool calls, read by SGLang's parsers: from an engine's tokens to the processor's chunks."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.arguments import Parsing, parse_processor_args
from common.openai.request import parse_chat_request
from common.openai.request_parts import Tool
from common.text.chat_tokenizer import ChatTokenizer
from common.text.choice import Choice
from common.text.tool_call_parsers import SGLangToolCallReader, check_parser
from common.wire import EngineChunk, EngineDescription, ProcessorChunk
from tests.processes import MODEL, ROOT
from tests.test_chat_template import OTHER_FORM, WEATHER
from tests.test_tool_calls import arguments, read_whole
from tests.tokenizers_for_tests import few_examples

ROME = '{"city": "Rome"}'
NOW = {"type": "function", "function": {"name": "now"}}
FORMS = {
    "llama3": f'<|python_tag|>{{"name": "weather", "parameters": {ROME}}}; {{"name": "weather", "parameters": {ROME}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ROME}}}]',
    "pythonic": '[weather(city="Rome")]',
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>",
    "hermes": f'<tool_call>{{"name": "weather", "arguments": {ROME}}}</tool_call>',
}
# The beginning, a call, what is between two, and the end.
MANY = {
    "llama3": ("<|python_tag|>", '{{"name": "{}", "parameters": {}}}', "; ", ""),
    "mistral": ("[TOOL_CALLS] [", '{{"name": "{}", "arguments": {}}}', ", ", "]"),
    "kimi_k2": (
        "<|tool_calls_section_begin|>",
        "<|tool_call_begin|>functions.{}:0<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "",
        "<|tool_calls_section_end|>",
    ),
}
TOOLS = [Tool.model_validate(tool) for tool in (WEATHER, NOW)]


def tokenizer_for(form: str) -> ChatTokenizer:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|python_tag|>", "[TOOL_CALLS]"]})
    tokenizer.chat_template = OTHER_FORM
    model = EngineDescription("m", context_length=8192, vocab_size=49200)
    return ChatTokenizer(tokenizer, model=model, parsing=Parsing(tool_calls=form))


def chunks_of(tokenizer: ChatTokenizer, text: str, **fields: Any) -> Iterator[ProcessorChunk]:
    """Of a choice, where the engine sends one token after the other and the end of sequence."""
    messages = [{"role": "user", "content": "Hi!"}]
    request = parse_chat_request({"model": "m", "messages": messages, "tools": [WEATHER, NOW]} | fields)
    asyncio.run(tokenizer.check(request))
    choice = Choice(tokenizer, request, [1], 0, 1000)
    for token_id in tokenizer.backend.encode(text).ids:
        yield choice.push(EngineChunk([token_id])) or ProcessorChunk()
    yield choice.push(EngineChunk([2], "stop")) or ProcessorChunk()


@pytest.mark.parametrize("form", FORMS)
def test_a_call_is_read_streamed_and_not(form: str) -> None:
    tokenizer = tokenizer_for(form)
    for fields in ({}, {"stream": True}):
        whole = ProcessorChunk()
        for chunk in chunks_of(tokenizer, FORMS[form], **fields):
            whole.add(chunk)
        names = [delta.name for delta in whole.tool_calls if delta.name]
        arguments = [""] * len(names)
        for delta in whole.tool_calls:
            arguments[delta.index] += delta.arguments
        assert names == ["weather"] * len(names) != []
        assert [json.loads(text) for text in arguments] == [{"city": "Rome"}] * FORMS[form].count("Rome")
        assert (whole.content, whole.finish_reason) == ("", "tool_calls")


def read(reader: SGLangToolCallReader, pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Content, names and arguments."""
    whole = read_whole(reader, pieces)
    calls: list[tuple[str, str]] = []
    for delta in whole.tool_calls:
        if delta.name:
            calls.append((delta.name, ""))
        name, so_far = calls[delta.index]
        calls[delta.index] = (name, so_far + delta.arguments)
    return whole.content, calls


@pytest.mark.parametrize("form", MANY)
@given(
    calls=st.lists(st.tuples(st.sampled_from(["weather", "now"]), arguments), min_size=1, max_size=3),
    size=st.integers(1, 200),
    is_escaped=st.booleans(),
)
@few_examples
def test_any_cut_between_tokens_gives_the_same_calls_and_nothing_of_them_as_content(
    form: str, calls: list[tuple[str, dict[str, Any]]], size: int, is_escaped: bool
) -> None:
    beginning, call, between, end = MANY[form]
    written = [call.format(name, json.dumps(given, ensure_ascii=is_escaped)) for name, given in calls]
    tokens = re.findall(r"<\|.*?\|>|\[TOOL_CALLS\]|.", f"{beginning}{between.join(written)}{end}", re.DOTALL)
    pieces = ["".join(tokens[start : start + size]) for start in range(0, len(tokens), size)]
    content, read_calls = read(SGLangToolCallReader(form, TOOLS, is_streamed=True), pieces)
    assert content == ""
    assert [(name, json.loads(text)) for name, text in read_calls] == calls


@pytest.mark.parametrize("is_streamed", [True, False])
def test_half_a_surrogate_pair_in_arguments_stays_an_escape(is_streamed: bool) -> None:
    text = r'<|python_tag|>{"name": "weather", "parameters": {"city": "\ud83d ' + r'\ud83d\ude00"}}'
    _, [(_, read_arguments)] = read(SGLangToolCallReader("llama3", TOOLS, is_streamed=is_streamed), list(text))
    assert read_arguments.encode()
    assert json.loads(read_arguments) == {"city": "\ud83d 😀"}


def test_a_parser_is_asked_less_often_the_longer_a_call_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = SGLangToolCallReader("llama3", TOOLS, is_streamed=True)
    lengths: list[int] = []
    parse = reader._parser.parse_stream_chunk
    monkeypatch.setattr(reader._parser, "parse_stream_chunk", lambda text: lengths.append(len(text)) or parse(text))
    city = "x" * 9000
    _, calls = read(reader, list(f'<|python_tag|>{{"name": "weather", "parameters": {{"city": "{city}"}}}}'))
    assert calls == [("weather", json.dumps({"city": city}))]
    assert len(lengths) < 300
    assert max(lengths) < 300


def test_special_tokens_stay_out_of_a_text_that_calls_nothing() -> None:
    whole = ProcessorChunk()
    for chunk in chunks_of(tokenizer_for("llama3"), "Hello, Rome!<|im_end|>", stream=True):
        whole.add(chunk)
    assert (whole.content, whole.tool_calls, whole.finish_reason) == ("Hello, Rome!", [], "stop")


def test_a_parser_that_there_is_not_is_told_at_the_start() -> None:
    assert parse_processor_args(["--model", "m", "--tool-call-parser", "nonsense"]).parsing == Parsing(
        tool_calls="nonsense"
    )
    with pytest.raises(ValueError, match=r"no tool call parser nonsense: SGLang has .*llama3"):
        check_parser("nonsense")
    with pytest.raises(ValueError, match="no tool call parser nonsense"):
        ChatTokenizer.load(str(ROOT / MODEL), Parsing(tool_calls="nonsense"))
