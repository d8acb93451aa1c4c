"""The frontend: HTTP to NATS, and nothing else.

    client --(HTTP)--> frontend --(NATS)--> processor.process

It serves no endpoint of its own; it only has clients. An OpenAI chat request comes in, goes to a processor as it
is, and the processor's dicts become one JSON answer or a stream of server-sent events.
"""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import uvloop
from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse

from common.deadline import before
from common.dynamo.failover import FailoverClient
from common.dynamo.model_directory import ModelDirectory
from common.dynamo.runtime import Client, Context, DistributedRuntime, configure_dynamo_logging, dynamo_worker
from common.errors import BadUpstream, DeadlineExceeded, InternalError, ModelNotFound, PipelineError, Unavailable
from common.http.admission import ApiKeys, ConcurrencyLimit
from common.http.body import read_json
from common.http.disconnect import unless_disconnected
from common.http.errors import install_error_handlers
from common.http.frontend_args import FrontendArgs, parse_frontend_args
from common.http.live_page import install_live_page
from common.http.request_id import HEADER, RequestId
from common.http.server import serve_http
from common.observability.metrics import CONTENT_TYPE as METRICS_TYPE
from common.observability.metrics import Metrics
from common.observability.request_path import RequestPath
from common.observability.request_records import RequestRecord, RequestRecords
from common.openai.openapi import install_openapi
from common.openai.request import ChatCompletionRequest, parse_chat_request
from common.openai.responses import Answer, AnswerStream, models_json, sse
from common.wire import ProcessorChunk, put_origin, read_processor_chunk

logger = logging.getLogger("frontend")

GET = ["GET", "HEAD"]  # a server that has GET has HEAD (RFC 9110, 9.1)
MAX_ANSWER_CHARACTERS = 2**24  # no model of today writes that much in one answer
_STREAM_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class RequestHandler:
    """Turns HTTP requests into calls of a processor, and what comes back into HTTP."""

    def __init__(self, processor: FailoverClient, models: ModelDirectory, args: FrontendArgs) -> None:
        self.processor = processor
        self.models = models
        self.args = args

    async def chat_completions(self, request: Request) -> Response:
        record: RequestRecord = request.state.record
        if self.args.is_page_served:
            record.path = RequestPath.asked_by_client(request.headers)
        body = await read_json(request, max_bytes=self.args.max_body_bytes, timeout_s=self.args.body_timeout_s)
        chat = parse_chat_request(body)
        if await self.models.knows_all() and chat.model not in await self.models.models():
            raise ModelNotFound(f"The model '{chat.model}' does not exist.", param="model")
        record.model, record.is_streamed = chat.model, chat.stream
        put_origin(body, record.origin)
        chat_id = f"chatcmpl-{uuid.uuid4().hex}"
        if not chat.stream:
            return await unless_disconnected(request, self._whole_answer(chat, chat_id, body, record))
        response_stream = self._processor_chunks(chat, chat_id, body, record)
        # An error before the first chunk still gets a status of its own.
        first = await unless_disconnected(request, anext(response_stream))
        events = AnswerStream(chat_id, chat.model, is_usage_wanted=chat.is_usage_wanted, path=record.path)
        return EventSourceResponse(self._events(events, first, response_stream, record), headers=_STREAM_HEADERS)

    async def _whole_answer(
        self, chat: ChatCompletionRequest, chat_id: str, body: dict[str, Any], record: RequestRecord
    ) -> Response:
        answer = Answer(chat_id, chat.model, chat.n, path=record.path)
        async with aclosing(self._processor_chunks(chat, chat_id, body, record, answer)) as response_stream:
            async for chunk in response_stream:
                answer.add(chunk)
        return Response(answer.to_json(), media_type="application/json")

    async def _events(
        self,
        events: AnswerStream,
        first: ProcessorChunk,
        response_stream: AsyncGenerator[ProcessorChunk, None],
        record: RequestRecord,
    ) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(response_stream):
                yield events.events(first)
                async for chunk in response_stream:
                    yield events.events(chunk)
            yield events.end()
        except Exception as error:
            if not isinstance(error, PipelineError):
                logger.exception("a stream broke")
                error = InternalError("The server had an error while processing your request.")
            record.outcome = error.outcome
            yield sse(error.to_wire())

    async def _processor_chunks(
        self,
        chat: ChatCompletionRequest,
        chat_id: str,
        body: dict[str, Any],
        record: RequestRecord,
        answer: Answer | None = None,
    ) -> AsyncGenerator[ProcessorChunk, None]:
        """A processor's chunks for one request, until the last one, the deadline, or until nobody listens."""
        deadline = asyncio.get_running_loop().time() + self.args.request_timeout_s
        response_stream = self.processor.generate(
            body,
            context=Context(chat_id),
            among=lambda: self.models.instances_for(chat.model),
            start_over=answer.start_over if answer else None,
            path=record.path,
        )
        num_characters = 0
        try:
            async with aclosing(response_stream):
                async for chunk in before(deadline, response_stream):
                    data = read_processor_chunk(chunk.data())
                    if data.index >= chat.n:
                        raise BadUpstream("The processor answered a choice that nobody asked for.")
                    num_characters += len(data.content)
                    if num_characters > MAX_ANSWER_CHARACTERS:
                        raise BadUpstream("The processor's answer does not end.")
                    record.add_text(data, chat.n)
                    yield data
            record.finish()
        except TimeoutError:
            raise DeadlineExceeded(f"The answer took longer than {self.args.request_timeout_s:g} seconds.") from None


