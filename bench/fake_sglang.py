"""A stand-in for `sglang.Engine` inside the real engine.py, so that only the pipeline is measured.

`python -m bench.fake_sglang engine.py --model-path ...` runs the script with SGLang's own argument parsing, and with
tokens at a set pace, without a model, delivered the way SGLang delivers them.

What is kept of SGLang's tokenizer manager, because it decides how many items a consumer sees: the model's step gives
every request one token, whoever is slow; a streaming request gets an item every `stream_interval` tokens (the first
token at once), any other one only at its end; items that a consumer has not taken yet become one, the newest, with all
tokens so far.

FAKE_STEP_MS sets the pace (default 0.25 ms per token, which no pipeline keeps up with under load).
"""

import asyncio
import json
import os
import runpy
import sys
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

_STEP_S = float(os.environ.get("FAKE_STEP_MS", "0.25")) / 1000
_NUM_TOKEN_IDS = 4000
# Plain words in the tokenizers of SmolLM2 and Qwen; long enough to start anywhere in the first cycle.
_TOKEN_IDS = [1000 + index * 7 % _NUM_TOKEN_IDS for index in range(_NUM_TOKEN_IDS + 32768)]
_DEFAULT_MAX_NEW_TOKENS = 128


class SignalHandler:
    """engine.py changes it. Nobody makes one: signals are the script's."""


@dataclass(eq=False)
class Request:
    """interval: tokens per item of a stream, else 0. started_at_step: its first token comes with the next one."""

    rid: str
    num_prompt_tokens: int
    max_new_tokens: int
    interval: int
    started_at_step: int
    output_ids: list[int] = field(default_factory=list)
    finish_reason: dict[str, Any] | None = None
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def step_of_next_item(self) -> int:
        """The first token comes alone, as SGLang's `len(output_ids) % stream_interval == 1` has it."""
        wanted = len(self.output_ids) + self.interval if self.output_ids else 1
        return self.started_at_step + (min(wanted, self.max_new_tokens) if self.interval else self.max_new_tokens)

    def item(self) -> dict[str, Any]:
        meta_info = {
            "id": self.rid, "finish_reason": self.finish_reason, "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": len(self.output_ids), "cached_tokens": 0,
        }  # fmt: skip
        return {"output_ids": self.output_ids, "meta_info": meta_info}


class TokenizerManager:
    """Steps of the model, and the requests that wait for them. A step costs what its items cost, and nothing else."""

    def __init__(self, server_args: Any) -> None:
        config = json.loads((Path(server_args.model_path) / "config.json").read_text())
        context_len = server_args.context_length or config["max_position_embeddings"]
        self.model_config = SimpleNamespace(context_len=context_len, vocab_size=config["vocab_size"])
        self.max_req_input_len, self.num_reserved_tokens = context_len, 0
        self.rid_to_state: dict[str, Request] = {}
        self._started_at = time.perf_counter()
        self._due: dict[int, list[Request]] = {}
        self._timer: asyncio.TimerHandle | None = None

    async def generate(self, request: Request) -> AsyncGenerator[dict[str, Any], None]:
        self.rid_to_state[request.rid] = request
        self._schedule(request, request.step_of_next_item())
        while True:
            await request.event.wait()
            request.event.clear()
            item = request.item()
            yield item
            if item["meta_info"]["finish_reason"] is not None:  # it may have finished since: then there is one more
                return

    def abort_request(self, rid: str) -> None:
        if (request := self.rid_to_state.get(rid)) is not None and request.finish_reason is None:
            request.finish_reason = {"type": "abort", "message": "Aborted"}
            self._schedule(request, self.step_now + 1)

    @property
    def step_now(self) -> int:
        return int((time.perf_counter() - self._started_at) / _STEP_S)

    def _schedule(self, request: Request, step: int) -> None:
        self._due.setdefault(step, []).append(request)
        self._sleep_until_due()

    def _sleep_until_due(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._due:
            wait_s = self._started_at + min(self._due) * _STEP_S - time.perf_counter()
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._make_steps)

    def _make_steps(self) -> None:
        """Steps that came due while this process was busy have all happened, as in a process of their own."""
        while self._due and (step := min(self._due)) <= self.step_now:
            for request in self._due.pop(step):
                if request.rid in self.rid_to_state:
                    self._add_tokens(request, step)
        self._sleep_until_due()

    def _add_tokens(self, request: Request, step: int) -> None:
        num_tokens = min(step - request.started_at_step, request.max_new_tokens)
        first = request.num_prompt_tokens % _NUM_TOKEN_IDS
        request.output_ids += _TOKEN_IDS[first + len(request.output_ids) : first + num_tokens]
        if request.finish_reason is None and num_tokens == request.max_new_tokens:
            request.finish_reason = {"type": "length", "length": num_tokens}
        if request.finish_reason is None:
            self._due.setdefault(request.step_of_next_item(), []).append(request)
        else:
            del self.rid_to_state[request.rid]
        request.event.set()


class Engine:
    """The part of `sglang.Engine` that engine.py calls."""

    def __init__(self, *, server_args: Any) -> None:
        self.tokenizer_manager = TokenizerManager(server_args)
        self._scheduler_init_result = SimpleNamespace(scheduler_infos=[{"max_total_num_tokens": 2**17}])

    async def async_generate(
        self, *, input_ids: list[int], sampling_params: dict[str, Any] | None = None, rid: str | None = None,
        stream: bool = False, **_: Any,
    ) -> Any:  # fmt: skip
        params, manager = sampling_params or {}, self.tokenizer_manager
        max_new_tokens = params.get("max_new_tokens") or _DEFAULT_MAX_NEW_TOKENS
        interval = (params.get("stream_interval") or 1) if stream else 0
        generator = manager.generate(
            Request(rid or uuid.uuid4().hex, len(input_ids), max_new_tokens, interval, manager.step_now)
        )
        return generator if stream else await anext(generator)

    def shutdown(self) -> None: ...


def _stand_in(name: str, **contents: object) -> None:
    sys.modules[name] = module = ModuleType(name)
    vars(module).update(contents)


if __name__ == "__main__":
    _stand_in("sglang.srt.entrypoints.engine", Engine=Engine)
    _stand_in("sglang.srt.managers.tokenizer_manager", SignalHandler=SignalHandler)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as Python does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")
