"""OpenAI's answers, made of a processor's chunks."""

import json

import pytest

from common.errors import BadUpstream
from common.http.chat import Answer, AnswerStream
from common.openai.request import ChatCompletionRequest, parse_chat_request
from common.wire import ProcessorChunk
from tests.contexts import request_context


def two_choices() -> ChatCompletionRequest:
    return parse_chat_request({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "n": 2})


def chunks(*indices: int) -> list[ProcessorChunk]:
    return [ProcessorChunk(index=index, content="a", finish_reason="length") for index in indices]


def test_each_choice_has_the_reason_for_its_end() -> None:
    answer = Answer(two_choices(), request_context("frontend").record)
    for chunk in chunks(1, 0):
        answer.add(chunk)
    assert answer.to_json().count(b'"finish_reason":"length"') == 2


def test_a_choice_without_an_end_is_an_error_and_never_a_stop() -> None:
    record = request_context("frontend").record
    answer, stream = Answer(two_choices(), record), AnswerStream(two_choices(), record)
    for chunk in chunks(0, 0):  # as many ends as choices, and one of them has none
        answer.add(chunk)
        stream.events(chunk)
    for end in (answer.to_json, stream.end):
        with pytest.raises(BadUpstream, match="left a choice unfinished"):
            end()
    assert record.outcome == "cancelled"


def test_an_answer_that_begins_anew_has_to_be_finished_anew() -> None:
    answer = Answer(two_choices(), request_context("frontend").record)
    for chunk in chunks(0, 1):
        answer.add(chunk)
    answer.restart()
    with pytest.raises(BadUpstream):
        answer.to_json()


def test_the_choices_of_a_stream_begin_in_their_order() -> None:
    request = parse_chat_request({"model": "m", "messages": [{"role": "user", "content": "Hi"}], "n": 3})
    stream = AnswerStream(request, request_context("frontend").record)
    events = [json.loads(line[6:]) for chunk in chunks(2, 0, 1) for line in stream.events(chunk).split(b"\n\n") if line]
    indices = [event["choices"][0]["index"] for event in events if "role" in event["choices"][0]["delta"]]
    assert indices == [0, 1, 2]
    assert [event["choices"][0]["index"] for event in events].count(2) == 3
