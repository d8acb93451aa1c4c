"""The fastest that anything around SGLang could be: `sglang.Engine`, called from the process it lives in.

It takes SGLang's flags, reads one load a line and writes one outcome a line, as JSON. The prompts are those of the
other peers, tokenized before the clock starts.
"""

import argparse
import asyncio
import json
import os
import sys
import time
import uuid
from dataclasses import asdict
from typing import Any

import uvloop

from bench.client import Load, Outcome, Reply


async def _ask(engine: Any, token_ids: list[int], load: Load) -> Reply:
    reply = Reply(sent_at=time.perf_counter())
    params = {"max_new_tokens": load.max_tokens, "ignore_eos": True}
    item = response = await engine.async_generate(
        input_ids=token_ids, sampling_params=params, rid=uuid.uuid4().hex, stream=load.is_stream
    )
    if load.is_stream:
        async for each in response:
            item = each
            reply.arrivals.append(time.perf_counter())
        reply.first_content_at = reply.arrivals[0]
    reply.num_tokens = item["meta_info"]["completion_tokens"]
    reply.finished_at = time.perf_counter()
    return reply


async def _answer(engine: Any, load: Load, prompts: list[list[int]]) -> Outcome:
    async def user(index: int) -> list[Reply]:
        return [await _ask(engine, token_ids, load) for token_ids in prompts[index :: load.num_users]]

    started_at = time.perf_counter()
    answered = await asyncio.gather(*(user(index) for index in range(load.num_users)))
    return Outcome([reply for replies in answered for reply in replies], time.perf_counter() - started_at)


async def _serve(engine: Any, tokenizer: Any, answers: int) -> None:
    def write(text: str) -> None:
        data = text.encode() + b"\n"
        while data:
            data = data[os.write(answers, data) :]

    write("ready")
    while line := await asyncio.to_thread(sys.stdin.readline):
        load = Load(**json.loads(line))
        chats = [[{"role": "user", "content": text}] for text in load.prompts]
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
        write(json.dumps(asdict(await _answer(engine, load, prompts))))


def main() -> None:
    answers = os.dup(1)  # SGLang prints to stdout
    os.dup2(2, 1)
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args(["--skip-tokenizer-init", "--log-level", "warning", *sys.argv[1:]])
    engine = Engine(server_args=ServerArgs.from_cli_args(args))
    try:
        uvloop.run(_serve(engine, AutoTokenizer.from_pretrained(args.model_path), answers))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
