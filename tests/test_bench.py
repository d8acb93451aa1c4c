"""The harness itself: its loads, its figures, its table and plot, on a server that answers at once."""

import asyncio
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bench import __main__ as bench_main
from bench import routing
from bench.client import Load, Outcome, Reply
from bench.fake_sglang import Engine
from bench.hops import POINTS, WATCHED, hops
from bench.peers import PEERS, Instant, Ours, Setting
from bench.processes import Child, Infra
from bench.report import measures
from bench.serving import outcome_of
from common.sglang import plugins
from launch.dev import Source
from tests.processes import ROOT

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "bench", "client", "--concurrency", "4", "--max-tokens", "32", "--rounds", "1"]
    subprocess.run([*command, "--out", str(folder)], cwd=ROOT, check=True, timeout=300)
    return folder


def test_every_answer_has_the_tokens_that_were_asked_for(out: Path) -> None:
    rounds: list[dict[str, Any]] = json.loads((out / "client.json").read_text())
    assert [measured["is_stream"] for measured in rounds] == [False, True]
    for measured in rounds:
        assert (measured["num_errors"], measured["num_requests"]) == (0, 16)
        assert measured["tokens_per_s"] == pytest.approx(32 * measured["requests_per_s"], rel=1e-6)
        assert measured["client_cpu_ms_per_request"] > 0
        assert set(measured["cpu_ms_per_request"]) == {"server"}


def test_the_table_has_a_row_for_each_load(out: Path) -> None:
    rows = [line for line in (out / "client.md").read_text().splitlines() if line.startswith("| c=")]
    assert [row.split("|")[1].strip() for row in rows] == [
        "c=4, 32 tokens, 64 words, whole",
        "c=4, 32 tokens, 64 words, streaming",
    ]


def test_what_bench_serving_found_is_read_as_our_own_clients_replies_are() -> None:
    load = Load(num_users=2, is_stream=True, max_tokens=4)
    replies = [
        Reply(10.0, finished_at=10.4, first_content_at=10.1, arrivals=[10.1, 10.2, 10.4], num_tokens=4),
        Reply(10.0, finished_at=10.3, error="503"),
    ]
    found = {
        "errors": ["", "503"],
        "output_lens": [4, 0],
        "ttfts": [0.1, 0.0],
        "itls": [[0.1, 0.2], []],
        "duration": 0.4,
    }
    ours, theirs = measures("ours", load, Outcome(replies, 0.4)), measures("ours", load, outcome_of(found, load))
    for name, value in asdict(ours).items():
        assert getattr(theirs, name) == (pytest.approx(value) if isinstance(value, float) else value), name
    assert (ours.num_errors, ours.ttft_p50, ours.longest_gap_p99) == (1, pytest.approx(100), pytest.approx(200))


def test_the_plot_is_a_picture(out: Path) -> None:
    assert (out / "client.png").read_bytes().startswith(b"\x89PNG")


def test_hops_are_the_times_between_the_points_that_a_request_passed() -> None:
    replies = [Reply(sent_at=start, first_content_at=start + 0.014) for start in (10.0, 20.0)]
    notes = [
        (reply.sent_at + 0.001 * number, point) for reply in replies for number, point in enumerate(POINTS[1:-1], 1)
    ]
    later_chunk = [(10.0135, "processor has a token")]
    found = hops(replies, sorted(notes + later_chunk))
    assert [point for point, _, _ in found] == list(POINTS[1:])
    assert all(median == pytest.approx(1.0) and ninth == pytest.approx(1.0) for _, median, ninth in found)


def test_every_point_that_is_watched_is_in_the_code() -> None:
    for point, module, path, _ in WATCHED:
        found = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        assert callable(found), point


def test_a_request_that_was_not_seen_somewhere_is_an_error() -> None:
    with pytest.raises(ValueError, match="not seen at: frontend has the headers"):
        hops([Reply(sent_at=1.0, first_content_at=2.0)], [(1.5, point) for point in POINTS[2:-1]])


def test_peers_run_untouched_by_our_sglang_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a shell has switched them on. What SGLang makes of that: tests/test_sglang_plugins.py."""
    monkeypatch.setattr(os, "environ", {**os.environ})
    plugins.switch_on()
    started: list[Child] = []
    monkeypatch.setattr(Child, "start", lambda child: started.append(child) or child)
    monkeypatch.setattr(Infra, "start", lambda infra: None)
    others = [
        peer for peer in (*PEERS.values(), *routing.ROUTED.values()) if not issubclass(peer, (Ours, routing.Ours))
    ]
    for peer in others:
        peer(Setting("model", tmp_path)).start()
    assert {child.log_path.parent.name for child in started} >= {peer.name for peer in others}
    assert plugins._are_on()
    for child in started:
        with monkeypatch.context() as theirs:
            theirs.setattr(os, "environ", child.environ)
            assert not plugins._are_on()
            assert not plugins.cpu_platform()
    scripts = [ROOT / word for child in started for word in child.command if word.endswith(".py")]
    sources = [Source(ROOT / "bench" / "engine_alone.py", ROOT), *(Source(each, each.parent) for each in scripts)]
    theirs_too = [file.read_text() for source in sources for file in source.files]
    assert len(theirs_too) > len(scripts)
    assert not [text for text in theirs_too if re.search(r"^\s*(from|import) common\b", text, re.MULTILINE)]


def test_schedulers_of_all_peers_share_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are CPUs enough; everything else stays where it is."""
    allowed = psutil.Process().cpu_affinity()
    monkeypatch.setattr(bench_main, "_ENOUGH_CPUS", 1)
    peers = [Instant(Setting("", tmp_path / str(number))) for number in range(2)]
    tell_and_wait = "import sys, time; print(flush=True); time.sleep(60)"
    wait_for_child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {tell_and_wait!r}, 'scheduler'])"
    monkeypatch.setattr(Instant, "start", lambda peer: peer.child("server", [sys.executable, "-c", wait_for_child]))
    monkeypatch.setattr(Instant, "is_ready", lambda peer: bool(peer.schedulers()))
    try:
        assert bench_main.start_all(peers, 20) == peers
        for peer in peers:
            (scheduler,) = peer.schedulers()
            assert scheduler.cpu_affinity() == [(psutil.cpu_count() or 1) - 1]
            assert psutil.Process(peer.children[0].popen.pid).cpu_affinity() == allowed
    finally:
        for peer in peers:
            peer.stop()


def test_a_fake_engines_stream_has_an_end_however_slow_its_reader_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 2048, "vocab_size": 49152}')

    async def read_slowly() -> list[dict[str, Any]]:
        engine = Engine(server_args=SimpleNamespace(model_path=str(tmp_path), context_length=None))
        stream = await engine.async_generate(input_ids=[1], sampling_params={"max_new_tokens": 400}, stream=True)
        items = []
        async for item in stream:
            items.append(item)
            await asyncio.sleep(0.3)  # longer than all its steps take
        return items

    first, *others = asyncio.run(asyncio.wait_for(read_slowly(), 30))
    assert first["meta_info"]["finish_reason"] is None
    assert [each["meta_info"]["finish_reason"] for each in others] == [{"type": "length", "length": 400}]
    assert len(others[-1]["output_ids"]) == 400
