"""From a chat request to what an engine is asked for, and to what another one is asked for after it broke."""

from typing import Any

import msgspec

from common.openai.request import parse_chat_request
from common.sampling import engine_request, sglang_sampling_params
from common.wire import EngineChunk, EngineRequest, StopConditions, to_wire


def asked(max_tokens: int = 8, **fields: Any) -> EngineRequest:
    chat = parse_chat_request({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields})
    return engine_request(chat, [1], 0, max_tokens, {})


def test_sglang_is_told_when_to_end_under_its_own_names() -> None:
    params = sglang_sampling_params(asked(min_tokens=4, stop_token_ids=[5, 6], nvext={"ignore_eos": True}))
    assert params == {"max_new_tokens": 8, "min_new_tokens": 4, "stop_token_ids": [5, 6], "ignore_eos": True}
    assert sglang_sampling_params(asked()) == {"max_new_tokens": 8}


def test_no_more_tokens_are_demanded_than_the_context_has_room_for() -> None:
    assert asked(max_tokens=3, min_tokens=4).stop_conditions == StopConditions(max_tokens=3, min_tokens=3)


def test_what_is_left_after_an_engine_broke_counts_what_it_delivered() -> None:
    request = to_wire(asked(min_tokens=4, stop_token_ids=[5]))
    for num_delivered, min_tokens in ((1, 3), (4, 0), (6, 0)):
        rest = EngineChunk.rest_of(request, [EngineChunk(token_ids=[9] * num_delivered)])
        assert isinstance(rest, dict)
        left = msgspec.convert(rest, EngineRequest)
        assert left.token_ids == [1] + [9] * num_delivered
        assert left.stop_conditions == StopConditions(8 - num_delivered, min_tokens, [5])
