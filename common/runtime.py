"""The chapter's vocabulary: `@dynamo_worker(static=False)`, `namespace`, `component`, `endpoint`, `client`.

The objects here stand in front of Dynamo's own and add what those lack: they wait for etcd and NATS, they stop
gracefully on SIGTERM and SIGINT, and they outlive an etcd outage. When etcd forgets a process (its lease is gone
after 10 s), Dynamo ends that process' runtime for good. A new runtime in the same process costs 20 ms, while
reloading a model costs a minute, so `DistributedRuntime` replaces the inner runtime, services register again, and
clients look again.
"""

import asyncio
import functools
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Concatenate, ParamSpec

from common import dynamo_releases
from common.dynamo_releases import Context, configure_dynamo_logging
from common.servers import ServersMissing, wait_for_servers

__all__ = ["Client", "Context", "DistributedRuntime", "configure_dynamo_logging", "dynamo_worker"]

logger = logging.getLogger(__name__)

STARTUP_TIMEOUT_S = float(os.environ.get("DYN_CHAT_STARTUP_TIMEOUT_S", "300"))
DRAIN_TIMEOUT_S = float(os.environ.get("DYN_CHAT_DRAIN_TIMEOUT_S", "60"))
# Callers learn from etcd that we left within milliseconds; a request sent before that is still welcome.
_FAREWELL_S = 0.5
_LIVENESS_POLL_S = 1.0
_RECONNECT_PAUSE_S = 1.0

P = ParamSpec("P")
Running = Coroutine[Any, Any, None]


