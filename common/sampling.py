"""From what a client asks for to what the engine is told, and from there to SGLang's own names."""

from typing import Any

from common.errors import InvalidRequest
from common.openai.request import ChatCompletionRequest
from common.wire import (
    AnswerProtocol,
    EngineChunk,
    EngineRequest,
    OutputOptions,
    SamplingOptions,
    StopConditions,
    read_engine_chunk,
)

# SGLang's fixed default of 128 new tokens would cut answers short, so `max_tokens` is always given.
_SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
)  # fmt: skip


def engine_request(
    chat: ChatCompletionRequest,
    token_ids: list[int],
    index: int,
    max_tokens: int,
    defaults: dict[str, float | int],
) -> EngineRequest:
    """The request for choice `index`. `defaults`: the model's own sampling values, for what the client left open.

    With a seed, each choice gets its own: the same one would give the same text `n` times.
    """
    chosen = {name: getattr(chat, name) for name in _SAMPLING_FIELDS}
    sampling: dict[str, Any] = {name: defaults.get(name) if value is None else value for name, value in chosen.items()}
    seed = None if chat.seed is None else chat.seed + index
    return EngineRequest(
        token_ids=token_ids,
        sampling_options=SamplingOptions(**sampling, seed=seed, logit_bias=chat.logit_bias or None),
        stop_conditions=StopConditions(max_tokens=max_tokens, ignore_eos=chat.ignore_eos),
        # A stop string has to be seen when it appears, so the engine may not keep the answer to itself.
        output_options=OutputOptions(stream=chat.stream or bool(chat.stop_strings), logprobs=chat.num_top_logprobs),
    )


def check_logit_bias(chat: ChatCompletionRequest, vocab_size: int) -> None:
    """Raises:
    InvalidRequest: a token id that the model does not have.
    """
    for token_id in chat.logit_bias or {}:
        if int(token_id) >= vocab_size:
            raise InvalidRequest(
                f"Invalid value for logit_bias: the model has {vocab_size} tokens, and {token_id} is none of them.",
                param="logit_bias",
            )


def sglang_sampling_params(request: EngineRequest) -> dict[str, Any]:
    """`sampling_params` of `sglang.Engine.async_generate`, without what was left at SGLang's default."""
    options, stop = request.sampling_options, request.stop_conditions
    params = {name: getattr(options, name) for name in _SAMPLING_FIELDS}
    if params["top_k"] == 0:
        params["top_k"] = -1  # vLLM's "all tokens"; SGLang takes only -1
    params |= {
        "max_new_tokens": stop.max_tokens,
        "ignore_eos": stop.ignore_eos or None,
        "logit_bias": options.logit_bias,
        "sampling_seed": options.seed,
    }
    return {name: value for name, value in params.items() if value is not None}


def remaining_request(request: dict[str, Any], delivered: list[EngineChunk]) -> dict[str, Any] | EngineChunk:
    """The engine request for what is left after an engine broke: its tokens become part of the prompt.

    SGLang derives a token's randomness from the seed and its position, so a seeded answer goes on as it would
    have. Penalties start anew. Where nothing is left to generate, it is the chunk that ends the answer.
    """
    token_ids = [token_id for chunk in delivered for token_id in chunk.token_ids]
    stop = request.get("stop_conditions", {})
    if (max_tokens := stop.get("max_tokens")) is not None:
        stop = {**stop, "max_tokens": max_tokens - len(token_ids)}
        if stop["max_tokens"] < 1:
            return EngineChunk(finish_reason="length")
    return {**request, "token_ids": [*request["token_ids"], *token_ids], "stop_conditions": stop}


ENGINE_ANSWERS = AnswerProtocol(read_engine_chunk, resume=remaining_request)
