"""Where etcd and NATS are, and waiting until they accept connections.

The runtime's constructor blocks, and its errors speak of gRPC; a look at the port first costs a millisecond and
lets us say what we wait for.
"""

import asyncio
import logging
import os
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 2.0
_POLL_S = 0.5


class Server(NamedTuple):
    """A server that the pipeline needs. Any one of `addresses` will do."""

    name: str
    variable: str
    addresses: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        where = ", ".join(f"{host}:{port}" for host, port in self.addresses)
        return f"{self.name} at {where} ({self.variable})"


class ServersMissing(Exception):
    """A needed server did not accept a connection in time, or refused us."""


def _urls(variable: str, default: str) -> list[str]:
    """The variable's URLs, one or several with commas between; each with a scheme."""
    scheme = urlsplit(default).scheme
    urls = (url.strip() for url in (os.environ.get(variable) or default).split(","))
    return [url if "//" in url else f"{scheme}://{url}" for url in urls if url]


def etcd_urls() -> list[str]:
    return _urls("ETCD_ENDPOINTS", "http://localhost:2379")


def nats_urls() -> list[str]:
    return _urls("NATS_SERVER", "nats://localhost:4222")


def _addresses(urls: Iterable[str], default_port: int) -> tuple[tuple[str, int], ...]:
    parsed = (urlsplit(url) for url in urls)
    return tuple((url.hostname or "localhost", url.port or default_port) for url in parsed)


def configured_servers() -> tuple[Server, ...]:
    """etcd and NATS as Dynamo's own variables name them.

    Raises:
        ServersMissing: a variable holds something that is not an address.
    """
    try:
        return (
            Server("etcd", "ETCD_ENDPOINTS", _addresses(etcd_urls(), 2379)),
            Server("NATS", "NATS_SERVER", _addresses(nats_urls(), 4222)),
        )
    except ValueError as error:  # the URL itself may hold a password
        raise ServersMissing(f"ETCD_ENDPOINTS or NATS_SERVER is not an address: {error}.") from None


async def _accepts(host: str, port: int) -> bool:
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except OSError:  # TimeoutError is one
        return False
    writer.close()
    return True


async def _is_up(server: Server) -> bool:
    for host, port in server.addresses:
        if await _accepts(host, port):
            return True
    return False


async def wait_for_servers(timeout_s: float, servers: Iterable[Server] | None = None) -> None:
    """Return once each server accepts connections, saying once what is being waited for.

    Raises:
        ServersMissing: `timeout_s` passed; the message names the server and the variable that moves it.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    for server in servers if servers is not None else configured_servers():
        is_announced = False
        while not await _is_up(server):
            if loop.time() >= deadline:
                raise ServersMissing(f"{server} did not answer within {timeout_s:.0f} s. Is it running?")
            if not is_announced:
                logger.warning("waiting for %s", server)
                is_announced = True
            await asyncio.sleep(_POLL_S)
