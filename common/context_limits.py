"""How many tokens fit into a prompt, and into a prompt and its answer."""

from collections.abc import Iterable
from typing import NamedTuple

from common.errors import ContextLengthExceeded
from common.wire import EngineDescription


class ContextLimits(NamedTuple):
    """context_length: tokens that prompt and answer share. max_input_tokens: those of the prompt, always fewer."""

    context_length: int
    max_input_tokens: int

    @classmethod
    def of(cls, engines: Iterable[EngineDescription]) -> "ContextLimits":
        """What each of `engines` takes."""
        limits = [(engine.context_length, engine.max_input_tokens or engine.context_length) for engine in engines]
        context_length = min(length for length, _ in limits)
        return cls(context_length, min(context_length - 1, *(num_tokens for _, num_tokens in limits)))

    def check_prompt(self, num_tokens: int) -> None:
        """Raises:
        ContextLengthExceeded: no engine takes a prompt of so many tokens.
        """
        if num_tokens > self.max_input_tokens:
            raise self.exceeded(f"Your messages have {num_tokens} tokens.")

    def answer_budget(self, num_prompt_tokens: int, num_tokens_asked: int | None) -> int:
        """How many tokens, at least 1, the answer to a checked prompt may have: those asked for, or all that fit.

        When an engine breaks, another one takes what it generated as part of the prompt: so the last tokens that
        would fit into the context are not generated where they would not fit into a prompt.

        Raises:
            ContextLengthExceeded: prompt and answer together do not fit.
        """
        room = self.context_length - num_prompt_tokens
        if num_tokens_asked is not None and num_tokens_asked > room:
            raise self.exceeded(
                f"You asked for {num_prompt_tokens + num_tokens_asked} tokens: {num_prompt_tokens} in the messages "
                f"and {num_tokens_asked} in the answer.",
                param="max_tokens",
            )
        return min(num_tokens_asked or room, self.max_input_tokens + 1 - num_prompt_tokens)

    def exceeded(self, what: str, *, param: str = "messages") -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"This model's maximum context length is {self.context_length} tokens, at most {self.max_input_tokens} of "
            f"them in the messages. {what}",
            param=param,
        )
