"""What SGLang's penalizer is given where there is no tokenizer to ask for the end tokens."""

from types import SimpleNamespace
from typing import Any

import torch

from common.sglang.min_tokens import prepare

VOCAB_SIZE = 8


def request(
    min_tokens: int,
    *,
    eos: set[int] | None,
    stop: set[int] | None = None,
    num_output_tokens: int = 0,
    grammar: object = None,
) -> Any:
    params = SimpleNamespace(min_new_tokens=min_tokens, stop_token_ids=stop)
    ids = [0] * num_output_tokens
    return SimpleNamespace(sampling_params=params, eos_token_ids=eos, output_ids=ids, grammar=grammar)


def test_end_tokens_are_banned_for_those_who_ask_for_it_and_for_nobody_else() -> None:
    requests = [
        request(3, eos={2, VOCAB_SIZE + 5}, stop={4}),  # a configuration may name tokens that the model does not have
        request(0, eos={2}, stop={4}),
        request(5, eos=None, num_output_tokens=2),
        request(3, eos={2}, grammar="at its end nothing else may come"),
    ]
    orchestrator = SimpleNamespace(reqs=lambda: requests, vocab_size=VOCAB_SIZE, device="cpu")
    penalizer = SimpleNamespace(orchestrator=orchestrator)
    prepare(penalizer)
    assert penalizer.min_new_tokens.tolist() == [[3], [0], [5], [3]]
    assert penalizer.len_output_tokens.tolist() == [[0], [0], [2], [0]]
    assert torch.isinf(penalizer.stop_token_penalties).nonzero().tolist() == [[0, 2], [0, 4]]
