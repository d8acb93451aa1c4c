"""The fastest that anything around SGLang could be: `sglang.Engine`, called from the process it lives in.

`python -m bench.engine_alone MODEL [SGLang's flags]` reads one load a line and writes one outcome a line, as JSON.
The prompts are those of the other peers, tokenized before the clock starts.
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

from bench.http_client import Reply
from bench.load import Load
from bench.prompts import prompt


async def _ask(engine: Any, token_ids: list[int], load: Load) -> Reply:
    reply = Reply(sent_at=time.perf_counter())
    call = {
        "input_ids": token_ids,
        "sampling_params": {"max_new_tokens": load.max_tokens, "ignore_eos": True},
        "rid": uuid.uuid4().hex,
        "stream": load.is_stream,
    }
    response = await engine.async_generate(**call)
    last = response
    if load.is_stream:
        async for item in response:
            last = item
            reply.arrivals.append(time.perf_counter())
        reply.first_content_at, reply.num_events = reply.arrivals[0], len(reply.arrivals)
    reply.num_tokens = last["meta_info"]["completion_tokens"]
    reply.finished_at = time.perf_counter()
    return reply


async def _answer(engine: Any, load: Load, prompts: list[list[int]]) -> dict[str, Any]:
    async def user(index: int) -> list[Reply]:
        return [await _ask(engine, token_ids, load) for token_ids in prompts[index :: load.num_users]]

    started_at = time.perf_counter()
    answered = await asyncio.gather(*(user(index) for index in range(load.num_users)))
    replies = [asdict(reply) for of_user in answered for reply in of_user]
    return {"started_at": started_at, "replies": replies}


async def _serve(engine: Any, tokenizer: Any, answers: int) -> None:
    def write(text: str) -> None:
        data = text.encode() + b"\n"
        while data:
            data = data[os.write(answers, data) :]

    def tokenized(index: int, num_words: int) -> list[int]:
        messages = [{"role": "user", "content": prompt(index, num_words)}]
        token_ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return token_ids

    write("ready")
    while line := await asyncio.to_thread(sys.stdin.readline):
        load = Load(**json.loads(line))
        indices = range(load.first_prompt, load.first_prompt + load.num_requests)
        prompts = [tokenized(index, load.num_prompt_words) for index in indices]
        write(json.dumps(await _answer(engine, load, prompts)))


def main() -> None:
    answers = os.dup(1)  # SGLang prints to stdout
    os.dup2(2, 1)
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    arguments = ["--model-path", sys.argv[1], "--skip-tokenizer-init", "--log-level", "warning", *sys.argv[2:]]
    server_args = ServerArgs.from_cli_args(parser.parse_args(arguments))
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    engine = Engine(server_args=server_args)
    try:
        uvloop.run(_serve(engine, tokenizer, answers))
    finally:
        engine.shutdown()


if __name__ == "__main__":
    main()
