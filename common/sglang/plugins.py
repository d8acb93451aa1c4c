"""What SGLang calls of this pipeline, by the entry points in pyproject.toml.

SGLang calls them in each of its processes, and so does any other SGLang of the environment: `sglang.launch_server`,
`dynamo.sglang`, a bare engine. They act in engine.py and in the processes that SGLang spawns for it, and nowhere else.
"""

import os

_SWITCH = "DYN_CHAT_SGLANG_PLUGINS"
_CPU_PLATFORM = "cpu_torch_native"


def switch_on() -> None:
    """For this process and its children. Call before anything of SGLang is imported, which looks for its platform."""
    os.environ[_SWITCH] = "1"


def _are_on() -> bool:
    return os.getenv(_SWITCH) == "1"


def cpu_platform() -> str | None:
    """The platform class where there is no accelerator: ours, or any SGLang's with SGLANG_PLATFORM=cpu_torch_native."""
    if not _are_on() and os.getenv("SGLANG_PLATFORM") != _CPU_PLATFORM:
        return None
    from common.sglang.cpu_platform import activate

    return activate()


def prefill_batching() -> None:
    """Prefill batching."""
    if _are_on():
        from common.sglang.pacing import register

        register()


def request_seeds() -> None:
    """And grammars, and what else a request asks of the sampler. An older environment has them, too."""
    if _are_on():
        from common.sglang import grammars, sampler

        sampler.register()
        grammars.register()
