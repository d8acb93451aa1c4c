"""uvicorn inside a Dynamo worker: one event loop, one owner of the signals."""

import asyncio
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from common.dynamo.runtime import DRAIN_TIMEOUT_S, DistributedRuntime
from common.http.deadlines import limit_unread, protocol_with

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
    app: Any,
    runtime: DistributedRuntime,
    *,
    host: str,
    port: int,
    is_port_shared: bool,
    header_timeout_s: float,
    body_timeout_s: float,
    send_timeout_s: float,
) -> None:
    """Serve until the worker is told to stop; then finish the requests in flight, up to DRAIN_TIMEOUT_S."""
    config = uvicorn.Config(
        app,
        http=protocol_with(
            header_timeout_s=header_timeout_s,
            # The app itself answers 408 first; this is for a client that goes on sending after that.
            body_timeout_s=body_timeout_s + 1,
            send_timeout_s=send_timeout_s,
        ),
        loop="none",
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
    listener = _listen(host, port, is_shared=is_port_shared)
    limit_unread(listener, send_timeout_s)
    try:
        await server.serve(sockets=[listener])
    finally:
        listener.close()
        await asyncio.sleep(0)
