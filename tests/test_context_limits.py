"""What fits into a context, whatever the engines say of it."""

import pytest

from common.errors import ContextLengthExceeded
from common.sampling import ContextLimits
from common.wire import EngineDescription


def engine(context_length: int, max_input_tokens: int | None = None) -> EngineDescription:
    return EngineDescription("m", context_length, vocab_size=10, max_input_tokens=max_input_tokens)


@pytest.mark.parametrize(
    ("engines", "limits"),
    [
        ([engine(100)], (100, 99)),
        ([engine(100), engine(8192, 505)], (100, 99)),
        ([engine(8192), engine(8192, 505)], (8192, 505)),
        ([engine(8192, 8185), engine(1000, 993)], (1000, 993)),
        ([engine(100, 100)], (100, 99)),
    ],
)
def test_what_fits_is_what_fits_into_each_engine(engines: list[EngineDescription], limits: tuple[int, int]) -> None:
    assert ContextLimits.of(engines) == limits


def test_a_prompt_above_what_the_engines_take_is_refused_with_both_numbers() -> None:
    limits = ContextLimits(8192, 505)
    limits.check_prompt(505)
    with pytest.raises(ContextLengthExceeded, match=r"at most 505 of them in the messages\. Your messages have 506 "):
        limits.check_prompt(506)


@pytest.mark.parametrize("limits", [ContextLimits(8192, 8185), ContextLimits(8192, 505), ContextLimits(100, 99)])
@pytest.mark.parametrize("is_asked", [False, True])
def test_every_answer_has_room_and_can_go_on_elsewhere_up_to_its_last_token(
    limits: ContextLimits, is_asked: bool
) -> None:
    for num_prompt_tokens in (1, limits.max_input_tokens - 1, limits.max_input_tokens):
        room = limits.context_length - num_prompt_tokens
        budget = limits.answer_budget(num_prompt_tokens, room if is_asked else None)
        assert budget >= 1
        limits.check_prompt(num_prompt_tokens + budget - 1)
        assert limits.answer_budget(num_prompt_tokens, 1) == 1


def test_an_answer_above_the_context_is_refused_with_both_numbers() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"is 100 tokens.* asked for 101 tokens: 60 .* and 41 ") as caught:
        ContextLimits(100, 99).answer_budget(60, 41)
    assert caught.value.param == "max_tokens"
