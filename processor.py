"""The processor: text to token ids, and back.

    frontend --(NATS)--> processor.process --(NATS)--> engine.generate

It serves `inference/processor/process`. For each request it renders and tokenizes the messages, calls an engine
for each choice, and turns the token ids that come back into text: once at the end, or piece by piece for a stream.
"""

import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import uvloop

from common.dynamo.engine_directory import EngineDirectory
from common.dynamo.failover import FailoverClient
from common.dynamo.runtime import Context, DistributedRuntime, configure_dynamo_logging, dynamo_worker
from common.errors import BadUpstream, ModelNotFound, answers_errors
from common.merge import interleaved
from common.observability.metrics import Metrics
from common.observability.request_path import RequestPath, with_path
from common.observability.request_records import RequestRecord, RequestRecords
from common.openai.request import ChatCompletionRequest, parse_chat_request
from common.sampling import check_logit_bias, engine_request, remaining_request
from common.text.chat_tokenizer import ChatTokenizer
from common.text.detokenizer import detokenize
from common.text.generated_text import GeneratedText
from common.text.logprobs import logprob_entries
from common.text.processor_args import ProcessorArgs, parse_processor_args
from common.wire import (
    EngineChunk,
    EngineRequest,
    LogprobEntry,
    ProcessorChunk,
    ProcessorDescription,
    Usage,
    read_engine_chunk,
    take_origin,
    to_wire,
)


