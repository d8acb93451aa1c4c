"""Our plugins act in engine.py's processes, and in no other SGLang of the environment."""

import json
import os
import subprocess
import sys

import pytest

from common.openai.json_schema import GRAMMAR_FAILED
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
        timeout=400,
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
        "SamplingBatchInfo.adjusted_from_schedule_batch",
        "SamplingBatchInfo.adjusted_merge_batch",
        "SamplingBatchInfo.adjusted_filter_batch",
        "SamplingBatchInfo.copy_for_forward",
        "Sampler._sample_from_probs",
        "sampling_params.raise_if_tokenizer_required",
        "BatchedMinNewTokensPenalizer._prepare",
        "GrammarManager.__init__",
        "GrammarManager.process_req_with_grammar",
        "GrammarManager.get_ready_grammar_requests",
        "GuidanceGrammar.__init__",
        "GuidanceGrammar.fill_vocab_mask",
        "GuidanceGrammar.copy",
        "GuidanceGrammar._check_err",
        "SchedulerBatchResultProcessor._accept_grammar_tokens",
        "SchedulerBatchResultProcessor._apply_prefill_grammar",
    }
    assert probe()["environment"]["DYN_CHAT_SGLANG_PLUGINS"] == "1"  # which the scheduler inherits


def test_a_batch_carries_the_seeds_of_its_requests_and_so_does_its_copy_for_a_step() -> None:
    assert probe()["seeds"] == [[1, None, 2], [1, 2]]


def test_the_scheduler_has_grammars_though_it_has_no_tokenizer_unless_told_not_to(embedded_model: str) -> None:
    grammars = probe()["grammars"]
    assert grammars["without"] is None
    assert grammars["invalid"] == "type must be a string or array of strings"


def test_between_the_tokens_of_json_there_is_one_space_at_most() -> None:
    assert probe()["grammars"]["texts"] == ['{"a":[1,2]}', '{"a": [1, 2]}']


def test_a_grammar_that_fails_ends_its_own_request_only() -> None:
    """SGLang calls one after the other in the step of a whole batch; the first may not raise, the second one may."""
    grammars = probe()["grammars"]
    assert grammars["failing_masks"] == [False, True]
    assert grammars["message"] == "NoExtensionBias"


def test_a_request_whose_grammar_fails_ends_with_the_reason_and_any_other_without() -> None:
    assert probe()["grammars"]["reasons"] == ["Aborted", GRAMMAR_FAILED, GRAMMAR_FAILED]


def test_a_pattern_that_would_keep_a_batch_waiting_is_given_up_soon() -> None:
    assert probe()["grammars"]["slow_pattern"] == "lexer error: too many expressions constructed"


def test_clients_cannot_fill_the_memory_with_grammars() -> None:
    assert probe()["grammars"]["num_cached"] == 256
    assert probe()["grammars"]["newest_is_cached"] is True


def test_the_grammar_of_an_answer_that_another_engine_began_goes_on_where_that_one_broke() -> None:
    grammars = probe()["grammars"]
    assert grammars["continued"] == ['c"', 'bc"']
    assert grammars["not_continued"][0].startswith("The answer so far does not hold to its schema")


def test_without_an_accelerator_sglang_finds_our_platform_by_its_entry_point() -> None:
    assert probe()["current_platform"] == "CpuTorchNativePlatform"
    assert probe()["activated"]["no accelerator"] == "common.sglang.cpu_platform:CpuTorchNativePlatform"


@pytest.mark.parametrize("present", ["cuda", "another accelerator", "SGLang's CPU engine"])
def test_what_sglang_supports_itself_is_left_to_it(present: str) -> None:
    assert probe()["activated"][present] is None


def test_attention_runs_on_pytorch_alone() -> None:
    assert probe()["attention_backend"] == "torch_native"


def test_a_page_size_that_cannot_work_is_refused() -> None:
    assert probe()["page_size_error"] == "--page-size 4: only 1 works without a GPU"
