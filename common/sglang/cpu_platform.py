"""SGLang on a machine without a GPU, from the plain PyPI wheel.

SGLang's own CPU engine (`SGLANG_USE_CPU_ENGINE=1`) needs kernels that are not on PyPI.
This module is an out-of-tree platform instead, which common/sglang/plugins.py offers SGLang in
the engine process and in every process it spawns.
The model then runs on PyTorch's own operators.
"""

import os
from typing import Any

import torch
import torch._dynamo
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum

ATTENTION_BACKEND = "torch_native"


def activate() -> str | None:
    """Name the platform class, or None where SGLang has a platform of its own.

    That is: any accelerator that PyTorch knows (CUDA, ROCm, XPU, ...), or SGLang's CPU
    engine where somebody installed its kernels and asked for it.
    """
    if torch.cuda.is_available() or torch.accelerator.is_available():
        return None
    if os.getenv("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    return f"{__name__}:CpuTorchNativePlatform"


class CpuTorchNativePlatform(CpuSRTPlatform):  # type: ignore[misc]
    """A CPU with nothing but PyTorch on it."""

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Replace what SGLang chose for a CPU with AMX kernels, which are not installed."""
        if server_args.attention_backend == "intel_amx":
            server_args.attention_backend = ATTENTION_BACKEND
        for phase in (server_args.cuda_graph_config.decode, server_args.cuda_graph_config.prefill):
            phase.backend = Backend.DISABLED

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def get_mha_kv_pool_cls(self) -> type:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool  # type: ignore[no-any-return]

    def get_paged_allocator_cls(self) -> type:
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

        class SingleTokenPageAllocator(TokenToKVPoolAllocator):  # type: ignore[misc]
            """SGLang hands every out-of-tree allocator a page size; torch_native has pages of one."""

            def __init__(self, size: int, page_size: int, **kwargs: Any) -> None:
                if page_size != 1:
                    raise ValueError(f"--page-size {page_size}: only 1 works without a GPU")
                super().__init__(size, **kwargs)

        return SingleTokenPageAllocator

    def init_backend(self) -> None:
        """Run the few functions that SGLang compiles (repetition penalties) as they are written.

        Compiling takes half a minute, within a request, and a C++ compiler.
        """
        torch._dynamo.config.disable = True
