"""What an engine is asked for: how many tokens, and how to choose them; in our words, and in SGLang's."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from common.errors import ContextLengthExceeded
from common.openai.request import ChatCompletionRequest
from common.wire import EngineDescription, EngineRequest, OutputOptions, SamplingOptions, StopConditions

# SGLang's fixed default of 128 new tokens would cut answers short, so `max_tokens` is always given.
_SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p",
    "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip


def engine_request(
    chat: ChatCompletionRequest, token_ids: list[int], index: int, max_tokens: int, defaults: dict[str, float | int]
) -> EngineRequest:
    """The request for choice `index`. `defaults`: the model's own sampling values, for what the client left open.

    With a seed, each choice gets its own: the same one would give the same text `n` times.
    """
    chosen = {name: value for name in _SAMPLING_FIELDS if (value := getattr(chat, name)) is not None}
    sampling: dict[str, Any] = defaults | chosen
    seed = None if chat.seed is None else chat.seed + index
    return EngineRequest(
        token_ids=token_ids,
        sampling_options=SamplingOptions(
            **sampling, seed=seed, logit_bias=chat.logit_bias or None, json_schema=chat.answer_schema
        ),
        stop_conditions=StopConditions(
            max_tokens=max_tokens,
            min_tokens=min(chat.min_tokens, max_tokens),  # a full context ends it before
            stop_token_ids=chat.stop_token_ids,
            ignore_eos=chat.is_eos_ignored,
        ),
        # A stop string has to be seen when it appears, so the engine may not keep the answer to itself.
        output_options=OutputOptions(stream=chat.stream or bool(chat.stop_strings), logprobs=chat.num_top_logprobs),
    )


def sglang_sampling_params(request: EngineRequest) -> dict[str, Any]:
    """`sampling_params` of `sglang.Engine.async_generate`, without what was left at SGLang's default."""
    options, stop = request.sampling_options, request.stop_conditions
    params = {name: getattr(options, name) for name in _SAMPLING_FIELDS}
    if params["top_k"] == 0:
        params["top_k"] = -1  # vLLM's "all tokens"; SGLang takes only -1
    params |= {
        "max_new_tokens": stop.max_tokens,
        "min_new_tokens": stop.min_tokens or None,
        "stop_token_ids": stop.stop_token_ids or None,
        "ignore_eos": stop.ignore_eos or None,
        "logit_bias": options.logit_bias,
        "sampling_seed": options.seed,
        "json_schema": options.json_schema,
        "custom_params": {"num_json_tokens": options.num_json_tokens} if options.num_json_tokens else None,
    }
    return {name: value for name, value in params.items() if value is not None}


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
