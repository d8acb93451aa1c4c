"""The frontend: HTTP to NATS, and nothing else.

    client --(HTTP)--> frontend --(NATS)--> processor.process

It serves no endpoint of its own; it only has clients. An OpenAI chat request comes in, goes to a processor as it
is, and the processor's chunks become one JSON answer or a stream of server-sent events.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

import uvloop
from fastapi import Request
from fastapi.responses import Response

from common.arguments import FrontendArgs, parse_frontend_args
from common.dynamo.directories import ProcessorClient
from common.dynamo.failover import CallLimits, RequestContext
from common.dynamo.runtime import Context, DistributedRuntime, configure_dynamo_logging, dynamo_worker
from common.http.chat import Answer, AnswerStream, EventStream, read_chat_request
from common.http.server import Pipeline, serve_http
from common.openai.request import ChatCompletionRequest


class RequestHandler:
    """Turns HTTP requests into calls of a processor, and what comes back into HTTP."""

    def __init__(self, processor_client: ProcessorClient, args: FrontendArgs) -> None:
        self.processor_client, self.models = processor_client, processor_client.directory
        self.args = args

    async def chat_completions(self, http_request: Request) -> Response:
        request = await read_chat_request(http_request, self.args)
        await self.models.check(request.model)
        context = RequestContext(Context(), http_request.state.record)
        context.record.asks(request)
        if not request.stream:
            return await self._answer(request, context)
        events = self._events(request, context)
        # An error before the first event still gets a status of its own.
        return EventStream(await anext(events), events, context.record)

    async def _answer(self, request: ChatCompletionRequest, context: RequestContext) -> Response:
        """All chunks as one JSON answer."""
        answer = Answer(request, context.record)
        response_stream = await self.processor_client.generate(
            request.as_sent, context=context, on_restart=answer.restart
        )
        async with aclosing(response_stream):
            async for chunk in response_stream:
                data = chunk.data()
                answer.add(data)
        return Response(answer.to_json(), media_type="application/json")

    async def _events(self, request: ChatCompletionRequest, context: RequestContext) -> AsyncGenerator[bytes, None]:
        """Each chunk as server-sent events."""
        answer = AnswerStream(request, context.record)
        response_stream = await self.processor_client.generate(request.as_sent, context=context)
        async with aclosing(response_stream):
            async for chunk in response_stream:
                data = chunk.data()
                yield answer.events(data)
        yield answer.end()


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime, args: FrontendArgs) -> None:
    namespace = runtime.namespace("inference")
    client = await namespace.component("processor").endpoint("process").client()
    engine_client = await namespace.component("engine").endpoint("generate").client()
    # Calls another processor when one fails.
    limits = CallLimits(wait_s=args.processor_wait_s, answer_s=args.request_timeout_s)
    processor_client = ProcessorClient(client, await runtime.metrics("frontend"), limits)
    handler = RequestHandler(processor_client, args)
    pipeline = Pipeline(processor_client.directory, client, engine_client)
    await serve_http(handler.chat_completions, pipeline, runtime, args)


if __name__ == "__main__":
    configure_dynamo_logging()
    uvloop.run(worker(parse_frontend_args()))
