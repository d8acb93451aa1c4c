"""Exercise 2: an error of the reader's own, raised in the processor, read by a client."""

import httpx
import pytest

from common import errors
from common.errors import InvalidRequest, from_wire
from tests.processes import MODEL, Pipeline


def ask(pipeline: Pipeline, num_messages: int, **fields: object) -> httpx.Response:
    messages = [{"role": "user", "content": "Hi"}] * num_messages
    body = {"model": MODEL, "messages": messages, "max_tokens": 1, **fields}
    return httpx.post(f"{pipeline.url}/v1/chat/completions", json=body, timeout=60)


def test_the_class_is_in_the_tree_and_survives_the_wire() -> None:
    assert hasattr(errors, "TooManyMessages"), "common/errors.py has no TooManyMessages yet"
    error = errors.TooManyMessages("Too many.", param="messages")
    assert isinstance(error, InvalidRequest)
    assert "TooManyMessages" in (errors.__doc__ or ""), "the tree at the top of common/errors.py does not show it"
    arrived = from_wire(error.to_wire()["error"])
    assert type(arrived) is errors.TooManyMessages, "it arrives as another error: what does from_wire know?"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_101st_message_is_refused_by_name(repeating: Pipeline, is_streamed: bool) -> None:
    answer = ask(repeating, 101, stream=is_streamed)
    assert answer.status_code == 400, f"101 messages were answered with {answer.status_code}"
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("too_many_messages", "messages")
    assert "101" in error["message"], "the message does not say how many there were"


def test_a_hundred_messages_are_answered(repeating: Pipeline) -> None:
    assert ask(repeating, 100).status_code == 200


def test_the_processor_says_so_and_not_the_frontend(repeating: Pipeline) -> None:
    ask(repeating, 102)
    (processor,) = [process for process in repeating.processes if process.name == "processor.py"]
    assert "too_many_messages" in processor.log, "the processor's log has no request that ended with it"
