"""`min_new_tokens` without a tokenizer.

SGLang bans the tokens that end a sequence until there are enough others, but asks the tokenizer which they are. The
model's configuration tells as well. common/sglang/plugins.py calls `register` in the engine's processes.
"""

from collections.abc import Callable
from typing import Any

import torch


def register() -> None:
    """Let SGLang's checks take `min_new_tokens`, and its penalizer know the model's end tokens."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    sampling = "sglang.srt.sampling"
    HookRegistry.register(f"{sampling}.sampling_params.raise_if_tokenizer_required", check, HookType.AROUND)
    penalizer = f"{sampling}.penaltylib.min_new_tokens.BatchedMinNewTokensPenalizer"
    HookRegistry.register(f"{penalizer}._prepare", prepare, HookType.REPLACE)


def check(original: Callable[..., None], tokenizer: Any, stop: Any, stop_regex: Any, _min_new_tokens: int = 0) -> None:
    original(tokenizer, stop, stop_regex)


def prepare(penalizer: Any) -> None:
    """Set what the penalizer keeps per request, shapes (requests, 1), (requests, vocabulary) and (requests, 1).

    A request that SGLang has put back into its queue counts the tokens that it has already.
    """
    orchestrator = penalizer.orchestrator
    requests, device = orchestrator.reqs(), orchestrator.device
    penalizer.min_new_tokens = _column([request.sampling_params.min_new_tokens for request in requests], device)
    penalizer.len_output_tokens = _column([len(request.output_ids) for request in requests], device)
    penalties = torch.zeros((len(requests), orchestrator.vocab_size), device=device)
    for row, request in enumerate(requests):
        # At the end of a grammar nothing but the end may come.
        if request.sampling_params.min_new_tokens and request.grammar is None:
            penalties[row, [each for each in _end_ids(request) if each < orchestrator.vocab_size]] = -torch.inf
    penalizer.stop_token_penalties = penalties


def _end_ids(request: Any) -> list[int]:
    return [*(request.eos_token_ids or ()), *(request.sampling_params.stop_token_ids or ())]


def _column(counts: list[int], device: Any) -> torch.Tensor:
    return torch.tensor(counts, dtype=torch.int32, device=device).unsqueeze(1)
