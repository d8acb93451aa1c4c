from types import SimpleNamespace
from typing import Any

import torch

from common.sglang.sampler import gumbel_noise, kept_tokens, prepare_min_tokens, sample_with_seeds, to_int64

# seeds 0 and -1 at positions 0 and 5, tokens 0 to 2, reckoned with Python's integers
SPLITMIX64 = [[-3.60377899297, 2.086843676967, 0.173850076345], [-0.226443221099, 0.05130770453, -0.86416391423]]
VOCAB_SIZE = 8
PROBS = torch.tensor([[0.5, 0.3, 0.15, 0.05]])


def draws(probs: torch.Tensor, num_draws: int, is_kept: torch.Tensor | None = None, seed: int = 1) -> torch.Tensor:
    """One draw a position, for one seed."""
    kept = None if is_kept is None else is_kept.expand(num_draws, -1)
    seeds = torch.full((num_draws,), seed)
    return sample_with_seeds(probs.expand(num_draws, -1), seeds, torch.arange(num_draws), kept)


def kept(top_k: int = 4, top_p: float = 1.0, min_p: float = 0.0) -> list[bool]:
    mask = kept_tokens(PROBS, torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    found: list[bool] = mask[0].tolist()
    return found


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    alone = draws(PROBS, 64)
    probs = torch.rand(64, 4).softmax(dim=-1)
    probs[10] = PROBS
    among_others = sample_with_seeds(probs, torch.full((64,), 1), torch.arange(64), None)
    assert among_others[10] == alone[10]
    assert torch.equal(draws(PROBS, 64), alone)
    assert not torch.equal(draws(PROBS, 64, seed=2), alone)


def test_draws_follow_the_distribution() -> None:
    shares = draws(PROBS, 100_000).bincount(minlength=4) / 100_000
    torch.testing.assert_close(shares, PROBS[0], atol=0.005, rtol=0)


def test_neighbouring_seeds_are_independent() -> None:
    same = (draws(PROBS, 100_000, seed=1) == draws(PROBS, 100_000, seed=2)).float().mean()
    torch.testing.assert_close(same, (PROBS**2).sum(), atol=0.01, rtol=0)


def test_noise_is_finite_and_the_same_on_every_machine() -> None:
    noise = gumbel_noise(torch.tensor([0, -1]), torch.tensor([0, 5]), 10_000)
    assert torch.isfinite(noise).all()
    expected = torch.tensor(SPLITMIX64, dtype=torch.float64)
    torch.testing.assert_close(noise[:, :3], expected)


def test_filters_keep_what_they_say() -> None:
    assert kept() == [True, True, True, True]
    assert kept(top_k=1) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(min_p=0.2) == [True, True, True, False]
    assert kept(top_k=3, top_p=0.9, min_p=0.5) == [True, True, False, False]


def test_what_is_not_kept_is_not_drawn() -> None:
    is_kept = torch.tensor([[False, True, False, True]])
    assert set(draws(PROBS, 1000, is_kept).tolist()) == {1, 3}


def test_a_zero_probability_is_never_drawn() -> None:
    assert set(draws(torch.tensor([[0.0, 0.5, 0.5, 0.0]]), 1000).tolist()) == {1, 2}


def test_integers_of_any_size_fold_into_an_int64() -> None:
    assert to_int64(7) == 7
    assert to_int64(2**63) == -(2**63)
    assert to_int64(-(2**63) - 1) == 2**63 - 1
    assert to_int64(2**64 + 3) == 3


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
    prepare_min_tokens(penalizer)
    assert penalizer.min_new_tokens.tolist() == [[3], [0], [5], [3]]
    assert penalizer.len_output_tokens.tolist() == [[0], [0], [2], [0]]
    assert torch.isinf(penalizer.stop_token_penalties).nonzero().tolist() == [[0, 2], [0, 4]]
