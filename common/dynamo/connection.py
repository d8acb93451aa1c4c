"""One process' connection to etcd and NATS: opened, replaced when etcd has forgotten us, and closed gracefully.

When a process' lease in etcd ends (etcd was away for 10 s, or came back empty), Dynamo ends that process' runtime
for good. A new runtime in the same process costs 20 ms, while reloading a model costs a minute: so the inner
runtime is replaced, and `generation` tells everybody who holds something of the old one. A Dynamo that opens only
one runtime per process leaves no such way: then the process ends and says so.
"""

import asyncio
import logging
import os
from collections.abc import Coroutine
from typing import Any

from common.dynamo import releases
from common.dynamo.network import choose_response_address, keep_detecting_dead_peers
from common.dynamo.servers import ServersMissing, check_access, wait_for_servers
from common.environment import DRAIN_TIMEOUT_S, STARTUP_TIMEOUT_S
from common.observability.metrics import Metrics

logger = logging.getLogger(__name__)

# Callers learn from etcd within milliseconds that we left; a request sent before that is still answered.
_FAREWELL_S = 0.5
_LEAVE_TIMEOUT_S = 5.0
RECONNECT_PAUSE_S = 1.0
_DRAIN_POLL_S = 0.05
_SHUTDOWN_TIMEOUT_S = 10.0
# An endpoint that nobody serves. Waiting for it ends only with the runtime.
_NOBODY = ("inference", "nobody", "liveness")


class Connection:
    """`raw`: Dynamo's own runtime, the `generation`-th of this process.

    num_in_flight: requests that this process is answering. is_stopping: set by the first signal to stop.
    is_drained: set when, after that, nothing is in flight any more. failure: why the process must end, if it must.
    """

    def __init__(self) -> None:
        self.raw: Any = None
        self.generation = 0
        self.is_stopping = asyncio.Event()
        self.is_drained = asyncio.Event()
        self.failure: str | None = None
        self.num_in_flight = 0
        self.worker_task: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._reconnecting = asyncio.Lock()
        self._served: dict[str, Any] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._metrics: Metrics | None = None

    def run_in_background(self, coroutine: Coroutine[Any, Any, None]) -> None:
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
        choose_response_address()
        await wait_for_servers(STARTUP_TIMEOUT_S)
        await check_access()
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
                await asyncio.sleep(RECONNECT_PAUSE_S)  # a connection that is always lost must not spin
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
                    await asyncio.sleep(RECONNECT_PAUSE_S)
                else:
                    logger.warning("connected to etcd and NATS again")

    def serving(self, path: str, raw_endpoint: Any) -> None:
        """Remember what has to leave etcd when the process stops."""
        if not self._served:
            self.run_in_background(keep_detecting_dead_peers())
        self._served[path] = raw_endpoint

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
