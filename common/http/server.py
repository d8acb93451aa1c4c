"""uvicorn inside a Dynamo worker: one event loop, one owner of the signals."""

import asyncio
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from common.arguments import FrontendArgs
from common.dynamo.runtime import DRAIN_TIMEOUT_S, DistributedRuntime
from common.http.app import ChatRoute, create_app
from common.http.app import Pipeline as Pipeline
from common.http.protocol import limit_unread, protocol_with

_BACKLOG = 2048


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they belong to the worker


def _listen(host: str, port: int, *, is_shared: bool) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, reuse_port=is_shared)
    except OSError as error:
        sys.exit(f"error: cannot listen on {host}:{port}: {error.strerror}. Choose another one with --port or --host.")


async def serve_http(
    chat_completions: ChatRoute, pipeline: Pipeline, runtime: DistributedRuntime, args: FrontendArgs
) -> None:
    """Serve until the worker is told to stop; then finish the requests in flight, up to DRAIN_TIMEOUT_S."""
    config = uvicorn.Config(
        create_app(chat_completions, pipeline, args, await runtime.metrics("frontend")),
        http=protocol_with(
            header_timeout_s=args.header_timeout_s,
            # The app itself answers 408 first; this is for a client that goes on sending after that.
            body_timeout_s=args.body_timeout_s + 1,
            send_timeout_s=args.send_timeout_s,
        ),
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
    listener = _listen(args.host, args.port, is_shared=args.is_port_shared)
    limit_unread(listener, args.send_timeout_s)
    try:
        await server.serve(sockets=[listener])
    finally:
        listener.close()
        await asyncio.sleep(0)
