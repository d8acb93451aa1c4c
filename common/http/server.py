"""The frontend's HTTP server: its routes around the chat, what stands before all of them, and uvicorn in a worker."""

import asyncio
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec
import uvicorn
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from fastapi.telemetry import TelemetryConfig
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request

from common.arguments import FrontendArgs
from common.dynamo.directories import ModelDirectory
from common.dynamo.runtime import Client, DistributedRuntime
from common.environment import DRAIN_TIMEOUT_S
from common.errors import MethodNotAllowed, ModelNotFound, NotFound, Unavailable
from common.http.middleware import CHAT_PATH, REQUEST_ID, ChatRoute, Gate, RequestId, error_response
from common.http.openapi import TITLE, openapi_document
from common.http.protocol import GuardedProtocol
from common.observability.metrics import Metrics
from common.observability.request_records import RequestRecords
from common.openai.responses import Models, model_of
from common.page.live_page import install_live_page

logger = logging.getLogger(__name__)

_BACKLOG = 2048
# What a client that does not read makes us keep in the kernel, at most (it doubles the number).
_SEND_BUFFER_BYTES = 128 * 1024
GET = ["GET", "HEAD"]  # a server that has GET has HEAD (RFC 9110, 9.1)
# What clients try first, and what there is instead.
_INSTEAD = {
    "/v1/completions": "Send `messages` to /v1/chat/completions: there is chat only.",
    "/v1/responses": "Use /v1/chat/completions: clients that prefer the Responses API have a setting for it.",
    "/v1/embeddings": "There are no embeddings here: ask a server that runs an embedding model.",
    "/chat/completions": "It is at /v1/chat/completions: end your client's base URL with /v1.",
}


@dataclass(frozen=True)
class Pipeline:
    """What the frontend knows of the processes behind it. `engine_client`: only asked what there is."""

    models: ModelDirectory
    processor_client: Client
    engine_client: Client


def create_app(chat_completions: ChatRoute, pipeline: Pipeline, args: FrontendArgs, metrics: Metrics) -> FastAPI:
    """The HTTP side as an ASGI app."""
    # The spans are ours (common/observability): FastAPI need not look for each request whether it is to make some.
    telemetry: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False}
    app = FastAPI(title=TITLE, redirect_slashes=False, telemetry=telemetry)
    app.add_route(CHAT_PATH, chat_completions, methods=["POST"])  # for those who list the routes: see `Gate`
    _add_routes(app, pipeline, metrics)
    document = openapi_document(is_key_required=bool(args.api_keys), is_page_served=args.is_page_served)
    app.openapi = lambda: document  # type: ignore[method-assign]  # FastAPI's own way to replace it
    if args.is_page_served:
        install_live_page(app, pipeline.models, pipeline.engine_client)
    app.add_middleware(Gate, respond=chat_completions, args=args)
    if args.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=args.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=[REQUEST_ID],
        )  # fmt: skip
    app.add_middleware(RequestId, records=RequestRecords(metrics), is_path_shown=args.is_page_served)  # the outermost
    return app


def json_response(message: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(message), media_type="application/json")


def _add_routes(app: FastAPI, pipeline: Pipeline, metrics: Metrics) -> None:
    @app.api_route("/v1/models", methods=GET)
    async def list_models() -> Response:
        known = await pipeline.models.models()
        return json_response(Models(data=[model_of(name, served) for name, served in known.items()]))

    @app.api_route("/v1/models/{model:path}", methods=GET)
    async def retrieve_model(model: str) -> Response:
        known = await pipeline.models.models()
        if model not in known:
            raise ModelNotFound(f"The model '{model}' does not exist.", param="model")
        return json_response(model_of(model, known[model]))

    @app.api_route("/health", methods=GET)
    async def health() -> JSONResponse:
        """Alive: this process answers."""
        return JSONResponse({"status": "ok"})

    @app.api_route("/ready", methods=GET)
    async def ready() -> JSONResponse:
        """Ready: a processor and an engine are registered, so that a chat request will be answered."""
        instances = {
            "processors": len(await pipeline.processor_client.instance_ids()),
            "engines": len(await pipeline.engine_client.instance_ids()),
        }
        if missing := " and ".join(name for name, count in instances.items() if not count):
            raise Unavailable(f"Waiting for {missing}.")
        return JSONResponse({"status": "ready"} | instances)

    @app.api_route("/metrics", methods=GET)
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(404)
    async def nothing_there(request: Request, _: HTTPException) -> Response:
        path = request.url.path
        message = f"There is nothing at {path}. {_INSTEAD.get(path.rstrip('/'), '')}".rstrip()
        return error_response(request.scope, NotFound(message))

    @app.exception_handler(405)
    async def not_allowed(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} is not allowed here."
        return error_response(request.scope, MethodNotAllowed(message), dict(error.headers or {}))


class _Server(uvicorn.Server):
    """On the worker's event loop, of which the signals are the worker's, too."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listen(args: FrontendArgs) -> socket.socket:
    address = args.host, args.port
    try:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server(address, family=family, backlog=_BACKLOG, reuse_port=args.is_port_shared)
    except OSError as error:
        where = f"{args.host}:{args.port}: {error.strerror}"
        sys.exit(f"error: cannot listen on {where}. Choose another one with --port or --host.")
    # For all of its connections: how much may lie unread in the kernel, and for how long after we closed.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(args.send_timeout_s * 1000))
    return listener


async def serve_http(
    chat_completions: ChatRoute, pipeline: Pipeline, runtime: DistributedRuntime, args: FrontendArgs
) -> None:
    """Serve until the worker is told to stop; then finish the requests in flight, up to DRAIN_TIMEOUT_S."""

    class Protocol(GuardedProtocol):
        deadlines = args

    config = uvicorn.Config(
        create_app(chat_completions, pipeline, args, await runtime.metrics("frontend")),
        http=Protocol,
        loop="none",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=int(DRAIN_TIMEOUT_S),
    )
    server = _Server(config)

    async def stop_with_worker() -> None:
        await runtime.is_stopping.wait()
        server.should_exit = True

    runtime.run_in_background(stop_with_worker())
    with _listen(args) as listener:
        logger.info("serving http://%s:%d", args.host, args.port)
        await server.serve(sockets=[listener])
    await asyncio.sleep(0)
