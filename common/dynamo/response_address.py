"""Where answers come in: the address that this process tells the workers it calls.

DYN_TCP_RESPONSE_STREAM_HOST names a network interface. Dynamo takes the last address of it, which on most machines
is a link-local one of IPv6, and cannot listen there. Without the variable it takes the address that the default route
leaves from. So the name is left away where that comes to the same, and refused where it does not.
"""

import ipaddress
import os
import socket
from collections.abc import Iterable

import psutil

from common.dynamo.servers import ServersMissing, configured_servers

VARIABLE = "DYN_TCP_RESPONSE_STREAM_HOST"
LOOPBACK = "lo"
# Where no packet goes: connecting a UDP socket only asks for a route. (RFC 5737)
_SOMEWHERE = ("192.0.2.1", 9)
_IP = (socket.AF_INET, socket.AF_INET6)


def choose_response_address() -> None:
    """Have Dynamo listen on an address of the interface that the operator named.

    Raises:
        ServersMissing: there is no such interface, or Dynamo cannot use its address.
    """
    name = os.environ.get(VARIABLE, "")
    addresses = [entry.address for entry in psutil.net_if_addrs().get(name, ()) if entry.family in _IP]
    if not name:
        os.environ.pop(VARIABLE, None)
    elif not addresses:
        raise ServersMissing(f"{VARIABLE}={name}: this machine has no such network interface with an address.")
    elif _is_link_local(addresses[-1]):
        if _default_source() not in addresses:
            raise ServersMissing(
                f"{VARIABLE}={name}: Dynamo would listen on {addresses[-1]}, which is no use. Give the address a name "
                f"of its own (ip address add {_first_ipv4(addresses)}/... dev {name} label {name}:chat) and set "
                f"{VARIABLE}={name}:chat, or switch IPv6 off for {name}."
            )
        del os.environ[VARIABLE]


def is_out_of_reach() -> bool:
    """Whether only this machine's workers can answer, though NATS or etcd are on another one."""
    hosts = {host for server in configured_servers() for host, _ in server.addresses}
    return os.environ.get(VARIABLE) == LOOPBACK and not any(map(_is_here, hosts))


def _is_here(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_link_local(address: str) -> bool:
    return ":" in address and ipaddress.ip_address(address).is_link_local


def _first_ipv4(addresses: Iterable[str]) -> str:
    return next((address for address in addresses if ":" not in address), "ADDRESS")


def _default_source() -> str | None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(_SOMEWHERE)
            return str(probe.getsockname()[0])
    except OSError:
        return None
