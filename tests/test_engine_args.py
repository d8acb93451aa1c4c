import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from common.sglang.engine_args import keep_ports_local, look_up_model, parse_engine_args
from tests.processes import ROOT
from tests.sglang_probe import probe


def arguments(name: str) -> dict[str, Any]:
    found: dict[str, Any] = probe()["arguments"][name]
    return found


def test_without_a_gpu_the_engine_gets_what_a_cpu_needs() -> None:
    plain = arguments("plain")
    assert plain["device"] == "cpu"
    assert plain["attention_backend"] == "torch_native"
    assert plain["sampling_backend"] == "pytorch"
    assert plain["grammar_backend"] == "llguidance"
    assert plain["graphs"] == ["disabled", "disabled"]
    assert plain["page_size"] == 1
    assert plain["disable_overlap_schedule"] is True
    assert plain["sleep_on_idle"] is True
    assert plain["max_total_tokens"] >= 2 * 8192


def test_explicit_flags_win() -> None:
    explicit = arguments("explicit")
    assert explicit["max_total_tokens"] == 4096
    assert explicit["mem_fraction_static"] == 0.3
    assert explicit["grammar_backend"] == "outlines"
    assert explicit["log_level"] == "error"


def test_flags_that_we_do_not_know_pass_through() -> None:
    assert arguments("explicit")["context_length"] == 1024


def test_token_ids_in_and_whole_answers_out_whatever_is_given() -> None:
    for name in ("plain", "explicit", "incremental"):
        assert arguments(name)["skip_tokenizer_init"] is True
        assert arguments(name)["incremental_streaming_output"] is False


def test_a_seed_is_supported_on_a_cpu() -> None:
    assert arguments("plain")["supports_seed"] is True


def test_a_device_that_is_not_there_gets_one_line() -> None:
    assert arguments("cuda")["exit_code"] == 2
    assert arguments("cuda")["stderr"] == "engine.py: error: --device cuda: PyTorch sees no such device here\n"


@pytest.mark.parametrize("name", ["unknown", "impossible"])
def test_wrong_flags_get_a_short_error(name: str) -> None:
    assert arguments(name)["exit_code"] == 2
    assert len(arguments(name)["stderr"].splitlines()) <= 3


def test_openmp_leaves_cores_to_the_other_processes() -> None:
    assert probe()["environment"]["OMP_NUM_THREADS"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "which model? Give --model-path a folder or a name on the Hugging Face hub"),
        (["--model-path", "/no/such/model"], "--model-path /no/such/model: no such folder"),
        (["--model", "./no-such-model"], "--model-path ./no-such-model: no such folder"),
        (["--model-path=~/no-such-model"], "--model-path ~/no-such-model: no such folder"),
        (
            ["--model-path", "no such model"],
            "--model-path no such model: no such folder, and no such model on the Hugging Face hub",
        ),
    ],
)
def test_a_missing_model_gets_one_line_at_once(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    with pytest.raises(SystemExit, match="2"):
        parse_engine_args(argv)
    assert capsys.readouterr().err == f"engine.py: error: {message}\n"
    assert time.monotonic() - started < 3


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LookupError, match=r"no config\.json"):
        look_up_model(str(tmp_path))


def test_a_hub_out_of_reach_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(LookupError, match=r"the Hugging Face hub is out of reach \(no route to host\)"):
        look_up_model("no-such-owner/no-such-model")


class Replicas:
    def __init__(self, nnodes: int = 1, dp_size: int = 1) -> None:
        self.nnodes, self.dp_size = nnodes, dp_size


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment to write to, in place of the real one."""
    written: dict[str, str] = {}
    monkeypatch.setattr("os.environ", written)
    return written


def test_one_replica_on_one_node_needs_no_port_that_others_can_reach(environment: dict[str, str]) -> None:
    keep_ports_local(Replicas())  # type: ignore[arg-type]
    assert environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"].startswith("file:///")
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"


MEET = """
import sys, torch
import torch.distributed as group
group.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
number = torch.tensor([10 + int(sys.argv[2])])
group.all_reduce(number)
print(number.item(), flush=True)
group.destroy_process_group()
"""


@pytest.mark.process
def test_processes_meet_in_a_file_that_no_folder_has(
    environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real file would be left behind by each engine that is killed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    keep_ports_local(Replicas())  # type: ignore[arg-type]
    where = environment["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"]
    commands = [[sys.executable, "-c", MEET, where, str(rank)] for rank in range(2)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**environment, "TMPDIR": str(tmp_path)})
        for command in commands
    ]
    try:
        assert [process.communicate(timeout=300)[0] for process in processes] == ["21\n", "21\n"]
    finally:
        for process in processes:
            process.kill()
    assert os.readlink(where.removeprefix("file://")).startswith("/memfd:")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("replicas", [Replicas(nnodes=2), Replicas(dp_size=2)])
def test_several_nodes_or_replicas_keep_their_addresses(replicas: Replicas, environment: dict[str, str]) -> None:
    keep_ports_local(replicas)  # type: ignore[arg-type]
    assert not {"SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", "GLOO_SOCKET_IFNAME"} & set(environment)


def test_an_engine_that_tells_nobody_of_its_cache_needs_nothing_for_it() -> None:
    """The oldest Dynamo releases have no such index."""
    code = "import engine, sys; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    assert "common.sglang.engine" in modules.stdout
    assert {"common.sglang.cache_events", "common.routing.kv_blocks", "zmq"}.isdisjoint(modules.stdout.split())
