"""From what a client asks for to what the engine is told, and from there to SGLang's own names."""

from typing import Any

from common.openai.request import ChatCompletionRequest
from common.wire import EngineRequest, OutputOptions, SamplingOptions, StopConditions

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
