"""SGLang asked, without an engine, in one process for all tests: importing it takes ten seconds.

A process of its own, because that import warns, and because SGLang's arguments write to the environment.
"""

import asyncio
import contextlib
import functools
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.processes import MODEL

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
COMMAND_LINES = {
    "plain": [],
    "explicit": [
        *("--max-total-tokens", "4096", "--mem-fraction-static", "0.3", "--grammar-backend", "outlines"),
        *("--log-level", "error", "--context-length", "1024"),
    ],
    "kv_events": ["--kv-events"],
    "told_twice": ["--kv-events", "--kv-events-config", "{}"],
    "incremental": ["--incremental-streaming-output"],
    "cuda": ["--device", "cuda"],
    "unknown": ["--no-such-option"],
    "impossible": ["--page-size", "0", "--schedule-policy", "no-such-policy"],
}


@functools.cache
def probe() -> dict[str, Any]:
    """What SGLang makes of each command line, and of our platform, on a machine without a GPU."""
    hidden = ("SGLANG", "OMP_", "GLOO_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        answer = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "tests.sglang_probe", folder],
            env=environment | {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": folder},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def answer(folder: str) -> dict[str, Any]:
    return {
        "arguments": dict(parsed(folder)),
        "environment": dict(os.environ),
        "prefill_batching": prefill_batching(),
        "seeds": seeds(),
        "grammars": grammars(),
        "cache_events": cache_events(),
        **platform(),
    }


def parsed(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from common.sglang.engine_args import parse_engine_args
    from common.sglang.sampler import supports_seed

    for name, options in COMMAND_LINES.items():
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                server_args = parse_engine_args(["--model-path", folder, *options])
        except SystemExit as exit_:
            yield name, {"exit_code": exit_.code, "stderr": stderr.getvalue()}
        else:
            plain = {field: value for field, value in vars(server_args).items() if isinstance(value, str | int | float)}
            graphs = server_args.cuda_graph_config
            yield (
                name,
                {**plain, "graphs": [graphs.decode.backend, graphs.prefill.backend]}
                | {"supports_seed": supports_seed(server_args)},
            )


def platform() -> dict[str, Any]:
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins.hook_registry import HookRegistry

    from common.sglang.cpu_platform import CpuTorchNativePlatform

    try:
        CpuTorchNativePlatform().get_paged_allocator_cls()(16, page_size=4)
    except ValueError as error:
        page_size_error = str(error)
    return {
        "current_platform": type(current_platform).__name__,
        "hooks": sorted(target for target, hooks in HookRegistry._hooks.items() if is_ours(hooks)),
        "activated": activated(),
        "page_size_error": page_size_error,
        "attention_backend": CpuTorchNativePlatform().get_default_attention_backend(),
    }


def is_ours(hooks: list[Any]) -> bool:
    return any(hook.__module__.startswith("common.") for _, hook, _ in hooks)


def prefill_batching() -> dict[str, Any]:
    from sglang.srt.distributed.parallel_state_wrapper import ParallelState
    from sglang.srt.managers.schedule_batch import ScheduleBatch
    from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

    def those_of(kind: type, *names: str) -> list[str]:
        return sorted(name for name in names if hasattr(kind, name) or name in kind.__dataclass_fields__)

    return {
        "hooked": hasattr(SchedulerRequestReceiver._pull_raw_reqs, "__wrapped__"),
        "receiver_has": those_of(
            SchedulerRequestReceiver, "ps", "get_last_batch", "recv_from_tokenizer", "recv_from_rpc"
        ),
        "ranks_have": those_of(ParallelState, "pp_rank", "attn_tp_rank", "attn_cp_rank"),
        "batch_has": those_of(ScheduleBatch, "batch_size", "forward_mode"),
    }


def seeds() -> list[list[int | None]]:
    """Of a batch as it is copied for a step, and of the same when some of its requests have ended."""
    from unittest.mock import MagicMock

    import torch
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    def batch_info(*seeds: int | None) -> Any:
        each = torch.ones(len(seeds))
        flags = dict.fromkeys(("is_all_greedy", "is_any_greedy"), False)
        flags |= {f"need_{name}_sampling": False for name in ("top_p", "top_k", "min_p")}
        made = SamplingBatchInfo(
            each, each, each, each, vocab_size=8, penalizer_orchestrator=MagicMock(is_required=False), **flags
        )
        params = [SimpleNamespace(sampling_seed=seed) for seed in seeds]
        requests = [SimpleNamespace(sampling_params=each) for each in params]
        made.adjusted_from_schedule_batch(SimpleNamespace(reqs=requests), 8)
        return made

    running = batch_info(1, None)
    running.merge_batch(batch_info(2))
    copied = running.copy_for_forward()
    running.filter_batch([0, 2], torch.tensor([0, 2]))
    return [copied.request_seeds, running.request_seeds]


def grammars() -> dict[str, Any]:
    """The scheduler's grammars as our plugin has them, on the embedded model's tokenizer."""
    from sglang.srt.constrained.grammar_manager import GrammarManager
    from sglang.srt.managers.schedule_batch import FINISH_ABORT
    from sglang.srt.managers.scheduler_components.batch_result_processor import SchedulerBatchResultProcessor

    from common.sglang.engine_args import parse_engine_args

    def manager(*options: str) -> Any:
        group = SimpleNamespace(world_size=1, first_rank=0, is_first_rank=True)
        model = SimpleNamespace(vocab_size=49152, hf_eos_token_id={2}, think_end_id=None)
        ranks = SimpleNamespace(pp_rank=0, pp_size=1)
        arguments = parse_engine_args(["--model-path", MODEL, *options])
        return GrammarManager(
            SimpleNamespace(server_args=arguments, tokenizer=None, model_config=model, dp_tp_cpu_group=None,
                            dp_tp_group=group, ps=ranks, pp_group=None)
        )  # fmt: skip

    scheduler = manager()
    backend = scheduler.grammar_backend

    def compiled(schema: str) -> Any:
        grammar, _ = backend.get_cached_or_future_value(("json", schema), False)
        return grammar.result()

    def takes(text: str) -> bool:
        grammar = first.copy()
        token_ids = grammar.llguidance_tokenizer.tokenize_str(text)
        return bool(grammar.ll_matcher.try_consume_tokens(token_ids) == len(token_ids))

    first = compiled('{"type": "object", "properties": {"a": {"type": "array"}}}')

    def why_given_up(schema: str) -> str | None:
        """While the model writes some string."""
        grammar = compiled(schema)
        for token_id in grammar.llguidance_tokenizer.tokenize_str('"' + "a banana and a bar of abacus beads " * 10):
            grammar.fill_vocab_mask(mask, 1)
            try:
                grammar.accept_token(token_id)
            except ValueError as error:
                return str(error)
        return None

    def continued(json_so_far: str, *, is_cached: bool) -> Any:
        """What must come when an answer goes on here, or why nothing may."""
        token_ids = first.llguidance_tokenizer.tokenize_str(json_so_far)
        schema = json.dumps({"type": "object", "properties": {"abc": {"const": 5}}, "required": ["abc"]})
        params = SimpleNamespace(json_schema=schema, custom_params={"num_json_tokens": len(token_ids)})
        vars(params).update(dict.fromkeys(("regex", "ebnf", "structural_tag")))
        request = SimpleNamespace(
            sampling_params=params, origin_input_ids=[7, 8, *token_ids], require_reasoning=False, grammar_wait_ct=0,
            finished=lambda: False, errors=[],
        )  # fmt: skip
        request.set_finish_with_abort = request.errors.append
        assert scheduler.process_req_with_grammar(request) != is_cached
        while not is_cached and not scheduler.get_ready_grammar_requests():
            pass
        return request.errors or request.grammar.ll_matcher.compute_ff_bytes().decode()

    def reasons() -> Iterator[str]:
        """Of requests that end: by an abort, and because their grammar does not take the next token, or the first."""
        results = SchedulerBatchResultProcessor.__new__(SchedulerBatchResultProcessor)
        brace, letter = (first.llguidance_tokenizer.tokenize_str(text)[0] for text in "{x")
        for to_finish, token_id in ((FINISH_ABORT(), brace), (None, letter)):
            request = SimpleNamespace(rid="a", grammar=first.copy(), to_finish=to_finish, finished=lambda: False)
            results._accept_grammar_tokens(request, token_id)
            yield request.to_finish.message
        request = SimpleNamespace(rid="a", grammar=first.copy(), to_finish=None, finished=lambda: False)
        results._apply_prefill_grammar(req=request, next_token_id=letter)
        yield request.to_finish.message

    mask = first.allocate_vocab_mask(49152, 2, "cpu").zero_()
    message = why_given_up('{"$ref": "#"}')
    failing_masks = [bool((row == -1).all()) for row in mask]
    for at in range(300):
        backend.set_cache(("json", f"{at}"), first)
    return {
        "without": manager("--grammar-backend", "none").grammar_backend,
        "texts": [text for text in ('{"a":[1,2]}', '{"a": [1, 2]}', '{"a":  [1]}', '{"a":\n[1]}') if takes(text)],
        "failing_masks": failing_masks,
        "continued": [continued('{"ab', is_cached=False), continued('{"a', is_cached=True)],
        "not_continued": continued("[", is_cached=True),
        "message": message,
        "reasons": list(reasons()),
        "slow_pattern": why_given_up('{"type": "string", "pattern": "(.{0,50}a.{0,50}b){1,50}"}'),
        "invalid": compiled('{"type": 5}').error_message,
        "num_cached": len(backend.cache),
        "newest_is_cached": backend.get_cached_or_future_value(("json", "299"), False)[1],
    }


def cache_events() -> dict[str, Any]:
    """What a router hears of SGLang's own publisher, which tells of 100 tokens in pages of one."""
    import msgspec
    import uvloop
    from sglang.srt.disaggregation.kv_events import (
        AllBlocksCleared,
        BlockRemoved,
        BlockStored,
        EventPublisherFactory,
        KVEventBatch,
    )

    from common.dynamo.runtime import Context
    from common.sglang.cache_events import CacheEvents, kv_events_config
    from common.sglang.engine import cache_events_of
    from tests.routers import Told

    def stored(medium: str | None, num: int = 100) -> list[Any]:
        return [BlockStored([-at - 1], -at if at else None, [at], 1, None, medium) for at in range(num)]

    steps = {
        "stored": stored("GPU"),
        "removed": [BlockRemoved([-at - 1 for at in range(40, 100)], "GPU")],
        "cleared": [*stored("CPU_PINNED"), AllBlocksCleared()],
    }
    told = Told()

    async def listen(config: str) -> dict[str, Any]:
        publisher = EventPublisherFactory.create(config)
        events = cache_events_of(config)
        assert events is not None
        await events.connect()
        found: dict[str, Any] = {"left_behind": os.listdir(tempfile.gettempdir())}
        following = asyncio.create_task(events.follow())
        async with contextlib.aclosing(events.cached.events({}, Context())) as stream:
            told.tell(7, await anext(stream))
            for name, batch in steps.items():
                publisher.publish(KVEventBatch(ts=0, events=batch))
                told.tell(7, await anext(stream))
                found[name] = told.has(7, list(range(100)))
        following.cancel()
        publisher.shutdown()
        return found

    def encoded(events: list[Any]) -> bytes:
        return msgspec.msgpack.encode(KVEventBatch(ts=0, events=events))

    async def hear_many() -> dict[str, Any]:
        """How many times others get their turn meanwhile, and what one of them hears who comes in the middle."""
        events, late = CacheEvents("ipc:///nowhere"), Told()
        hearing = asyncio.create_task(events._hear(0, encoded(stored("GPU", 8192))))
        num_turns = 0
        while not hearing.done():
            await asyncio.sleep(0)
            num_turns += 1
            if num_turns == 5:
                stream = events.cached.events({}, Context())
                late.tell(7, await anext(stream))
                began_with = late.has(7, list(range(8192)))
        while (num_heard := late.has(7, list(range(8192)))) < 512:
            late.tell(7, await anext(stream))
        return {"num_turns": num_turns, "began_with": began_with, "num_heard": num_heard}

    async def hear_all(batches: list[tuple[int, bytes]]) -> dict[str, Any]:
        """What is known in the end, and whether those who listened have been sent away."""
        events, at_end, all_heard = CacheEvents("ipc:///nowhere"), Told(), asyncio.Event()

        async def recv_multipart() -> tuple[bytes, bytes, bytes]:
            if not batches:
                all_heard.set()
                await asyncio.sleep(60)
            number, payload = batches.pop(0)
            return b"", number.to_bytes(8), payload

        events._socket = contextlib.nullcontext(SimpleNamespace(recv_multipart=recv_multipart))
        async with contextlib.aclosing(events.cached.events({}, Context())) as stream:
            await anext(stream)
            following = asyncio.create_task(events.follow())
            await all_heard.wait()
            following.cancel()
            for message in events.cached._snapshot():
                at_end.tell(7, message)
            try:
                async with asyncio.timeout(1):
                    async for _ in stream:
                        pass
                is_over = True
            except TimeoutError:
                is_over = False
        return {"known": [at_end.has(7, list(range(at, at + 100))) for at in (0, 500)], "is_over": is_over}

    again = [BlockStored([-at - 501], -at - 500 if at else None, [500 + at], 1, None, "GPU") for at in range(100)]
    elsewhere = '{"publisher": "zmq", "endpoint": "tcp://127.0.0.1:5557"}'
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        found = uvloop.run(asyncio.wait_for(listen(kv_events_config()), 240))
        tempfile.tempdir = None
    return found | {
        "served_elsewhere": cache_events_of(elsewhere) is not None,
        "many": uvloop.run(hear_many()),
        "whole": uvloop.run(hear_all([(3, encoded(stored("GPU"))), (4, encoded(again))])),
        "gap": uvloop.run(hear_all([(3, encoded(stored("GPU"))), (5, encoded(again))])),
        "garbage": uvloop.run(hear_all([(3, encoded(stored("GPU"))), (4, b"?"), (5, encoded(again))])),
    }


def activated() -> dict[str, str | None]:
    from unittest.mock import patch

    from common.sglang.cpu_platform import activate

    found = {"no accelerator": activate()}
    with patch("torch.cuda.is_available", return_value=True):
        found["cuda"] = activate()
    with patch("torch.accelerator.is_available", return_value=True):
        found["another accelerator"] = activate()
    with patch.dict(os.environ, SGLANG_USE_CPU_ENGINE="1"):
        found["SGLang's CPU engine"] = activate()
    return found


if __name__ == "__main__":
    print("\n" + json.dumps(answer(sys.argv[1])))
