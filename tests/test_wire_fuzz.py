"""Whatever comes over the wire is read into something valid or is one of our errors: nothing else ever escapes."""

from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidRequest, PipelineError, from_wire
from common.openai.request import ChatCompletionRequest, parse_chat_request
from common.sampling import sglang_sampling_params
from common.wire import (
    EngineChunk,
    EngineRequest,
    ProcessorChunk,
    to_wire,
)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
WORDS = st.sampled_from(
    [
        "token_ids", "finish_reason", "log_probs", "top_logprobs", "error", "message", "type", "param", "code",
        "index", "content", "logprobs", "usage", "prompt_tokens", "completion_tokens", "total_tokens", "stop", "length",
        "sampling_options", "stop_conditions", "output_options", "temperature", "seed", "logit_bias", "max_tokens",
        "stream", "model", "messages", "role", "user", "assistant", "tool", "text", "n", "tool_calls", "aborted",
        "stream_options", "include_usage", "request_id", "ignore_eos", "min_tokens", "stop_token_ids", "metadata",
        "top_p", "invalid_request_error",
    ]
)  # fmt: skip
KEYS = WORDS | st.text(max_size=5)
ANYTHING = st.recursive(
    SCALARS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=8,
)
# Mostly right, so that the checks behind the first ones are reached, too.
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "token_ids": st.lists(st.integers(-1, 2**31) | SCALARS, max_size=4) | ANYTHING,
        "finish_reason": st.sampled_from(["stop", "length", "abort", None]) | ANYTHING,
        "log_probs": st.lists(st.floats(), max_size=4) | ANYTHING,
        "top_logprobs": st.lists(st.lists(st.tuples(st.integers(), st.floats())), max_size=4) | ANYTHING,
        "error": st.fixed_dictionaries({"message": st.text() | ANYTHING, "code": WORDS | ANYTHING, "type": ANYTHING}),
        "index": st.integers(-1, 3) | ANYTHING,
        "content": st.text() | ANYTHING,
        "usage": ANYTHING,
        "logprobs": st.lists(ANYTHING, max_size=3),
        "sampling_options": ANYTHING,
        "stop_conditions": ANYTHING,
        "output_options": ANYTHING,
        "request_id": ANYTHING,
    },
)
CHATS = st.fixed_dictionaries(
    {
        "model": st.text(max_size=3) | ANYTHING,
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": ANYTHING})
            | ANYTHING,
            max_size=3,
        ),
    },
    optional=dict.fromkeys(
        (
            "temperature", "top_p", "max_tokens", "stop", "n", "seed", "logit_bias", "logprobs", "top_logprobs",
            "stream", "stream_options", "tools", "metadata", "user", "response_format", "top_k", "min_p",
            "min_tokens", "stop_token_ids", "nvext", "chat_template_kwargs",
        ),
        ANYTHING,
    ),
)  # fmt: skip


def check_error(error: PipelineError) -> None:
    """It can be sent on."""
    assert error.status in (400, 404, 413, 429, 500, 502, 503, 504)
    fields = error.to_wire()["error"]
    assert set(fields) == {"message", "type", "param", "code"}
    assert fields["message"]
    assert all(value is None or isinstance(value, str) for value in fields.values())


@pytest.mark.parametrize(("read", "kind"), [(EngineChunk.read, EngineChunk), (ProcessorChunk.read, ProcessorChunk)])
@settings(max_examples=300, deadline=None)
@given(data=ANYTHING | NEARLY)
def test_a_chunk_is_valid_or_an_error_of_ours(read: Callable[[Any], Any], kind: type, data: Any) -> None:
    try:
        chunk = read(data)
    except PipelineError as error:
        check_error(error)
        return
    assert isinstance(chunk, kind)
    orjson.dumps(to_wire(chunk))
    assert read(to_wire(chunk)) == chunk or "nan" in repr(chunk)
    if isinstance(chunk, EngineChunk):
        assert all(0 <= token_id < 2**31 for token_id in chunk.token_ids)
        assert len(chunk.log_probs or chunk.token_ids) == len(chunk.token_ids)
    assert chunk.finish_reason in (None, "stop", "length")


@settings(max_examples=300, deadline=None)
@given(data=ANYTHING | NEARLY)
def test_an_engine_request_is_valid_or_a_400(data: Any) -> None:
    try:
        request = EngineRequest.read(data)
    except InvalidRequest:
        return
    assert isinstance(request, EngineRequest)
    assert request.token_ids
    assert isinstance(sglang_sampling_params(request), dict)


@settings(max_examples=300, deadline=None)
@given(body=ANYTHING | CHATS)
def test_a_chat_request_is_valid_or_a_400(body: Any) -> None:
    try:
        chat = parse_chat_request(body)
    except InvalidRequest as error:
        check_error(error)
        return
    assert isinstance(chat, ChatCompletionRequest)
    assert chat.n >= 1


@settings(max_examples=300, deadline=None)
@given(data=ANYTHING | NEARLY)
def test_an_error_from_the_wire_is_one_of_ours(data: Any) -> None:
    assert isinstance(from_wire(data), PipelineError)
