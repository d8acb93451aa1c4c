"""The engine: token ids in, new token ids out.

    processor --(NATS)--> engine.generate --> SGLang

It serves `inference/engine/generate` and knows nothing about text. SGLang runs inside this process and in children
of it; each request becomes one call of `async_generate`, and whoever stops waiting aborts that call.
"""

import sys
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import uvloop

from common.dynamo.cancellation import when_stopped
from common.dynamo.runtime import Context, DistributedRuntime, configure_dynamo_logging, dynamo_worker
from common.errors import InvalidRequest, answers_errors
from common.observability.metrics import Metrics
from common.observability.request_path import RequestPath, with_path
from common.observability.request_records import RequestRecords
from common.sampling import sglang_sampling_params
from common.sglang.engine import SGLangEngine
from common.sglang.engine_args import parse_engine_args
from common.sglang.output import Output
from common.wire import EngineChunk, read_engine_request, take_origin, to_wire


class RequestHandler:
    """Answers `generate` requests with SGLang."""

    def __init__(self, engine: SGLangEngine, records: RequestRecords) -> None:
        self.engine = engine
        self.records = records

    @answers_errors
    async def generate(self, request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        """Yields `{"token_ids": [new ids]}` as they come; the last dict has the finish_reason."""
        if request.get("describe"):
            yield {**to_wire(self.engine.description), "finish_reason": "stop"}
            return
        rid = uuid.uuid4().hex  # SGLang's own id: unique, and never the prefix of another one
        num_output_tokens_so_far = 0
        with self.records.begin(take_origin(request)) as record, when_stopped(context, lambda: self.engine.abort(rid)):
            record.path = RequestPath.asked_by_caller(request)
            engine_request = read_engine_request(request)
            if engine_request.sampling_options.seed is not None and not self.engine.description.is_seed_supported:
                raise InvalidRequest("This engine cannot hold to a seed.", param="seed")
            record.num_prompt_tokens = len(engine_request.token_ids)
            record.is_streamed = engine_request.output_options.stream
            outputs = self.engine.generate(
                engine_request.token_ids,
                sglang_sampling_params(engine_request),
                rid=rid,
                output_options=engine_request.output_options,
            )
            async with aclosing(outputs):  # leaving it early aborts the request
                async for output in outputs:
                    chunk = new_tokens(output, num_output_tokens_so_far)
                    num_output_tokens_so_far = len(output["output_ids"])
                    record.add_tokens(len(chunk.token_ids))
                    if context.is_stopped():
                        break
                    if chunk.finish_reason is not None:
                        record.finish(chunk.finish_reason, queue_time_s=output["meta_info"].get("queue_time"))
                    yield with_path(to_wire(chunk), record.path)


def new_tokens(output: Output, num_output_tokens_so_far: int) -> EngineChunk:
    """What SGLang's item adds: it repeats all tokens of the answer each time, the new ones last."""
    meta_info = output["meta_info"]
    finish_reason = meta_info["finish_reason"]
    chunk = EngineChunk(
        token_ids=output["output_ids"][num_output_tokens_so_far:],
        finish_reason=finish_reason["type"] if finish_reason else None,
    )
    if (logprobs := meta_info.get("output_token_logprobs")) is not None:
        chunk.log_probs = [logprob for logprob, _, _ in logprobs[num_output_tokens_so_far:]]
    if top_logprobs := meta_info.get("output_top_logprobs"):
        chunk.top_logprobs = [
            [(token_id, logprob) for logprob, token_id, _ in best or ()]
            for best in top_logprobs[num_output_tokens_so_far:]
        ]
    return chunk


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime, engine: SGLangEngine) -> None:
    engine.leave_signals_to(runtime.request_stop)
    metrics = Metrics("engine")
    await runtime.expose_metrics(metrics.text)
    component = runtime.namespace("inference").component("engine")
    await component.create_service()
    handler = RequestHandler(engine, RequestRecords(metrics))
    await component.endpoint("generate").serve_endpoint(handler.generate)


if __name__ == "__main__":
    configure_dynamo_logging()
    with SGLangEngine(parse_engine_args(sys.argv[1:])) as sglang_engine:
        uvloop.run(worker(sglang_engine))
