"""Exercise 4: `do_sample`, from a client's JSON to SGLang's parameters."""

import pytest

from common.errors import InvalidRequest
from common.openai.request import parse_chat_request
from common.sampling import engine_request, sglang_sampling_params
from common.wire import EngineRequest, to_wire

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
DEFAULTS: dict[str, float | int] = {"temperature": 0.2, "top_p": 0.9}


def over_the_wire(**fields: object) -> tuple[dict[str, object], EngineRequest]:
    """The dict that the processor sends for such a request, and what the engine reads."""
    try:
        chat = parse_chat_request(CHAT | fields)
    except InvalidRequest as error:
        pytest.fail(f"the frontend refuses {fields}: {error.message}", pytrace=False)
    wire = to_wire(engine_request(chat, [1, 2, 3], 0, 5, DEFAULTS))
    return wire, EngineRequest.read(wire)


def test_false_crosses_the_wire_and_makes_sglang_greedy() -> None:
    wire, request = over_the_wire(do_sample=False)
    sent = wire["sampling_options"]
    assert sent == {"temperature": 0.2, "top_p": 0.9, "do_sample": False}, f"the processor sends {sent}"
    params = sglang_sampling_params(request)
    assert params.get("top_k") == 1, f"SGLang would still sample: {params}"
    assert "do_sample" not in params, "SGLang does not know the name"


def test_false_goes_before_a_top_k() -> None:
    assert sglang_sampling_params(over_the_wire(do_sample=False, top_k=50)[1]).get("top_k") == 1


def test_true_changes_nothing_for_sglang() -> None:
    assert sglang_sampling_params(over_the_wire(do_sample=True, top_k=50)[1]).get("top_k") == 50
    assert "do_sample" not in sglang_sampling_params(over_the_wire(do_sample=True)[1])


def test_what_is_left_out_is_not_sent() -> None:
    for wire in (over_the_wire()[0], over_the_wire(do_sample=None)[0]):
        assert wire["sampling_options"] == {"temperature": 0.2, "top_p": 0.9}


def test_an_engine_that_does_not_know_it_still_reads_the_request() -> None:
    assert EngineRequest.read({"token_ids": [1], "sampling_options": {"another_field": 1}}).token_ids == [1]


@pytest.mark.parametrize("value", ["no", 0, [], 1.0])
def test_what_is_no_boolean_is_refused_by_name(value: object) -> None:
    over_the_wire(do_sample=True)
    with pytest.raises(InvalidRequest, match="Invalid value") as caught:
        parse_chat_request(CHAT | {"do_sample": value})
    assert caught.value.param == "do_sample"