class DistributedRuntime:
    """One process' place in the pipeline, whichever inner runtime currently provides it."""

    def __init__(self) -> None:
        self.raw: Any = None
        self.generation = 0
        self.is_stopping = asyncio.Event()
        self.num_in_flight = 0
        self._reconnecting = asyncio.Lock()
        self._served: dict[str, Any] = {}
        self.body: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._background: set[asyncio.Task[None]] = set()

    def namespace(self, name: str) -> "Namespace":
        return Namespace(self, name)

    async def connect(self) -> None:
        """Wait for etcd and NATS, then open the inner runtime.

        Raises:
            ServersMissing: they did not come up within STARTUP_TIMEOUT_S, or refused us (credentials, TLS).
        """
        await wait_for_servers(STARTUP_TIMEOUT_S)
        try:
            self.raw = await asyncio.to_thread(dynamo_releases.open_runtime, asyncio.get_running_loop())
        except Exception as error:
            raise ServersMissing(
                f"etcd or NATS refused the connection: {error}. Look at ETCD_ENDPOINTS, ETCD_AUTH_*, NATS_SERVER "
                "and NATS_AUTH_*."
            ) from error

    async def reconnect(self, lost_generation: int) -> None:
        """Replace an inner runtime that etcd has forgotten. Several callers may notice; the first one acts."""
        async with self._reconnecting:
            while self.generation == lost_generation and not self.is_stopping.is_set():
                try:
                    await self.connect()
                except ServersMissing as error:
                    logger.warning("cannot reconnect yet: %s", error)
                    await asyncio.sleep(_RECONNECT_PAUSE_S)
                else:
                    self.generation += 1
                    logger.warning("connected to etcd and NATS again")

    def run_in_background(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def request_stop(self) -> None:
        """What SIGTERM and SIGINT do: drain and end the first time, end at once the second time."""
        if self.is_stopping.is_set():
            logger.warning("second signal: ending at once")
            os._exit(1)
        self.is_stopping.set()
        if self.raw is None:  # still waiting for etcd or NATS: nothing to drain
            self.body.cancel()
            return
        logger.info("stopping: leaving etcd, finishing %d requests", self.num_in_flight)
        self.run_in_background(self.stop())

    def serving(self, path: str, raw_endpoint: Any) -> None:
        self._served[path] = raw_endpoint

    async def stop(self) -> None:
        """Leave etcd, let the streams in flight finish (up to DRAIN_TIMEOUT_S), then end the inner runtime."""
        for path, raw_endpoint in self._served.items():
            try:
                async with asyncio.timeout(_CONNECTION_LOSS_TIMEOUT_S):
                    if await dynamo_releases.leave_discovery(raw_endpoint):
                        logger.info("left etcd: %s", path)
            except Exception as error:  # etcd may be away just now; the lease ends by itself
                logger.warning("could not take %s out of etcd: %s", path, error)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DRAIN_TIMEOUT_S
        if self._served:
            await asyncio.sleep(_FAREWELL_S)
        while self.num_in_flight and loop.time() < deadline:
            await asyncio.sleep(0.05)
        if self.num_in_flight:
            logger.warning("giving up on %d requests after %.0f s", self.num_in_flight, DRAIN_TIMEOUT_S)
        self.raw.shutdown()


_CONNECTION_LOSS_TIMEOUT_S = 5.0


class Namespace:
    def __init__(self, runtime: DistributedRuntime, name: str) -> None:
        self._runtime, self._name = runtime, name

    def component(self, name: str) -> "Component":
        return Component(self._runtime, self._name, name)


class Component:
    def __init__(self, runtime: DistributedRuntime, namespace: str, name: str) -> None:
        self._runtime, self._namespace, self._name = runtime, namespace, name

    async def create_service(self) -> None:
        """Announce that this process will serve endpoints. It reaches etcd with the first `serve_endpoint`."""

    def endpoint(self, name: str) -> "Endpoint":
        return Endpoint(self._runtime, self._namespace, self._name, name)


Handler = Callable[[dict[str, Any], Context], AsyncGenerator[dict[str, Any], None]]


class Endpoint:
    def __init__(self, runtime: DistributedRuntime, namespace: str, component: str, name: str) -> None:
        self._runtime, self._path = runtime, (namespace, component, name)

    def __str__(self) -> str:
        return "/".join(self._path)

    async def open(self, *, serve: bool) -> Any:
        return await dynamo_releases.open_endpoint(self._runtime.raw, *self._path, serve=serve)

    async def serve_endpoint(self, handler: Handler) -> None:
        """Answer requests with the dicts that `handler(request, context)` yields, until the process is stopped."""
        runtime = self._runtime
        counted = self._counting(handler)
        while not runtime.is_stopping.is_set():
            generation = runtime.generation
            raw_endpoint = await self.open(serve=True)
            runtime.serving(str(self), raw_endpoint)
            logger.info("serving %s", self)
            await raw_endpoint.serve_endpoint(counted, graceful_shutdown=True)
            if not runtime.is_stopping.is_set():
                logger.warning("etcd has forgotten %s; registering again as soon as it answers", self)
                await runtime.reconnect(generation)

    def _counting(self, handler: Handler) -> Handler:
        async def counted(request: dict[str, Any], context: Context) -> AsyncGenerator[dict[str, Any], None]:
            self._runtime.num_in_flight += 1
            try:
                async with aclosing(handler(request, context)) as stream:
                    async for item in stream:
                        yield item
            finally:
                self._runtime.num_in_flight -= 1

        return counted

    async def client(self) -> "Client":
        client = Client(self._runtime, self)
        await client.refresh()
        self._runtime.run_in_background(client.watch())
        return client


class Client:
    """Calls the instances of one endpoint, wherever they are."""

    def __init__(self, runtime: DistributedRuntime, endpoint: Endpoint) -> None:
        self._runtime, self._endpoint = runtime, endpoint
        self._raw: Any = None
        self._generation = -1

    def __str__(self) -> str:
        return str(self._endpoint)

    async def refresh(self) -> Any:
        if self._generation != self._runtime.generation:
            generation = self._runtime.generation
            self._raw = await (await self._endpoint.open(serve=False)).client()
            self._generation = generation
        return self._raw

    async def watch(self) -> None:
        """Notice the end of the inner runtime, which a process without a service would otherwise never learn of.

        `wait_for_instances` fails only then ("channel closed"), and returns or waits as long as it lives.
        """
        while not self._runtime.is_stopping.is_set():
            raw, generation = await self.refresh(), self._generation
            try:
                await raw.wait_for_instances()
            except Exception as error:
                if self._runtime.is_stopping.is_set():
                    return
                logger.warning("lost the connection to etcd (%s)", error)
                await self._runtime.reconnect(generation)
            await asyncio.sleep(_LIVENESS_POLL_S)

    def instance_ids(self) -> list[int]:
        """Who serves the endpoint, as etcd says now. An instance that was killed stays listed for up to 10 s."""
        return list(self._raw.instance_ids())

    async def wait_for_instances(self) -> list[int]:
        return list(await (await self.refresh()).wait_for_instances())

    async def generate(self, request: dict[str, Any], context: Context | None = None) -> AsyncIterator[Any]:
        """Call the next instance in turn. Each item of the stream has the worker's dict in `.data()`.

        Raises:
            Exception: what the runtime raises, here or while the stream is read; see `common.failover`.
        """
        stream: AsyncIterator[Any] = await (await self.refresh()).round_robin(request, context=context)
        return stream

    async def direct(
        self, request: dict[str, Any], instance_id: int, context: Context | None = None
    ) -> AsyncIterator[Any]:
        """Call one instance."""
        stream: AsyncIterator[Any] = await (await self.refresh()).direct(request, instance_id, context=context)
        return stream


def dynamo_worker(
    static: bool = False,
) -> Callable[[Callable[Concatenate[DistributedRuntime, P], "Running"]], Callable[P, "Running"]]:
    """Connect to etcd and NATS, run the decorated coroutine with the runtime, and stop it gracefully.

    The first SIGTERM or SIGINT drains, the second ends the process at once. `static` is the chapter's word for
    running without discovery, which this pipeline does not do.
    """
    if static:
        raise ValueError("static=True would mean running without etcd; this pipeline discovers its parts there")

    def decorate(
        worker: Callable[Concatenate[DistributedRuntime, P], Running],
    ) -> Callable[P, Running]:
        @functools.wraps(worker)
        async def run(*args: P.args, **kwargs: P.kwargs) -> None:
            runtime = DistributedRuntime()
            runtime.body = asyncio.ensure_future(_connect_and_run(runtime, worker(runtime, *args, **kwargs)))
            for signum in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(signum, runtime.request_stop)
            try:
                await runtime.body
            except asyncio.CancelledError:
                if not runtime.is_stopping.is_set():
                    raise
            except ServersMissing as error:
                sys.exit(f"error: {error}")

        return run

    return decorate


async def _connect_and_run(runtime: DistributedRuntime, body: Running) -> None:
    try:
        await runtime.connect()
    except BaseException:
        if asyncio.iscoroutine(body):
            body.close()
        raise
    await body
