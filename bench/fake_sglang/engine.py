"""`sglang.Engine` without a model: tokens at a set pace, delivered the way SGLang 0.5.16 delivers them.

What is kept of SGLang's tokenizer manager, because it decides how many items a consumer sees:

- the model's step gives every running request one token, whoever is slow;
- with `--max-running-requests`, more than that wait their turn;
- a streaming request gets an item every `stream_interval` tokens (the first token at once), any other one only at
  its end;
- items that a consumer has not taken yet become one: the newest with all tokens so far or, with
  `incremental_streaming_output`, the new tokens joined.

FAKE_STEP_MS sets the pace (default 0.25 ms per token, which no pipeline keeps up with under load), FAKE_ITEM_US a cost
in CPU time for each item (default 0).
"""

import asyncio
import json
import os
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_STEP_S = float(os.environ.get("FAKE_STEP_MS", "0.25")) / 1000
_ITEM_S = float(os.environ.get("FAKE_ITEM_US", "0")) / 1e6
_NUM_TOKEN_IDS = 4000
# Plain words in the tokenizers of SmolLM2 and Qwen; long enough to start anywhere in the first cycle.
_TOKEN_IDS = [1000 + index * 7 % _NUM_TOKEN_IDS for index in range(_NUM_TOKEN_IDS + 32768)]
_DEFAULT_MAX_NEW_TOKENS = 128


class SignalHandler:
    def __init__(self, tokenizer_manager: Any) -> None:
        self.tokenizer_manager = tokenizer_manager

    def sigterm_handler(self, signum: Any = None, frame: Any = None) -> None: ...

    def running_phase_sigquit_handler(self, signum: Any = None, frame: Any = None) -> None: ...


@dataclass(eq=False)
class Request:
    """items: those that the consumer has not taken yet. started_at_step: its first token comes with the next step."""

    rid: str
    num_prompt_tokens: int
    max_new_tokens: int
    is_stream: bool
    stream_interval: int
    started_at_step: int = 0
    output_ids: list[int] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)
    is_aborted: bool = False
    event: asyncio.Event = field(default_factory=asyncio.Event)

    def finish_reason(self) -> dict[str, Any] | None:
        if self.is_aborted:
            return {"type": "abort", "message": "Aborted"}
        if len(self.output_ids) >= self.max_new_tokens:
            return {"type": "length", "length": self.max_new_tokens}
        return None

    def tokens_until_item(self) -> int:
        """The first token comes alone, as SGLang's `len(output_ids) % stream_interval == 1` has it."""
        if not self.is_stream:
            return self.max_new_tokens
        if not self.output_ids:
            return 1
        return min(self.stream_interval, self.max_new_tokens - len(self.output_ids))


