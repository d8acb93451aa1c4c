"""The sockets under Dynamo: where answers come in, noticing that a machine is gone, what NATS carries."""

import asyncio
import ipaddress
import os
import socket
from contextlib import suppress
from typing import Any

import psutil

from common.dynamo import releases
from common.dynamo.servers import SERVERS, ServersMissing, nats_max_payload
from common.errors import RequestTooLarge

RESPONSE_HOST = "DYN_TCP_RESPONSE_STREAM_HOST"
"""Names the network interface on which answers come in: the address that workers are told when they are called."""
LOOPBACK = "lo"
# Where no packet goes: connecting a UDP socket only asks for a route. (RFC 5737)
_SOMEWHERE = ("192.0.2.1", 9)
_IP = (socket.AF_INET, socket.AF_INET6)
# Keepalive: the other end's kernel answers, however busy or stopped its process is. Silent for 3 s, then three
# questions in 6 s.
IDLE_S, INTERVAL_S, NUM_PROBES = 3, 2, 3
_LOOK_S = 3.0
# Dynamo's own words around a request count for NATS, not for its client: it sends what NATS then refuses.
_HEADERS_BYTES = 1024


def choose_response_address() -> None:
    """Have Dynamo listen on an address of the interface that the operator named.

    Dynamo takes the interface's last address, which on most machines is a link-local one of IPv6, and cannot listen
    there. Without the variable it takes the address that the default route leaves from. So the name is left away where
    that comes to the same, and refused where it does not.

    Raises:
        ServersMissing: there is no such interface, or Dynamo cannot use its address.
    """
    name = os.environ.get(RESPONSE_HOST, "")
    addresses = [entry.address for entry in psutil.net_if_addrs().get(name, ()) if entry.family in _IP]
    if not name:
        os.environ.pop(RESPONSE_HOST, None)
    elif not addresses:
        raise ServersMissing(f"{RESPONSE_HOST}={name}: this machine has no such network interface with an address.")
    elif _is_link_local(addresses[-1]):
        if _default_source() not in addresses:
            first_ipv4 = next((address for address in addresses if ":" not in address), "ADDRESS")
            raise ServersMissing(
                f"{RESPONSE_HOST}={name}: Dynamo would listen on {addresses[-1]}, which is no use. Give the address a "
                f"name of its own (ip address add {first_ipv4}/... dev {name} label {name}:chat) and set "
                f"{RESPONSE_HOST}={name}:chat, or switch IPv6 off for {name}."
            )
        del os.environ[RESPONSE_HOST]


def is_out_of_reach() -> bool:
    """Whether only this machine's workers can answer, though NATS or etcd are on another one."""
    hosts = {host for server in SERVERS for host, _ in server.addresses}
    return os.environ.get(RESPONSE_HOST) == LOOPBACK and not any(map(_is_here, hosts))


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_link_local(address: str) -> bool:
    return ":" in address and ipaddress.ip_address(address).is_link_local


def _default_source() -> str | None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(_SOMEWHERE)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def detect_dead_peers() -> None:
    """Have every TCP socket that is open now, and those that they will accept, fail 9 s after the other end is gone.

    Whoever reads an answer sends nothing, so only keepalive shows that the other end's machine has vanished. Dynamo
    does not switch it on and does not hand out its sockets; the kernel has all of this process, and on Linux a
    connection inherits the keepalive of the socket that accepted it.
    """
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # no socket, or closed meanwhile
            copy = os.dup(int(descriptor))
            try:
                tcp = socket.socket(fileno=copy)
            except OSError:
                os.close(copy)
                raise
            with tcp:
                if tcp.family in (socket.AF_INET, socket.AF_INET6) and tcp.type == socket.SOCK_STREAM:
                    tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, IDLE_S)
                    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, INTERVAL_S)
                    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, NUM_PROBES)


async def keep_detecting_dead_peers() -> None:
    """For one that serves: it opens a connection for each answer, which may carry nothing for as long as it is open."""
    while True:
        with suppress(OSError):  # too many files are open
            await asyncio.to_thread(detect_dead_peers)
        await asyncio.sleep(_LOOK_S)


async def too_large_for_nats(request: dict[str, Any], error: Exception) -> RequestTooLarge | None:
    """What to tell the client where `error`, of a call, came of the request's size: no other instance would take it."""
    if not releases.is_too_large(error) and not releases.is_unanswered(error):
        return None
    size, limit = releases.size_on_nats(request), await nats_max_payload()
    is_above_limit = limit is not None and size > limit - _HEADERS_BYTES
    if not releases.is_too_large(error) and not is_above_limit:
        return None
    return RequestTooLarge(f"The request takes {size} bytes on NATS, which carries {limit or 'less'} (max_payload).")