def create_app(processor_client: Client, engine_client: Client, args: FrontendArgs, metrics: Metrics) -> FastAPI:
    """The HTTP side as an ASGI app. `engine_client` is only asked whether an engine is there."""
    models = ModelDirectory(processor_client)
    processor = FailoverClient(processor_client, metrics.calls_of(processor_client), wait_s=args.processor_wait_s)
    handler = RequestHandler(processor, models, args)
    app = FastAPI(title="Chat completions on Dynamo", redirect_slashes=False)
    app.add_route("/v1/chat/completions", handler.chat_completions, methods=["POST"])
    install_error_handlers(app)
    install_openapi(app, is_key_required=bool(args.api_keys), is_page_served=args.is_page_served)
    if args.is_page_served:
        install_live_page(app, models, engine_client)

    @app.api_route("/v1/models", methods=GET)
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": models_json((await models.models()).items())})

    @app.api_route("/v1/models/{model:path}", methods=GET)
    async def retrieve_model(model: str) -> JSONResponse:
        known = await models.models()
        if model not in known:
            raise ModelNotFound(f"The model '{model}' does not exist.", param="model")
        return JSONResponse(models_json([(model, known[model])])[0])

    @app.api_route("/health", methods=GET)
    async def health() -> JSONResponse:
        """Alive: this process answers."""
        return JSONResponse({"status": "ok"})

    @app.api_route("/ready", methods=GET)
    async def ready() -> JSONResponse:
        """Ready: a processor and an engine are registered, so that a chat request will be answered."""
        instances = {
            "processors": len(await processor_client.instance_ids()),
            "engines": len(await engine_client.instance_ids()),
        }
        if missing := " and ".join(name for name, count in instances.items() if not count):
            raise Unavailable(f"Waiting for {missing}.")
        return JSONResponse({"status": "ready"} | instances)

    @app.api_route("/metrics", methods=GET)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=METRICS_TYPE)

    app.add_middleware(ConcurrencyLimit, limit=args.max_concurrency)
    app.add_middleware(ApiKeys, keys=args.api_keys)
    if args.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=args.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=[HEADER],
        )  # fmt: skip
    app.add_middleware(RequestId, records=RequestRecords(metrics))
    return app


@dynamo_worker(static=False)
async def worker(runtime: DistributedRuntime, args: FrontendArgs) -> None:
    namespace = runtime.namespace("inference")
    processor_client = await namespace.component("processor").endpoint("process").client()
    engine_client = await namespace.component("engine").endpoint("generate").client()
    metrics = Metrics("frontend")
    await runtime.expose_metrics(metrics.text)
    app = create_app(processor_client, engine_client, args, metrics)
    await serve_http(
        app,
        runtime,
        host=args.host,
        port=args.port,
        is_port_shared=args.is_port_shared,
        header_timeout_s=args.header_timeout_s,
        body_timeout_s=args.body_timeout_s,
        send_timeout_s=args.send_timeout_s,
    )


if __name__ == "__main__":
    configure_dynamo_logging()
    uvloop.run(worker(parse_frontend_args()))
