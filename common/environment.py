"""The environment variables that steer a process: what Dynamo is told by them, and what we read ourselves."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ETCD_TLS = ("ETCD_AUTH_CA", "ETCD_AUTH_CLIENT_CERT", "ETCD_AUTH_CLIENT_KEY")
"""With all three of these etcd is spoken to in TLS; Dynamo ignores one or two of them."""

# At "info" the runtime writes two or three lines per request. One line of ours says more, so those stay quiet.
_CHATTY = ("pipeline::network::egress", "pipeline::network::ingress", "component::client")
# Its Python module says at the start that it has threads of its own, as `releases.open_runtime` wants it, and at the
# end that it ends, as the last line of a script that has ended with an error.
_INFO = ",".join(["info", "_core=error", *(f"dynamo_runtime::{module}=warn" for module in _CHATTY)])
# A reader that has left is an error to it. To us it is a request that was cancelled, and in a router how each one ends.
_INFO += ",dynamo_runtime::pipeline::network::ingress::push_handler=off"

STARTUP_TIMEOUT_S = float(os.environ.get("DYN_CHAT_STARTUP_TIMEOUT_S", "300"))
DRAIN_TIMEOUT_S = float(os.environ.get("DYN_CHAT_DRAIN_TIMEOUT_S", "60"))
_MAX_SYSTEM_PORT = 32767
CPUS_VARIABLE = "DYN_CHAT_CPUS"
_RANGE = re.compile(r"\s*(\d+)(?:-(\d+))?\s*")


def is_on(name: str) -> bool:
    """Whether Dynamo takes the variable for a yes, too."""
    return os.environ.get(name, "").strip().lower() in ("1", "true", "on", "yes")


def prepare_environment() -> None:
    """Call before the runtime is imported: Rust reads these when it is loaded, or when the first one starts."""
    os.environ["DYN_REQUEST_PLANE"] = "nats"
    os.environ["DYN_DISCOVERY_BACKEND"] = "etcd"
    # How long etcd lists a process that was killed. Dynamo's own default was 10 s until 1.4, and is 30 s since.
    os.environ.setdefault("ETCD_LEASE_TTL", "10")
    # So 1.6 notices a connection that has died before the lease has.
    os.environ.setdefault("ETCD_KEEPALIVE_INTERVAL_SECONDS", "5")
    os.environ.setdefault("ETCD_KEEPALIVE_TIMEOUT_SECONDS", "3")
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


def chosen_cpus() -> set[int]:
    """The CPUs in DYN_CHAT_CPUS, such as `3`, `2-3` or `0,4-5`; none where it is not set.

    Exits with an error where it says anything else, or names a CPU that this process may not use.
    """
    text = os.environ.get(CPUS_VARIABLE, "")
    if not text.strip():
        return set()
    matches = [_RANGE.fullmatch(part) for part in text.split(",")]
    if None in matches:
        sys.exit(f"error: {CPUS_VARIABLE}={text}: expected numbers of CPUs, such as 3, 2-3 or 0,4-5.")
    cpus = {cpu for match in matches if match for cpu in range(int(match[1]), int(match[2] or match[1]) + 1)}
    allowed = os.sched_getaffinity(0)
    if not cpus or not cpus <= allowed:
        sys.exit(f"error: {CPUS_VARIABLE}={text}: this process may use {','.join(map(str, sorted(allowed)))}.")
    return cpus


def stay_on(cpus: set[int]) -> None:
    """Keep all threads of this process, and those they will start, to these CPUs. Child processes stay where they are.

    So call it when SGLang's processes have been started: they need the other CPUs. The event loop and Dynamo's threads
    take turns with the interpreter lock, several times for every dict. On several CPUs each turn wakes another one up;
    on one the same work takes half of the CPU time (docs/performance.md).
    """
    for thread_id in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread_id), cpus)
