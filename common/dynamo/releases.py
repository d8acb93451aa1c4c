"""What changed between Dynamo releases, and nothing else: the only module that knows there are several.

======================  ==============================  ==============================
                        0.5                             1.x
======================  ==============================  ==============================
the runtime             (loop, is_static)               (loop, "etcd", "nats")
namespace, component    objects of the runtime          "namespace.component.endpoint"
create_service()        serving needs it                gone
request plane           NATS                            TCP unless told otherwise
response streams        on a routable address           on the interface we name
leaving etcd            when all is answered            at once
  by                    shutdown()                      unregister_endpoint_instance()
  meanwhile             new calls are refused           new calls are answered
when etcd forgets us    the runtime ends for good,      the runtime ends, another one
                        so must we                      can be opened
a missed response       rules out the instance          is forgiven
too large a request     is never answered               is refused at once
======================  ==============================  ==============================

Each function below is one row or two. Releases are told apart by what they offer, not by a version number.
"""

import asyncio
import inspect
import logging
import re
import uuid
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import msgspec
import orjson

from common.environment import pem_texts, prepare_environment

prepare_environment()

from dynamo import _core  # noqa: E402
from dynamo.runtime import Context as Context  # noqa: E402
from dynamo.runtime import DistributedRuntime  # noqa: E402
from dynamo.runtime.logging import configure_dynamo_logging as configure_dynamo_logging  # noqa: E402

logger = logging.getLogger(__name__)

_HAS_COMPONENTS = hasattr(DistributedRuntime, "namespace")
_CLIENTS_HAVE_A_MODE = "router_mode" in inspect.signature(_core.Endpoint.client).parameters
CAN_REOPEN = not _HAS_COMPONENTS
"""Whether a process can open another runtime after its first one has ended."""

# The runtime's errors arrive as text: 1.x begins with a kind of error, which 1.6 names anew; 0.x says it in words.
# Of what a handler raised 1.6 gives the class; an item that it cannot send is a "critical error".
_WORKER_RAISED = re.compile(
    r"(Backend(InvalidArgument|Unknown)|(InvalidRequest|Internal): [A-Za-z_][\w.]*): "
    r"|(Internal|Unknown): critical error: "
    r"|a python exception was caught while processing"
)
_RULED_OUT = "not found for endpoint"
_TOO_LARGE = "payload is too large"
_UNANSWERED = ("CannotConnect", "Unavailable", "no responders", "deadline has elapsed", "Unlinked request", _RULED_OUT)
_BROKEN = ("Stream ended before generation completed", "engine shutting down", "Cancelled")


async def open_runtime() -> Any:
    """Connect to etcd and NATS.

    Raises:
        Exception: what the runtime raises when a server refuses or cannot be reached.
    """
    if not _HAS_COMPONENTS:
        await _keep_threads_apart()
    return await asyncio.to_thread(_open_runtime, asyncio.get_running_loop())


async def _keep_threads_apart() -> None:
    """Have Dynamo call Python from other threads than those that do its own work, as 1.4 does by itself.

    For 1.6 they are the same ones, unless something of it was awaited before the first runtime is opened. Then a
    process can hang: `endpoint()` waits for one of these threads and keeps the interpreter lock meanwhile, and while
    streams are read all of them may be waiting for that lock.
    """
    context = Context()
    context.stop_generating()
    await context.async_killed_or_stopped()


@pem_texts()
def _open_runtime(loop: asyncio.AbstractEventLoop) -> Any:
    return DistributedRuntime(loop, False) if _HAS_COMPONENTS else DistributedRuntime(loop, "etcd", "nats")


async def open_endpoint(runtime: Any, namespace: str, component: str, endpoint: str, *, serve: bool) -> Any:
    """The runtime's own endpoint object. `serve`: requests will be answered there."""
    if not _HAS_COMPONENTS:
        return runtime.endpoint(f"{namespace}.{component}.{endpoint}")
    owner = runtime.namespace(namespace).component(component)
    if serve:
        await owner.create_service()
    return owner.endpoint(endpoint)


async def open_client(endpoint: Any) -> Any:
    """The runtime's own client of an endpoint.

    1.6 logs the end of each call at any level, unless a client is one for KV routing, which is told whom to call.
    """
    return await (endpoint.client(_core.RouterMode.KV) if _CLIENTS_HAVE_A_MODE else endpoint.client())


def expose_metrics(endpoint: Any, metrics_text: Callable[[], str]) -> bool:
    """Add to what Dynamo shows at DYN_SYSTEM_PORT. False where it shows nothing but its own metrics."""
    if (metrics := getattr(endpoint, "metrics", None)) is not None:
        metrics.register_prometheus_expfmt_callback(metrics_text)
    return metrics is not None


async def leave_discovery(runtime: Any, endpoint: Any) -> bool:
    """Get no new requests, while those in flight go on. False where only the runtime as a whole can leave."""
    unregister = getattr(endpoint, "unregister_endpoint_instance", None)
    if unregister is None:
        runtime.shutdown()  # begins with the endpoints
        return False
    await unregister()
    return True


def child_of(context: Context) -> Context:
    """A context that is stopped by itself, and belongs to the same trace of Dynamo's where there are traces."""
    return context.detached(uuid.uuid4().hex) if hasattr(context, "detached") else Context()


def is_ruled_out(client: Any, instance_id: int, error: BaseException) -> bool:
    """Whether this client will never call that instance again, though it is there; another client would."""
    return _RULED_OUT in str(error) and instance_id in client.instance_ids()


def is_raised_by_worker(error: Exception) -> bool:
    """Whether the handler raised: it would raise again on another instance."""
    return _WORKER_RAISED.match(str(error)) is not None


def is_too_large(error: Exception) -> bool:
    """Whether Dynamo itself found the request larger than NATS carries (`max_payload`)."""
    return _TOO_LARGE in str(error)


def is_unanswered(error: Exception) -> bool:
    """Whether nothing came back: nobody is there, or NATS did not carry a request that Dynamo let pass."""
    return not is_broken(error) and any(words in str(error) for words in _UNANSWERED)


def is_broken(error: Exception) -> bool:
    """Whether a stream ended too early: its worker was killed, or is going away. 1.6 calls that "Unavailable", too."""
    return any(words in str(error) for words in _BROKEN)


def log_unknown(error: Exception) -> None:
    """Say, once for each wording, that no rule here knows this error: it may mean what one of them should have seen."""
    rules = (is_raised_by_worker, is_too_large, is_unanswered, is_broken)
    if not any(rule(error) for rule in rules):
        _log_unknown_wording(re.sub(r"\d\w*", "#", f"{type(error).__name__}: {error}"))


@lru_cache(maxsize=100)
def _log_unknown_wording(wording: str) -> None:
    logger.warning("taken for a broken stream, an error of Dynamo's that is not known here: %s", wording)


def size_on_nats(request: dict[str, Any]) -> int:
    """Bytes of a request, which 0.x writes as JSON, less those that the runtime adds."""
    return len(orjson.dumps(request) if _HAS_COMPONENTS else msgspec.msgpack.encode(request))