class TokenizerManager:
    """Steps of the model, and the requests that wait for them. A step costs what its items cost, and nothing else."""

    signal_handler_class: type = SignalHandler

    def __init__(self, server_args: Any) -> None:
        config = json.loads((Path(server_args.model_path) / "config.json").read_text())
        context_len = server_args.context_length or config["max_position_embeddings"]
        self.model_config = SimpleNamespace(context_len=context_len, vocab_size=config["vocab_size"])
        self.max_req_input_len, self.num_reserved_tokens = context_len, 0
        self.server_args = server_args
        self.rid_to_state: dict[str, Request] = {}
        self._is_incremental = bool(server_args.incremental_streaming_output)
        self._default_interval = server_args.stream_interval
        self._started_at = time.perf_counter()
        self._due: dict[int, list[Request]] = {}
        self._waiting: deque[Request] = deque()
        self._num_running = 0
        self._max_running = server_args.max_running_requests or sys.maxsize
        self._timer: asyncio.TimerHandle | None = None

    async def generate(self, request: Request) -> AsyncGenerator[dict[str, Any], None]:
        request.stream_interval = request.stream_interval or self._default_interval
        self.rid_to_state[request.rid] = request
        self._waiting.append(request)
        self._run_waiting()
        self._sleep_until_due()
        while True:
            await request.event.wait()
            request.event.clear()
            items, request.items = request.items, []
            item = items[-1]
            if self._is_incremental and request.is_stream and len(items) > 1:
                item["output_ids"] = [token_id for each in items for token_id in each["output_ids"]]
            yield item
            if item["meta_info"]["finish_reason"] is not None:
                return

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        request = self.rid_to_state.get(rid)
        if request is not None and not request.is_aborted:
            request.is_aborted = True
            if request in self._waiting:
                self._waiting.remove(request)
                self._run(request)
            self._schedule(request, self._steps_now() + 1)
            self._sleep_until_due()

    def _run_waiting(self) -> None:
        while self._waiting and self._num_running < self._max_running:
            self._run(self._waiting.popleft())

    def _run(self, request: Request) -> None:
        self._num_running += 1
        request.started_at_step = self._steps_now()
        self._schedule(request, request.started_at_step + request.tokens_until_item())

    def _steps_now(self) -> int:
        return int((time.perf_counter() - self._started_at) / _STEP_S)

    def _schedule(self, request: Request, step: int) -> None:
        self._due.setdefault(step, []).append(request)

    def _sleep_until_due(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._due:
            wait_s = self._started_at + min(self._due) * _STEP_S - time.perf_counter()
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wait_s), self._make_steps)

    def _make_steps(self) -> None:
        """Steps that came due while this process was busy have all happened, as in a process of their own."""
        while self._due and (step := min(self._due)) <= self._steps_now():
            for request in self._due.pop(step):
                if request.rid in self.rid_to_state:
                    self._add_item(request, step)
        self._sleep_until_due()

    def _add_item(self, request: Request, step: int) -> None:
        num_sent = len(request.output_ids)
        num_tokens = min(step - request.started_at_step, request.max_new_tokens)
        first = request.num_prompt_tokens % _NUM_TOKEN_IDS
        request.output_ids += _TOKEN_IDS[first + num_sent : first + num_tokens]
        finish_reason = request.finish_reason()
        if finish_reason is not None:
            del self.rid_to_state[request.rid]
            self._num_running -= 1
            self._run_waiting()
        else:
            self._schedule(request, step + request.tokens_until_item())
        request.items.append(self._item(request, num_sent, finish_reason))
        request.event.set()
        if _ITEM_S:
            until = time.perf_counter() + _ITEM_S
            while time.perf_counter() < until:
                pass

    def _item(self, request: Request, num_sent: int, finish_reason: dict[str, Any] | None) -> dict[str, Any]:
        output_ids = request.output_ids
        if self._is_incremental and request.is_stream:
            output_ids = output_ids[num_sent:]
        elif finish_reason is not None:
            output_ids = output_ids.copy()
        meta_info = {
            "id": request.rid,
            "finish_reason": finish_reason,
            "prompt_tokens": request.num_prompt_tokens,
            "weight_version": "default",
            "num_retractions": 0,
            "reasoning_tokens": 0,
            "completion_tokens": len(request.output_ids),
            "cached_tokens": 0,
        }
        return {"output_ids": output_ids, "meta_info": meta_info}


class Engine:
    """The part of `sglang.Engine` that engine.py calls."""

    def __init__(self, *, server_args: Any) -> None:
        self.server_args = server_args
        self.tokenizer_manager = TokenizerManager(server_args)
        self._scheduler_init_result = SimpleNamespace(scheduler_infos=[{"max_total_num_tokens": 2**17}])
        self._num_requests = 0

    async def async_generate(
        self,
        *,
        input_ids: list[int],
        sampling_params: dict[str, Any] | None = None,
        rid: str | None = None,
        stream: bool = False,
        **_: Any,
    ) -> Any:
        params = sampling_params or {}
        self._num_requests += 1
        request = Request(
            rid=rid or str(self._num_requests),
            num_prompt_tokens=len(input_ids),
            max_new_tokens=params.get("max_new_tokens") or _DEFAULT_MAX_NEW_TOKENS,
            is_stream=stream,
            stream_interval=params.get("stream_interval") or 0,
        )
        generator = self.tokenizer_manager.generate(request)
        return generator if stream else await anext(generator)

    def shutdown(self) -> None: ...
