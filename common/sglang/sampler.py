"""What a request may ask of SGLang's sampler: a seed of its own on any device, and a least number of tokens.

SGLang reads `sampling_seed` in deterministic mode only: a mode that slows a GPU down, that a CPU cannot run, and in
which a request without a seed gets 42. Here the seed of every request that has one counts, and the sampling of all
others is left alone. A seed fixes the random numbers, not the model's arithmetic: where a batch of another shape
changes a probability in its last bits, the same seed can in rare cases pick another token.

For `min_new_tokens` SGLang bans the tokens that end a sequence, but asks the tokenizer which they are. The model's
configuration tells as well. common/sglang/plugins.py calls `register` in the engine's processes.
"""

from collections.abc import Callable
from typing import Any

import torch

SAMPLING_BACKENDS = ("flashinfer", "pytorch")


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    SamplingBatchInfo.request_seeds = []  # where it is made of something else than requests
    sampling, after, around, replace = "sglang.srt.sampling", HookType.AFTER, HookType.AROUND, HookType.REPLACE
    batch_info = f"{sampling}.sampling_batch_info.SamplingBatchInfo"
    HookRegistry.register(f"{batch_info}.adjusted_from_schedule_batch", take_seeds, replace)
    HookRegistry.register(f"{batch_info}.adjusted_merge_batch", merge_seeds, replace)
    HookRegistry.register(f"{batch_info}.adjusted_filter_batch", filter_seeds, replace)
    HookRegistry.register(f"{batch_info}.copy_for_forward", copy_seeds, after)
    HookRegistry.register("sglang.srt.layers.sampler.Sampler._sample_from_probs", sample, around)
    HookRegistry.register(f"{sampling}.sampling_params.raise_if_tokenizer_required", check_stops, around)
    penalizer = f"{sampling}.penaltylib.min_new_tokens.BatchedMinNewTokensPenalizer"
    HookRegistry.register(f"{penalizer}._prepare", prepare_min_tokens, replace)


def supports_seed(server_args: Any) -> bool:
    """Whether an engine with these arguments takes seeds. Speculative and diffusion decoding use no sampler."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    return (
        hasattr(SamplingBatchInfo, "request_seeds")  # the plugin is loaded
        and server_args.sampling_backend in SAMPLING_BACKENDS
        and server_args.speculative_algorithm is None
        and server_args.dllm_algorithm is None
    )


def take_seeds(batch_info: Any, batch: Any, _vocab_size: int) -> None:
    batch_info.request_seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
    batch_info.sampling_seed = None  # deterministic mode would give 42 to those without one


def merge_seeds(batch_info: Any, other: Any) -> None:
    batch_info.request_seeds = batch_info.request_seeds + other.request_seeds


def filter_seeds(batch_info: Any, keep_indices: list[int], _keep_indices_device: torch.Tensor) -> None:
    batch_info.request_seeds = [batch_info.request_seeds[index] for index in keep_indices]


def copy_seeds(copied: Any, batch_info: Any) -> None:
    copied.request_seeds = batch_info.request_seeds


def sample(
    original: Callable[..., torch.Tensor], sampler: Any, probs: torch.Tensor, batch_info: Any, positions: torch.Tensor,
    simple_sampling_case: bool,
) -> torch.Tensor:  # fmt: skip
    """Stands around `_sample_from_probs`: rows with a seed are drawn from their own numbers."""
    seeds = {row: to_int64(seed) for row, seed in enumerate(batch_info.request_seeds) if seed is not None}
    if len(seeds) < len(probs):
        token_ids = original(sampler, probs, batch_info, positions, simple_sampling_case)
    else:
        token_ids = torch.empty(len(probs), dtype=torch.int32, device=probs.device)
    if seeds:
        rows = torch.tensor(list(seeds), device=probs.device)
        is_kept = None
        if not simple_sampling_case:
            filters = batch_info.top_ks[rows], batch_info.top_ps[rows], batch_info.min_ps[rows]
            is_kept = kept_tokens(probs[rows], *filters)
        of_rows = torch.tensor(list(seeds.values()), device=probs.device)
        token_ids[rows] = sample_with_seeds(probs[rows], of_rows, positions[rows], is_kept).to(token_ids.dtype)
    return token_ids


def sample_with_seeds(
    probs: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, is_kept: torch.Tensor | None
) -> torch.Tensor:
    """Draw one token a row: shapes (rows, vocabulary), (rows,), (rows,) and (rows, vocabulary) give (rows,).

    A draw depends on a seed and a position, and on nothing else: not on the device, the batch or the past. The noise
    belongs to a token id, not to its rank, so that two nearly equal tokens changing places changes nothing.
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


def check_stops(
    original: Callable[..., None], tokenizer: Any, stop: Any, stop_regex: Any, _min_new_tokens: int = 0
) -> None:
    """Stands around `raise_if_tokenizer_required`."""
    original(tokenizer, stop, stop_regex)


def prepare_min_tokens(penalizer: Any) -> None:
    """Set what the penalizer keeps per request, shapes (requests, 1), (requests, vocabulary) and (requests, 1).

    A request that SGLang has put back into its queue counts the tokens that it has already.
    """
    orchestrator = penalizer.orchestrator
    requests, device, vocab_size = orchestrator.reqs(), orchestrator.device, orchestrator.vocab_size

    def column(counts: list[int]) -> torch.Tensor:
        return torch.tensor(counts, dtype=torch.int32, device=device).unsqueeze(1)

    penalizer.min_new_tokens = column([request.sampling_params.min_new_tokens for request in requests])
    penalizer.len_output_tokens = column([len(request.output_ids) for request in requests])
    penalties = torch.zeros((len(requests), vocab_size), device=device)
    for row, request in enumerate(requests):
        # At the end of a grammar nothing but the end may come.
        if request.sampling_params.min_new_tokens and request.grammar is None:
            end_ids = {*(request.eos_token_ids or ()), *(request.sampling_params.stop_token_ids or ())}
            penalties[row, [each for each in end_ids if each < vocab_size]] = -torch.inf
    penalizer.stop_token_penalties = penalties
