"""What Dynamo's runtime is told by environment variables, whatever its release."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ETCD_TLS = ("ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY")
"""With all three of these etcd is spoken to in TLS; Dynamo ignores one or two of them."""

# At "info" the runtime writes two or three lines a request. One line of ours says more, so those stay quiet.
_CHATTY = ("pipeline::network::egress", "pipeline::network::ingress", "component::client")
_INFO = ",".join(["info", *(f"dynamo_runtime::{module}=warn" for module in _CHATTY)])

_MAX_SYSTEM_PORT = 32767


def prepare_environment() -> None:
    """Call before the runtime is imported: Rust reads these when it is loaded, or when the first one starts."""
    os.environ["DYN_REQUEST_PLANE"] = "nats"
    os.environ["DYN_DISCOVERY_BACKEND"] = "etcd"
    # Response streams come back over TCP from whoever answers. Loopback unless the operator names an interface.
    os.environ.setdefault("DYN_TCP_RESPONSE_STREAM_HOST", "lo")
    os.environ.setdefault("DYN_SYSTEM_HOST", "127.0.0.1")  # where DYN_SYSTEM_PORT, if it is set, is opened
    # More threads only wait for each other: all of them need Python's interpreter lock for every item.
    os.environ.setdefault("DYN_RUNTIME_NUM_WORKER_THREADS", "2")
    os.environ.setdefault("DYN_RUNTIME_MAX_BLOCKING_THREADS", "4")
    # DYN_LOG_LEVEL is the chapter's word for it, which no release reads.
    os.environ["DYN_LOG"] = (os.environ.get("DYN_LOG") or os.environ.get("DYN_LOG_LEVEL") or _INFO).lower()


def check_system_port() -> None:
    """Exit with an error where DYN_SYSTEM_PORT is none that Dynamo takes: it keeps the port in 16 bits with a sign."""
    text = os.environ.get("DYN_SYSTEM_PORT", "")
    if text and (not re.fullmatch(r"-?\d+", text) or int(text) > _MAX_SYSTEM_PORT):
        sys.exit(f"error: DYN_SYSTEM_PORT={text}: expected a port up to {_MAX_SYSTEM_PORT}.")


@contextmanager
def pem_texts() -> Iterator[None]:
    """Dynamo documents ETCD_TLS as files and reads them as PEM text: put the text in their place for a moment."""
    files = {name: path for name in ETCD_TLS if (path := os.environ.get(name)) and os.path.isfile(path)}
    os.environ.update({name: Path(path).read_text() for name, path in files.items()})
    try:
        yield
    finally:
        os.environ.update(files)
