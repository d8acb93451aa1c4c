"""The chapter's vocabulary: `@dynamo_worker(static=False)`, `namespace`, `component`, `endpoint`, `client`.

The objects here stand in front of Dynamo's own, on any release (`releases`), and stay valid when the connection behind
them is replaced. When a process' lease in etcd ends (etcd was away for 10 s, or came back empty), Dynamo ends that
process' runtime for good. A new runtime in the same process costs 20 ms, while reloading a model costs a minute: so the
inner runtime is replaced, and `generation` tells everybody who holds something of the old one. A Dynamo that opens only
one runtime per process leaves no such way: then the process ends and says so.
"""

import asyncio
import atexit
import functools
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec

from common.dynamo import network, releases
from common.dynamo.network import ServersMissing
from common.dynamo.releases import Context as Context
from common.dynamo.service import Handler, Serving, service
from common.environment import DRAIN_TIMEOUT_S, STARTUP_TIMEOUT_S, check_system_port, chosen_cpus, stay_on
from common.observability.logs import format_records
from common.observability.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_REFUSALS = 3
# Callers learn from etcd within milliseconds that we left; a request sent before that is still answered.
_FAREWELL_S = 0.5
_LEAVE_TIMEOUT_S = 5.0
_RECONNECT_PAUSE_S = 1.0
_DRAIN_POLL_S = 0.05
_SHUTDOWN_TIMEOUT_S = 10.0
# An endpoint that nobody serves. Waiting for it ends only with the runtime.
_NOBODY = ("inference", "nobody", "liveness")

P = ParamSpec("P")
Running = Coroutine[Any, Any, None]


