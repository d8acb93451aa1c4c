"""The processor: text to token ids, and back.

    frontend --(NATS)--> processor.process --(NATS)--> engine.generate

It serves `inference/processor/process`. For each request it renders and tokenizes the messages, calls an engine
for each choice, and turns the token ids that come back into text: as one chunk, or piece by piece for a stream.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import uvloop

from common.arguments import ProcessorArgs, parse_processor_args
from common.dynamo.directories import EngineClient
from common.dynamo.runtime import DistributedRuntime, configure_dynamo_logging, dynamo_worker
from common.dynamo.service import RequestContext, service
from common.openai.request import ChatCompletionRequest
from common.routing.ask_router import AskRouter
from common.text.chat_tokenizer import ChatTokenizer
from common.text.choice import Choice, merged, usage_of
from common.wire import ProcessorChunk, ProcessorDescription


class RequestHandler:
    """Answers `process` requests for one model, with the help of any engine that runs it."""

    def __init__(
        self, engine_client: EngineClient, tokenizer: ChatTokenizer, description: ProcessorDescription
    ) -> None:
        self.engine_client, self.engines = engine_client, engine_client.directory
        self.tokenizer = tokenizer
        self.description = description

    async def describe(self) -> ProcessorDescription:
        """As long a context as fits into each engine that is there now."""
        self.description.context_length = (await self.engines.limits()).context_length
        return self.description

    async def process(
        self, request: ChatCompletionRequest, context: RequestContext
    ) -> AsyncGenerator[ProcessorChunk, None]:
        """Yields text as it becomes final; the last chunk has the finish_reason and the usage."""
        self.description.check(request.model)
        await self.tokenizer.check(request)
        await self.engines.check(request)
        limits = await self.engines.limits()
        token_ids = await self.tokenizer.encode_chat(request, limits)
        context.record.num_prompt_tokens = len(token_ids)
        max_tokens = limits.answer_budget(len(token_ids), request.num_tokens_asked)
        choices = [Choice(self.tokenizer, request, token_ids, index, max_tokens) for index in range(request.n)]
        answers = [self._answer(choice, context) for choice in choices]
        num_unfinished = request.n
        with request.naming_own_fields():
            async with aclosing(merged(answers)) as chunks:
                async for chunk in chunks:
                    num_unfinished -= chunk.finish_reason is not None
                    if not num_unfinished or request.is_usage_continuous:  # the last chunk of all, or each
                        chunk.usage = usage_of(len(token_ids), choices)
                    yield chunk

    async def _answer(self, choice: Choice, context: RequestContext) -> AsyncGenerator[ProcessorChunk, None]:
        """One of the `n` answers: an engine call of its own, and the text that comes of it."""
        response_stream = await self.engine_client.generate(choice.engine_request, context=context)
        async with aclosing(response_stream):
            async for chunk in response_stream:
                data = chunk.data()
                if (piece := choice.push(data)) is not None:
                    yield piece
                if choice.is_finished and data.finish_reason is None:  # a stop string: leaving stops the engine
                    return


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime, args: ProcessorArgs, tokenizer: ChatTokenizer) -> None:
    client = await runtime.namespace("inference").component("engine").endpoint("generate").client()
    router_client = await runtime.namespace("inference").component("router").endpoint("find_worker").client()
    # Calls another engine when one fails, which goes on where the first one broke.
    engine_client = EngineClient(client, tokenizer.model, await runtime.metrics("processor"), args.engine_wait_s)
    engine_client.choose = AskRouter(router_client)  # which engine, where there is a router

    component = runtime.namespace("inference").component("processor")
    await component.create_service()
    description = ProcessorDescription(args.model_names, created=int(time.time()), root=args.model)
    handler = RequestHandler(engine_client, tokenizer, description)
    await component.endpoint("process").serve_endpoint(service(handler.process, description=handler.describe))


if __name__ == "__main__":
    configure_dynamo_logging()
    processor_args = parse_processor_args()
    chat_tokenizer = ChatTokenizer.load(processor_args.model, processor_args.parsing)
    uvloop.run(worker(processor_args, chat_tokenizer))
