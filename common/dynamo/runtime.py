"""The chapter's vocabulary: `@dynamo_worker(static=False)`, `namespace`, `component`, `endpoint`, `client`.

The objects here stand in front of Dynamo's own, on any release (`releases`), and stay valid when the
connection behind them is replaced (`connection`).
"""

import asyncio
import atexit
import functools
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec

from common.dynamo import releases
from common.dynamo.connection import RECONNECT_PAUSE_S, Connection
from common.dynamo.network import RESPONSE_HOST, detect_dead_peers, is_out_of_reach
from common.dynamo.releases import Context
from common.dynamo.servers import ServersMissing, is_lease_known
from common.dynamo.service import Handler, Serving, service
from common.environment import check_system_port, chosen_cpus, stay_on
from common.observability.logs import format_records

__all__ = [
    "Client",
    "Context",
    "DistributedRuntime",
    "configure_dynamo_logging",
    "dynamo_worker",
]

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
MAX_REFUSALS = 3

P = ParamSpec("P")
Running = Coroutine[Any, Any, None]


def configure_dynamo_logging() -> None:
    """The chapter's call: one logger for Python and Rust, so that all lines look the same."""
    releases.configure_dynamo_logging()
    format_records()


class DistributedRuntime(Connection):
    """What a worker gets: its place in the pipeline."""

    def namespace(self, name: str) -> "Namespace":
        return Namespace(self, name)


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


class Endpoint:
    def __init__(self, runtime: DistributedRuntime, namespace: str, component: str, name: str) -> None:
        self._runtime, self._path = runtime, (namespace, component, name)

    def __str__(self) -> str:
        return "/".join(self._path)

    async def open(self, *, serve: bool) -> Any:
        return await releases.open_endpoint(self._runtime.raw, *self._path, serve=serve)

    async def serve_endpoint(self, handler: "Handler | service[Any]", graceful_shutdown: bool = True) -> None:
        """Answer requests with the dicts that `handler(request, context)` yields, until the process is stopped.

        graceful_shutdown: whether it then waits for the answers that are not complete.
        """
        runtime = self._runtime
        if isinstance(handler, service):
            handler.count_in(await runtime.metrics(self._path[1]))
        serving = Serving(handler, runtime, graceful_shutdown=graceful_shutdown)
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
                await asyncio.sleep(RECONNECT_PAUSE_S)
            if not runtime.is_stopping.is_set():
                logger.warning("etcd has forgotten %s; registering again as soon as it answers", self)
                await runtime.reconnect(generation)
        await runtime.is_drained.wait()

    async def client(self) -> "Client":
        client = Client(self._runtime, self)
        await client.refresh()
        if is_out_of_reach():
            logger.warning(
                "answers come back on loopback only: to have %s on another machine, set %s", self, RESPONSE_HOST
            )
        return client


class Client:
    """Calls the instances of one endpoint, wherever they are."""

    def __init__(self, runtime: DistributedRuntime, endpoint: Endpoint) -> None:
        self._runtime, self._endpoint = runtime, endpoint
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
                    detect_dead_peers()  # answers come in through a socket that is listening by now
                    self._generation = generation
        return self._raw

    async def instance_ids(self) -> list[int]:
        """Who serves the endpoint, as etcd says now. An instance that was killed stays listed for up to 10 s."""
        return list((await self.refresh()).instance_ids())

    async def is_lease_known(self, instance_id: int) -> bool:
        """Whether etcd still has the lease of an instance, listed or not; true where it cannot be asked."""
        return await is_lease_known(instance_id)  # Dynamo names an instance after its lease

    def num_instances(self) -> int:
        """How many `instance_ids` would name, for those who cannot wait."""
        return len(self._raw.instance_ids())

    async def ask(self, question: dict[str, Any], instance_id: int) -> Any:
        """One question to one instance: the first dict of its answer, which needs no finish_reason.

        Raises:
            Exception: what the runtime raises, among them StopAsyncIteration where there is no answer.
        """
        return await anext(await self.direct(question, instance_id, context=Context()))

    def direct(
        self, request: dict[str, Any], instance_id: int, context: Context | None = None
    ) -> Awaitable[AsyncIterator[Any]]:
        """Call one instance. The stream's items are the worker's dicts.

        Raises:
            Exception: what the runtime raises, here or while the stream is read; see `common.dynamo.failover`.
        """
        if self._generation != self._runtime.generation:
            return self._direct_anew(request, instance_id, context)
        opening: asyncio.Future[AsyncIterator[Any]] = self._raw.direct(
            request, instance_id, annotated=False, context=context
        )
        opening.add_done_callback(functools.partial(self._forget_if_ruled_out, self._raw, instance_id))
        return opening

    async def _direct_anew(
        self, request: dict[str, Any], instance_id: int, context: Context | None
    ) -> AsyncIterator[Any]:
        await self.refresh()
        return await self.direct(request, instance_id, context)

    def _forget_if_ruled_out(self, raw: Any, instance_id: int, opening: asyncio.Future[Any]) -> None:
        """The next call makes a new client, which asks again."""
        error = None if opening.cancelled() else opening.exception()
        if error is not None and self._raw is raw and releases.is_ruled_out(raw, instance_id, error):
            self._generation = -1


def _tune_interpreter() -> None:
    """Settings for a process whose event loop shares the interpreter with the runtime's threads.

    A thread that wants the interpreter lock waits 5 ms by default before it insists, which every item of a stream
    may have to do. What was loaded by now stays: the collector need not look at it again and again. Nor need it look so
    often: a request makes more objects than the default of 700, and leaves few that it has to find.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def _skip_finalization_at_exit() -> None:
    """End the process right after Python's own exit handlers, with the exit code that it would have.

    The runtime's threads outlive `shutdown()`. One that wants the interpreter while it is being torn down crashes
    the process with SIGSEGV or SIGABRT: on 0.5.1 one stop in 90, on 1.4.2 one in thirty, on 1.6.1 none of 180.
    """
    global _is_finalization_skipped
    _is_finalization_skipped = True


_is_finalization_skipped = False


@atexit.register  # among the first, so it runs after those that were registered later
def _end_at_once() -> None:
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
            if runtime.is_stopping.is_set():
                _skip_finalization_at_exit()

        return run

    return decorate