class RequestHandler:
    """Answers `process` requests for one model, with the help of any engine that runs it."""

    def __init__(
        self,
        engine: FailoverClient,
        engines: EngineDirectory,
        tokenizer: ChatTokenizer,
        records: RequestRecords,
        *,
        model_names: list[str],
    ) -> None:
        self.engine, self.engines = engine, engines
        self.tokenizer = tokenizer
        self.records = records
        self.description = ProcessorDescription(models=model_names, created=int(time.time()))

    @answers_errors
    async def process(self, request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
        """Yields text as `{"content": ...}`, and at last `{"finish_reason": ..., "usage": ...}`."""
        if request.get("describe"):
            yield {**to_wire(self.description), "finish_reason": "stop"}
            return
        with self.records.begin(take_origin(request)) as record:
            record.path = RequestPath.asked_by_caller(request)
            chat = parse_chat_request(request)
            record.model, record.is_streamed = chat.model, chat.stream
            if chat.model not in self.description.models:
                raise ModelNotFound(f"The model '{chat.model}' does not exist.", param="model")
            check_logit_bias(chat, self.tokenizer.vocab_size)
            self.tokenizer.context_length = await self.engines.context_length()
            token_ids = await self.tokenizer.encode_chat(chat.messages)
            record.num_prompt_tokens = len(token_ids)
            choices = self._choices(chat, token_ids, record)
            num_unfinished = len(choices)
            async with aclosing(interleaved([choice.chunks(context) for choice in choices])) as chunks:
                async for chunk in chunks:
                    num_unfinished -= chunk.finish_reason is not None
                    if not num_unfinished:  # the last chunk of all
                        num_tokens = sum(choice.num_tokens for choice in choices)
                        chunk.usage = Usage(len(token_ids), num_tokens, len(token_ids) + num_tokens)
                        record.finish(chunk.finish_reason)
                    yield with_path(to_wire(chunk), record.path)

    def _choices(self, chat: ChatCompletionRequest, token_ids: list[int], record: RequestRecord) -> "list[Choice]":
        max_tokens = self.tokenizer.answer_budget(len(token_ids), chat.num_tokens_asked)
        defaults = self.tokenizer.sampling_defaults
        return [
            Choice(
                self.engine,
                self.tokenizer,
                chat,
                index,
                engine_request(
                    chat,
                    token_ids,
                    index=index,
                    max_tokens=max_tokens,
                    defaults=defaults,
                    origin=record.origin,
                ),
                record,
            )
            for index in range(chat.n)
        ]


class Choice:
    """One of the `n` answers to a request: an engine call of its own, and the text that comes of it.

    num_tokens: tokens generated so far; after a stop string, up to the token that completed it.
    """

    def __init__(
        self,
        engine: FailoverClient,
        tokenizer: ChatTokenizer,
        chat: ChatCompletionRequest,
        index: int,
        request: EngineRequest,
        record: RequestRecord,
    ) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.chat, self.index, self.request, self.record = chat, index, request, record
        self.num_tokens = 0

    async def chunks(self, context: Context) -> AsyncGenerator[ProcessorChunk, None]:
        """Text as it becomes final, or in one piece where nobody streams; the last chunk has the finish_reason."""
        async with aclosing(self._engine_chunks(context)) as engine_response:
            if not self.chat.stream and not self.chat.stop_strings:
                yield await self._accumulated(engine_response)
                return
            async for piece in self._pieces(engine_response):
                yield piece

    async def _engine_chunks(self, context: Context) -> AsyncGenerator[EngineChunk, None]:
        budget = self.request.stop_conditions.max_tokens or sys.maxsize
        response = self.engine.generate(to_wire(self.request), context=context, path=self.record.path)
        async with aclosing(response) as engine_response:
            async for chunk in engine_response:
                data = read_engine_chunk(chunk.data())
                budget -= len(data.token_ids)
                if budget < 0:
                    raise BadUpstream("The engine sent more tokens than it was asked for.")
                self.record.add_tokens(len(data.token_ids), self.index)
                yield data

    async def _accumulated(self, engine_response: AsyncGenerator[EngineChunk, None]) -> ProcessorChunk:
        """All tokens first, then one detokenization."""
        token_ids: list[int] = []
        whole = ProcessorChunk(index=self.index)
        async for data in engine_response:
            token_ids += data.token_ids
            whole.logprobs = self._with_logprobs(whole.logprobs, data, len(data.token_ids))
            whole.finish_reason = data.finish_reason
        self.num_tokens = len(token_ids)
        whole.content = detokenize(self.tokenizer.backend, token_ids)
        return whole

    async def _pieces(self, engine_response: AsyncGenerator[EngineChunk, None]) -> AsyncGenerator[ProcessorChunk, None]:
        """The text that each chunk makes final."""
        text = GeneratedText(self.tokenizer.backend, stop=self.chat.stop_strings)
        async for data in engine_response:
            piece = ProcessorChunk(index=self.index, content=text.push(data.token_ids))
            piece.logprobs = self._with_logprobs(None, data, text.num_tokens - self.num_tokens)
            self.num_tokens = text.num_tokens
            if text.stopped is not None:
                piece.finish_reason = "stop"
            elif data.finish_reason is not None:
                piece.content += text.finish()
                piece.finish_reason = data.finish_reason if text.stopped is None else "stop"
            if piece.content or piece.logprobs or piece.finish_reason:
                yield piece
            if text.stopped is not None:
                return  # leaving the engine's stream stops the engine

    def _with_logprobs(
        self, so_far: list[LogprobEntry] | None, data: EngineChunk, num_tokens: int
    ) -> list[LogprobEntry] | None:
        if self.chat.num_top_logprobs is None:
            return None
        entries = logprob_entries(
            data, num_tokens, self.chat.num_top_logprobs, self.tokenizer.token_bytes, self.tokenizer.hidden_ids
        )
        return so_far if entries is None else (so_far or []) + entries


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime, args: ProcessorArgs, tokenizer: ChatTokenizer) -> None:
    engine_client = await runtime.namespace("inference").component("engine").endpoint("generate").client()
    metrics = Metrics("processor")
    await runtime.expose_metrics(metrics.text)
    engines = EngineDirectory(engine_client, tokenizer.model)
    engine = FailoverClient(
        engine_client,
        metrics.calls_of(engine_client),
        resume=remaining_request,
        wait_s=args.engine_wait_s,
        among=engines.fitting,
        misfit=f"Those that run have another tokenizer than {tokenizer.model.model}, or have not said which.",
    )

    component = runtime.namespace("inference").component("processor")
    await component.create_service()
    handler = RequestHandler(engine, engines, tokenizer, RequestRecords(metrics), model_names=args.model_names)
    await component.endpoint("process").serve_endpoint(handler.process)


if __name__ == "__main__":
    configure_dynamo_logging()
    processor_args = parse_processor_args()
    uvloop.run(worker(processor_args, ChatTokenizer.load(processor_args.model)))
