"""What changed between Dynamo releases, and nothing else: the only module that knows there are several.

=====================  =========================  =========================  ==========================
the chapter's line     0.5                        0.7                        1.x
=====================  =========================  =========================  ==========================
the runtime            (loop, is_static)          (loop, "etcd", is_static)  (loop, "etcd", "nats")
namespace, component   objects of the runtime     objects of the runtime     "ns.component.endpoint"
create_service()       announces the component    announces the component    gone: serving announces it
request plane          NATS                       NATS                       TCP unless told otherwise
leaving etcd early     when the runtime ends      when the runtime ends      unregister_endpoint_instance()
log level              DYN_LOG                    DYN_LOG                    DYN_LOG
=====================  =========================  =========================  ==========================

Each function below is one row. Releases are told apart by what they offer, not by a version number.
"""

import asyncio
import logging
import os
from typing import Any

# Rust reads these when the first runtime starts, so they are set while the scripts are being imported.
os.environ["DYN_REQUEST_PLANE"] = "nats"
os.environ["DYN_DISCOVERY_BACKEND"] = "etcd"
# Response streams come back over TCP from whoever answers. Loopback unless the operator names an interface.
os.environ.setdefault("DYN_TCP_RESPONSE_STREAM_HOST", "lo")
# The runtime writes two or three lines a request at "info". One line of ours says more, so those stay quiet.
_QUIET_PER_REQUEST = (
    "dynamo_runtime::pipeline::network::egress=warn",
    "dynamo_runtime::pipeline::network::ingress=warn",
    "dynamo_runtime::component::client=warn",
)


def _log_filter(environ: "os._Environ[str] | dict[str, str]") -> str:
    """The level from DYN_LOG, else DYN_LOG_LEVEL (which the chapter names and no release reads), else info."""
    chosen = environ.get("DYN_LOG") or environ.get("DYN_LOG_LEVEL")
    return chosen.lower() if chosen else ",".join(("info", *_QUIET_PER_REQUEST))


os.environ["DYN_LOG"] = _log_filter(os.environ)

from dynamo.runtime import DistributedRuntime  # noqa: E402
from dynamo.runtime.logging import configure_dynamo_logging as _configure_dynamo_logging  # noqa: E402

try:
    from dynamo.runtime import Context  # 1.x
except ImportError:
    from dynamo._core import Context  # 0.5, 0.7

_HAS_COMPONENTS = hasattr(DistributedRuntime, "namespace")


def configure_dynamo_logging() -> None:
    """Send Python's log records through Dynamo's logger, so that Python and Rust lines look the same."""
    _configure_dynamo_logging()
    for chatty in ("httpx", "httpcore", "asyncio", "uvicorn.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def open_runtime(loop: asyncio.AbstractEventLoop) -> Any:
    """Connect to etcd and NATS. Blocks the calling thread; call it off the loop.

    Raises:
        Exception: what the runtime raises when a server refuses or cannot be reached.
    """
    if not _HAS_COMPONENTS:
        return DistributedRuntime(loop, "etcd", "nats")
    signature = DistributedRuntime.__text_signature__ or ""
    if "store_kv" in signature:
        return DistributedRuntime(loop, "etcd", False)
    return DistributedRuntime(loop, False)


async def open_endpoint(runtime: Any, namespace: str, component: str, endpoint: str, *, serve: bool) -> Any:
    """The runtime's own endpoint object; with `serve`, the component is announced first where that exists."""
    if not _HAS_COMPONENTS:
        return runtime.endpoint(f"{namespace}.{component}.{endpoint}")
    owner = runtime.namespace(namespace).component(component)
    if serve:
        await owner.create_service()
    return owner.endpoint(endpoint)


async def leave_discovery(endpoint: Any) -> bool:
    """Take the endpoint's key out of etcd while it still answers. False where a release cannot do that."""
    unregister = getattr(endpoint, "unregister_endpoint_instance", None)
    if unregister is None:
        return False
    await unregister()
    return True


__all__ = ["Context", "configure_dynamo_logging", "leave_discovery", "open_endpoint", "open_runtime"]
