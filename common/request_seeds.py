"""A seed of its own for each request, on any device.

SGLang reads `sampling_seed` in deterministic mode only: a mode that slows a GPU down, that a
CPU cannot run, and in which a request without a seed gets 42. This plugin honours the seed
of every request that has one and leaves the sampling of all others alone. SGLang finds
`register` through the entry point group `sglang.srt.plugins`, in every process it spawns.

A seed fixes the random numbers, not the model's arithmetic: where a batch of another shape
changes a probability in its last bits, the same seed can in rare cases pick another token.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.sampler import Sampler, register_sampler_backend
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.sampling import sampling_batch_info
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

SAMPLING_BACKENDS = ("flashinfer", "pytorch")


def register() -> None:
    """Let SGLang's batches carry seeds, its samplers read them, and its checks know them."""
    HookRegistry.register(
        "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo", SeededBatchInfo, HookType.REPLACE
    )
    HookRegistry.register("sglang.srt.sampling.sampling_params.SamplingParams.verify", check_seed)
    for backend in SAMPLING_BACKENDS:
        register_sampler_backend(backend, SeededSampler)


def supports_seed(server_args: Any) -> bool:
    """Say whether an engine with these arguments will honour `sampling_seed`.

    Ask once the plugins are loaded. Speculative and diffusion decoding pick tokens
    outside the sampler.
    """
    return (
        sampling_batch_info.SamplingBatchInfo is SeededBatchInfo
        and server_args.sampling_backend in SAMPLING_BACKENDS
        and server_args.speculative_algorithm is None
        and server_args.dllm_algorithm is None
    )


def check_seed(_result: None, sampling_params: Any, _vocab_size: int) -> None:
    """Refuse, in the process that takes requests, a seed that would kill the scheduler.

    Raises:
        ValueError: as SGLang's own checks of sampling parameters do.
    """
    seed = sampling_params.sampling_seed
    if seed is not None and type(seed) is not int:
        raise ValueError(f"sampling_seed must be an integer, got {seed!r}.")


@dataclass
class SeededBatchInfo(SamplingBatchInfo):  # type: ignore[misc]
    """SGLang's sampling parameters of a batch, and the seed of each of its requests."""

    request_seeds: list[int | None] = field(default_factory=list)

    def adjusted_from_schedule_batch(self, batch: Any, vocab_size: int) -> None:
        self.request_seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        self.sampling_seed = None  # deterministic mode would give 42 to those without one

    def adjusted_merge_batch(self, other: "SeededBatchInfo") -> None:
        self.request_seeds = self.request_seeds + other.request_seeds

    def adjusted_filter_batch(self, keep_indices: list[int], keep_indices_device: torch.Tensor) -> None:
        self.request_seeds = [self.request_seeds[index] for index in keep_indices]


class SeededSampler(Sampler):  # type: ignore[misc]
    """SGLang's sampler, with the seeded rows of a batch drawn again from their own numbers."""

    def _sample_from_probs(
        self,
        probs: torch.Tensor,
        sampling_info: SeededBatchInfo,
        positions: torch.Tensor,
        simple_sampling_case: bool,
    ) -> torch.Tensor:
        token_ids: torch.Tensor = super()._sample_from_probs(probs, sampling_info, positions, simple_sampling_case)
        seeded = [(row, seed) for row, seed in enumerate(sampling_info.request_seeds) if seed is not None]
        if seeded:
            rows = torch.tensor([row for row, _ in seeded], device=probs.device)
            seeds = torch.tensor([_to_int64(seed) for _, seed in seeded], device=probs.device)
            token_ids[rows] = sample_with_seeds(
                probs[rows],
                seeds,
                positions[rows],
                top_ks=sampling_info.top_ks[rows],
                top_ps=sampling_info.top_ps[rows],
                min_ps=sampling_info.min_ps[rows],
            ).to(token_ids.dtype)
        return token_ids


def sample_with_seeds(
    probs: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    *,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
) -> torch.Tensor:
    """Draw one token a row, the filters meaning what they mean in SGLang's own sampler.

    probs: (rows, vocabulary). All others: (rows,), int64 or float. Returns (rows,) token ids.
    The noise belongs to a token id, not to its rank, so that two nearly equal tokens
    changing places changes nothing.
    """
    sorted_probs, sorted_ids = probs.to(torch.float64).sort(dim=-1, descending=True)
    preceding_mass = sorted_probs.cumsum(dim=-1) - sorted_probs
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    is_kept = (
        (ranks < top_ks[:, None])
        & (preceding_mass <= top_ps[:, None])
        & (sorted_probs >= sorted_probs[:, :1] * min_ps[:, None])
    )
    noise = gumbel_noise(seeds, positions, probs.shape[-1]).gather(1, sorted_ids)
    scores = torch.where(is_kept, sorted_probs.log() + noise, -torch.inf)
    return sorted_ids.gather(1, scores.argmax(dim=-1, keepdim=True)).view(-1)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Make (rows, vocab_size) float64 noise from seeds and positions alone, by splitmix64.

    A counter-based generator, because `torch.Generator` takes one seed a call and differs
    between devices. Adding Gumbel noise to log-probabilities and taking the largest is a
    draw from the distribution.
    """
    token_ids = torch.arange(vocab_size, device=seeds.device)
    streams = _mix(_mix(seeds) + positions.to(torch.int64))
    bits = _mix(streams[:, None] + token_ids * _to_int64(0x9E3779B97F4A7C15))
    uniform = (_shift_right(bits, 12).to(torch.float64) + 0.5) * 2.0**-52  # in (0, 1), never either
    return -(-uniform.log()).log()


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _to_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _to_int64(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: torch.Tensor, num_bits: int) -> torch.Tensor:
    return (x >> num_bits) & ((1 << (64 - num_bits)) - 1)


def _to_int64(value: int) -> int:
    """Fold an integer of any size into the int64 with the same low 64 bits."""
    return ((value + 2**63) % 2**64) - 2**63