def configure_dynamo_logging() -> None:
    """The chapter's call: one logger for Python and Rust, so that all lines look the same."""
    releases.configure_dynamo_logging()
    for chatty in ("httpx", "httpcore", "asyncio", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    format_records()


class DistributedRuntime:
    """What a worker gets: its place in the pipeline, and its connection to etcd and NATS.

    raw: Dynamo's own runtime, the `generation`-th of this process. is_stopping: set by the first signal to stop.
    waits_for: whose requests are finished then. is_drained: set when none of them is in flight any more. failure: why
    the process must end, if it must.
    """

    def __init__(self) -> None:
        self.raw: Any = None
        self.generation = 0
        self.is_stopping = asyncio.Event()
        self.is_drained = asyncio.Event()
        self.failure: str | None = None
        self.worker_task: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reconnecting = asyncio.Lock()
        self._served: dict[str, Any] = {}
        self.waits_for: list[Serving] = []
        self._background: set[asyncio.Task[None]] = set()
        self._metrics: Metrics | None = None

    def namespace(self, name: str) -> "Namespace":
        return Namespace(self, name)

    def run_in_background(self, coroutine: Running) -> None:
        task = asyncio.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(_log_failure)

    async def connect(self) -> None:
        """Wait for etcd and NATS, then open a runtime.

        Raises:
            ServersMissing: they did not come up within STARTUP_TIMEOUT_S, or refused us (credentials, TLS); or there
            is no address to listen on for answers.
        """
        network.choose_response_address()
        await network.wait_for_servers(STARTUP_TIMEOUT_S)
        await network.check_access()
        try:
            self.raw = await releases.open_runtime()
        except Exception as error:
            raise ServersMissing(
                f"etcd or NATS refused the connection: {error}. Look at ETCD_ENDPOINTS, ETCD_AUTH_*, NATS_SERVER "
                "and NATS_AUTH_*."
            ) from error
        self.generation += 1
        if self._metrics is not None:
            await self._expose(self._metrics)
        self.run_in_background(self._watch(self.raw, self.generation))

    async def metrics(self, component: str) -> Metrics:
        """What this process counts: shown behind Dynamo's own metrics at /metrics, if DYN_SYSTEM_PORT is set."""
        if self._metrics is None:
            self._metrics = Metrics(component)
            await self._expose(self._metrics)
        return self._metrics

    async def _expose(self, metrics: Metrics) -> None:
        endpoint = await releases.open_endpoint(self.raw, *_NOBODY, serve=False)
        if not releases.expose_metrics(endpoint, metrics.text) and os.environ.get("DYN_SYSTEM_PORT"):
            logger.warning("this Dynamo shows none but its own metrics at DYN_SYSTEM_PORT")

    async def _watch(self, raw: Any, generation: int) -> None:
        """Notice the runtime's end, which a process without a service would otherwise never learn of."""
        try:
            nobody = await releases.open_client(await releases.open_endpoint(raw, *_NOBODY, serve=False))
            await nobody.wait_for_instances()
        except Exception as error:
            if not self.is_stopping.is_set():
                logger.warning("lost the connection to etcd (%s)", error)
                await asyncio.sleep(_RECONNECT_PAUSE_S)  # a connection that is always lost must not spin
                await self.reconnect(generation)

    async def reconnect(self, lost_generation: int) -> None:
        """Replace a runtime that has ended. Several may notice; the first one acts, the others wait for it."""
        if not releases.CAN_REOPEN:
            self.failure = "etcd has forgotten this process, and this Dynamo cannot connect anew: start it again"
            self.worker_task.cancel()
            return
        async with self._reconnecting:
            while self.generation == lost_generation and not self.is_stopping.is_set():
                try:
                    await self.connect()
                except ServersMissing as error:
                    logger.warning("cannot reconnect yet: %s", error)
                    await asyncio.sleep(_RECONNECT_PAUSE_S)
                else:
                    logger.warning("connected to etcd and NATS again")

    def serving(self, path: str, raw_endpoint: Any) -> None:
        """Remember what has to leave etcd when the process stops."""
        if not self._served:
            self.run_in_background(network.keep_detecting_dead_peers())
        self._served[path] = raw_endpoint

    @property
    def num_in_flight(self) -> int:
        return sum(serving.num_in_flight for serving in self.waits_for)

    def request_stop(self) -> None:
        """What SIGTERM and SIGINT do: drain and end the first time, end at once the second time."""
        if self.is_stopping.is_set():
            logger.warning("second signal: ending at once")
            os._exit(1)
        self.is_stopping.set()
        if self.raw is None:  # still waiting for etcd or NATS: nothing to drain
            self.worker_task.cancel()
            return
        logger.info("stopping: leaving etcd, finishing %d requests", self.num_in_flight)
        self.run_in_background(self._stop())

    async def _stop(self) -> None:
        """Leave etcd, let the streams in flight finish (up to DRAIN_TIMEOUT_S), then end the runtime."""
        for path, raw_endpoint in self._served.items():
            try:
                async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                    if await releases.leave_discovery(self.raw, raw_endpoint):
                        logger.info("left etcd: %s", path)
            except Exception as error:  # etcd may be away just now; the lease ends by itself
                logger.warning("could not take %s out of etcd: %s", path, error)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DRAIN_TIMEOUT_S
        if self._served:
            await asyncio.sleep(_FAREWELL_S)
        while self.num_in_flight and loop.time() < deadline:
            await asyncio.sleep(_DRAIN_POLL_S)
        await asyncio.sleep(_DRAIN_POLL_S)  # the last dicts may still be on their way
        self.is_drained.set()
        if self.num_in_flight:
            logger.warning("giving up on %d requests after %.0f s", self.num_in_flight, DRAIN_TIMEOUT_S)
        if self._served:
            self.raw.shutdown()
            await asyncio.wait((self.worker_task,), timeout=_SHUTDOWN_TIMEOUT_S)
            self.worker_task.cancel()


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("what ran in the background ended: %s", error, exc_info=error)


@dataclass(frozen=True)
class Namespace:
    runtime: DistributedRuntime
    name: str

    def component(self, name: str) -> "Component":
        return Component(self, name)


@dataclass(frozen=True)
class Component:
    namespace: Namespace
    name: str

    async def create_service(self) -> None:
        """Announce that this process will serve endpoints. It reaches etcd with the first `serve_endpoint`."""

    def endpoint(self, name: str) -> "Endpoint":
        return Endpoint(self.namespace.runtime, (self.namespace.name, self.name, name))


@dataclass(frozen=True)
class Endpoint:
    runtime: DistributedRuntime
    path: tuple[str, str, str]

    def __str__(self) -> str:
        return "/".join(self.path)

    async def open(self, *, serve: bool) -> Any:
        return await releases.open_endpoint(self.runtime.raw, *self.path, serve=serve)

    async def serve_endpoint(self, handler: "Handler | service[Any]", graceful_shutdown: bool = True) -> None:
        """Answer requests with the dicts that `handler(request, context)` yields, until the process is stopped.

        graceful_shutdown: whether it then waits for the answers that are not complete.
        """
        runtime = self.runtime
        if isinstance(handler, service):
            handler.count_in(await runtime.metrics(self.path[1]))
        serving = Serving(handler, runtime.run_in_background)
        if graceful_shutdown:
            runtime.waits_for.append(serving)
        has_served, num_refusals = False, 0
        while not runtime.is_stopping.is_set():
            generation = runtime.generation
            raw_endpoint = await self.open(serve=True)
            runtime.serving(str(self), raw_endpoint)
            logger.info("serving %s", self)
            try:
                await raw_endpoint.serve_endpoint(serving.answer, graceful_shutdown=graceful_shutdown)
                has_served = True
            except Exception as error:  # etcd took no key from us: it may have gone away just now
                num_refusals += 1
                if not has_served and (num_refusals == MAX_REFUSALS or not releases.CAN_REOPEN):
                    raise ServersMissing(f"cannot register {self} in etcd: {error}.") from error
                logger.warning("could not register %s: %s", self, error)
                await asyncio.sleep(_RECONNECT_PAUSE_S)
            if not runtime.is_stopping.is_set():
                logger.warning("etcd has forgotten %s; registering again as soon as it answers", self)
                await runtime.reconnect(generation)
        await runtime.is_drained.wait()

    async def client(self) -> "Client":
        client = Client(self)
        await client.refresh()
        if network.is_out_of_reach():
            logger.warning(
                "answers come back on loopback only: to have %s on another machine, set %s", self, network.RESPONSE_HOST
            )
        return client


class Client:
    """Calls the instances of one endpoint, wherever they are."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._runtime, self._endpoint = endpoint.runtime, endpoint
        self._raw: Any = None
        self._generation = -1
        self._refreshing = asyncio.Lock()

    def __str__(self) -> str:
        return str(self._endpoint)

    @property
    def generation(self) -> int:
        """Another one when etcd has forgotten this process, and it has connected anew."""
        return self._runtime.generation

    async def refresh(self) -> Any:
        """Dynamo's client, made anew where the connection was replaced."""
        if self._generation != self._runtime.generation:
            async with self._refreshing:
                generation = self._runtime.generation
                if self._generation != generation:
                    self._raw = await releases.open_client(await self._endpoint.open(serve=False))
                    network.detect_dead_peers()  # answers come in through a socket that is listening by now
                    self._generation = generation
        return self._raw

    async def instance_ids(self) -> list[int]:
        """Who serves the endpoint, as etcd says now. An instance that was killed stays listed for up to 10 s."""
        return list((await self.refresh()).instance_ids())

    async def is_lease_known(self, instance_id: int) -> bool:
        """Whether etcd still has the lease of an instance, listed or not; true where it cannot be asked."""
        return await asyncio.to_thread(network.is_lease_known, instance_id)  # Dynamo names an instance after its lease

    def num_instances(self) -> int:
        """How many `instance_ids` would name, for those who cannot wait."""
        return len(self._raw.instance_ids())

    async def ask(self, question: dict[str, Any], instance_id: int) -> Any:
        """One question to one instance: the first dict of its answer, which needs no finish_reason.

        Raises:
            Exception: what the runtime raises, among them StopAsyncIteration where there is no answer.
        """
        return await anext(await self.direct(question, instance_id, Context()))

    async def direct(
        self, request: dict[str, Any], instance_id: int, context: Context | None = None
    ) -> AsyncIterator[Any]:
        """Call one instance. The stream's items are the worker's dicts.

        Raises:
            Exception: what the runtime raises, here or while the stream is read; see `common.dynamo.failover`.
        """
        raw = await self.refresh()
        try:
            stream: AsyncIterator[Any] = await raw.direct(request, instance_id, annotated=False, context=context)
        except Exception as error:
            if self._raw is raw and releases.is_ruled_out(raw, instance_id, error):
                self._generation = -1  # the next call makes a new client, which asks again
            raise
        return stream


def _tune_interpreter() -> None:
    """Settings for a process whose event loop shares the interpreter with the runtime's threads.

    A thread that wants the interpreter lock waits 5 ms by default before it insists, which every item of a stream
    may have to do. What was loaded by now stays: the collector need not look at it again and again. Nor need it look so
    often: a request makes more objects than the default of 700, and leaves few that it has to find.
    """
    sys.setswitchinterval(0.0005)
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


_is_finalization_skipped = False


@atexit.register  # among the first, so it runs after those that were registered later
def _end_at_once() -> None:
    """End a process that was stopped right after Python's own exit handlers, with the exit code that it would have.

    The runtime's threads outlive `shutdown()`. One that wants the interpreter while it is being torn down crashes
    the process with SIGSEGV or SIGABRT: on 0.5.1 one stop in 90, on 1.4.2 one in thirty, on 1.6.1 none of 180.
    """
    if _is_finalization_skipped and not hasattr(sys, "last_value"):  # last_value: an exception ended the program
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def dynamo_worker(
    static: bool = False,
) -> Callable[[Callable[Concatenate[DistributedRuntime, P], Running]], Callable[P, Running]]:
    """Connect to etcd and NATS, run the decorated coroutine with the runtime, and stop it gracefully.

    The first SIGTERM or SIGINT drains, the second ends the process at once. `static` is the chapter's word for
    running without discovery, which this pipeline does not do.
    """
    if static:
        raise ValueError("static=True would mean running without etcd; this pipeline discovers its parts there")

    cpus = chosen_cpus()
    check_system_port()

    def decorate(worker: Callable[Concatenate[DistributedRuntime, P], Running]) -> Callable[P, Running]:
        @functools.wraps(worker)
        async def run(*args: P.args, **kwargs: P.kwargs) -> None:
            global _is_finalization_skipped
            runtime = DistributedRuntime()

            async def connect_and_work() -> None:
                await runtime.connect()
                _tune_interpreter()
                if cpus:
                    stay_on(cpus)
                await worker(runtime, *args, **kwargs)

            runtime.worker_task = asyncio.ensure_future(connect_and_work())
            for signum in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(signum, runtime.request_stop)
            try:
                await runtime.worker_task
            except asyncio.CancelledError:
                if runtime.failure:
                    sys.exit(f"error: {runtime.failure}")
                if not runtime.is_stopping.is_set():
                    raise
            except ServersMissing as error:
                sys.exit(f"error: {error}")
            _is_finalization_skipped = runtime.is_stopping.is_set()

        return run

    return decorate
