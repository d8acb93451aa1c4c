"""Random draws that depend on a seed and a position, and on nothing else: not on the device, the batch or the past."""

import torch


def sample_with_seeds(
    probs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, is_kept: torch.Tensor | None
) -> torch.Tensor:
    """Draw one token a row: shapes (rows, vocabulary), (rows,), (rows,) and (rows, vocabulary) give (rows,).

    The noise belongs to a token id, not to its rank, so that two nearly equal tokens changing
    places changes nothing.
    """
    scores = probs.to(torch.float64).log() + gumbel_noise(seeds, positions, probs.shape[-1])
    if is_kept is not None:
        scores = scores.masked_fill(~is_kept, -torch.inf)
    return scores.argmax(dim=-1)


def kept_tokens(probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor) -> torch.Tensor:
    """Mark (rows, vocabulary) what top-k, top-p and min-p keep, as SGLang's own PyTorch sampler does."""
    sorted_probs, sorted_ids = probs.sort(dim=-1, descending=True)
    preceding_mass = sorted_probs.cumsum(dim=-1) - sorted_probs
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    is_kept = (
        (ranks < top_ks[:, None])
        & (preceding_mass <= top_ps[:, None])
        & (sorted_probs >= sorted_probs[:, :1] * min_ps[:, None])
    )
    return torch.empty_like(is_kept).scatter(1, sorted_ids, is_kept)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Make (rows, vocab_size) float64 noise from seeds and positions alone, by splitmix64.

    A counter-based generator, because `torch.Generator` takes one seed a call and differs
    between devices. Adding Gumbel noise to log-probabilities and taking the largest is a
    draw from the distribution.
    """
    token_ids = torch.arange(vocab_size, device=seeds.device)
    streams = _mix(_mix(seeds) + positions.to(torch.int64))
    bits = _mix(streams[:, None] + token_ids * to_int64(0x9E3779B97F4A7C15))
    uniform = (_shift_right(bits, 12).to(torch.float64) + 0.5) * 2.0**-52  # in (0, 1), never either
    return -(-uniform.log()).log()


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * to_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * to_int64(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, num_bits: int) -> torch.Tensor:
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def to_int64(value: int) -> int:
    """Fold an integer of any size into the int64 with the same low 64 bits."""
    return ((value + 2**63) % 2**64) - 2**63
