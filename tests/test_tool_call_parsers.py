"""Other forms of tool calls, read by SGLang's parsers: from an engine's tokens to the processor's chunks."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from common.arguments import Parsing, parse_processor_args
from common.openai.request import parse_chat_request
from common.sglang.tool_call_parsers import check_parser
from common.text.chat_tokenizer import ChatTokenizer
from common.text.choice import Choice
from common.wire import EngineChunk, EngineDescription, ProcessorChunk
from tests.processes import MODEL, ROOT
from tests.test_chat_template import OTHER_FORM, WEATHER

ROME = '{"city": "Rome"}'
NOW = {"type": "function", "function": {"name": "now"}}
FORMS = {
    "llama3": f'<|python_tag|>{{"name": "weather", "parameters": {ROME}}}; {{"name": "weather", "parameters": {ROME}}}',
    "mistral": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ROME}}}]',
    "pythonic": '[weather(city="Rome")]',
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>",
    "hermes": f'<tool_call>{{"name": "weather", "arguments": {ROME}}}</tool_call>',
}


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
