"""Our plugins act in engine.py's processes, and in no other SGLang of the environment."""

import json
import os
import subprocess
import sys

import pytest

from tests.processes import ROOT
from tests.sglang_probe import probe

BESIDE = """
import json, os, sys
from sglang.srt import platforms
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from tests.sglang_probe import is_ours

load_plugins()
found = {
    "hooks": [target for target, hooks in HookRegistry._hooks.items() if is_ours(hooks)],
    "modules": sorted(name for name in sys.modules if name.startswith("common.")),
    "platform": type(platforms.current_platform).__name__,
}
os.environ["SGLANG_PLATFORM"] = "cpu_torch_native"
print(json.dumps({**found, "platform_asked_for": type(platforms._resolve_platform()).__name__}))
"""


@pytest.mark.process
def test_another_sglang_is_as_it_came_and_may_ask_for_the_cpu_platform() -> None:
    """As `sglang.launch_server` or `dynamo.sglang` would find it, in the environment that engine.py runs in."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SGLANG", "DYN"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BESIDE],
        cwd=ROOT,
        env={**inherited, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "hooks": [],
        "modules": ["common.sglang", "common.sglang.plugins"],
        "platform": "SRTPlatform",
        "platform_asked_for": "CpuTorchNativePlatform",
    }


def test_in_the_engine_they_act() -> None:
    assert probe()["current_platform"] == "CpuTorchNativePlatform"
    assert {".".join(hook.split(".")[-2:]) for hook in probe()["hooks"]} == {
        "SchedulerRequestReceiver._pull_raw_reqs",
        "sampling_batch_info.SamplingBatchInfo",
        "SamplingParams.verify",
        "GrammarManager.__init__",
        "GuidanceGrammar.fill_vocab_mask",
        "GuidanceGrammar.copy",
    }
    assert probe()["environment"]["DYN_CHAT_SGLANG_PLUGINS"] == "1"  # which the scheduler inherits
