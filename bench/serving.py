"""SGLang's own load, `bench_serving`, in a process that imports it once: users of this field know it and trust it."""

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from itertools import accumulate
from pathlib import Path
from typing import Any

from bench.client import Load, Outcome, Reply


class BenchServing:
    """folder: where it keeps its prompts, and what it found."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def run(self, args: Sequence[str]) -> dict[str, Any]:
        """What it found, as its output file has it."""
        return self._executor.submit(_run, self._folder, args).result()

    def close(self) -> None:
        self._executor.shutdown()


def load_args(load: Load) -> list[str]:
    """One closed loop on OpenAI's chat completions. The seed is the load's first prompt: no two have the same ones."""
    extra = {"stream_options": {"include_usage": True}} if load.is_stream else {}
    return [
        *("--dataset-name", "random-ids", "--random-range-ratio", "1", "--warmup-requests", "0", "--output-details"),
        *f"--random-input-len {load.num_prompt_words} --random-output-len {load.max_tokens}".split(),
        *f"--num-prompts {load.num_requests} --max-concurrency {load.num_users} --seed {load.first_prompt}".split(),
        *([] if load.is_stream else ["--disable-stream"]),
        *("--extra-request-body", json.dumps(extra)),
    ]  # fmt: skip


def outcome_of(found: dict[str, Any], load: Load) -> Outcome:
    """found: with `--output-details`. Items of its `itls`: a stream's gaps. Each reply is sent at 0."""
    replies = [
        Reply(
            0.0,
            finished_at=ttft + sum(gaps),
            first_content_at=ttft,
            arrivals=list(accumulate(gaps, initial=ttft)),
            num_tokens=num_tokens,
            error=error or ("" if num_tokens == load.max_tokens else "not all tokens") or None,
        )
        for ttft, gaps, num_tokens, error in zip(
            found["ttfts"], found["itls"], found["output_lens"], found["errors"], strict=True
        )
    ]
    return Outcome(replies, found["duration"])


def _run(folder: Path, args: Sequence[str]) -> dict[str, Any]:
    os.environ["HOME"] = str(folder)
    from sglang.benchmark.serving import cli_main

    found = folder / "found.jsonl"
    sys.argv = ["serving", "--backend", "sglang-oai-chat", *args, "--output-file", str(found), "--disable-tqdm"]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        cli_main()
    last: dict[str, Any] = json.loads(found.read_text().splitlines()[-1])
    return last
