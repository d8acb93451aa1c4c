"""A seed of its own for each request, on any device.

SGLang reads `sampling_seed` in deterministic mode only: a mode that slows a GPU down, that a
CPU cannot run, and in which a request without a seed gets 42. This plugin honours the seed
of every request that has one and leaves the sampling of all others alone.
common/sglang/plugins.py calls `register` in the engine's processes.

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

from common.sglang.seeded_sampling import kept_tokens, sample_with_seeds, to_int64

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
        seeded = [(row, seed) for row, seed in enumerate(sampling_info.request_seeds) if seed is not None]
        if len(seeded) < len(probs):
            token_ids = super()._sample_from_probs(probs, sampling_info, positions, simple_sampling_case)
        else:
            token_ids = torch.empty(len(probs), dtype=torch.int32, device=probs.device)
        if seeded:
            rows = torch.tensor([row for row, _ in seeded], device=probs.device)
            seeds = torch.tensor([to_int64(seed) for _, seed in seeded], device=probs.device)
            is_kept = (
                None
                if simple_sampling_case
                else kept_tokens(
                    probs[rows], sampling_info.top_ks[rows], sampling_info.top_ps[rows], sampling_info.min_ps[rows]
                )
            )
            token_ids[rows] = sample_with_seeds(probs[rows], seeds, positions[rows], is_kept).to(token_ids.dtype)
        return token_ids
