"""Hosts to test with, on one machine: network namespaces, each with an address of its own on one bridge.

The bridge stands in the namespace of the tests, which reach every host through it. Root makes namespaces; where that
is not permitted, `why_no_hosts` says so.
"""

import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache

INTERFACE = "eth0"  # of each host; so is its loopback, which nobody else reaches
_PREFIX = "chat"  # of everything that is made here, with the pid of who made it
# Reserved for tests between networks (RFC 2544): no real host has such an address.
_NETWORK = f"198.18.{os.getpid() % 250}"


def _ip(*args: str) -> None:
    """Raises:
    RuntimeError: the kernel refused.
    """
    done = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=10, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(args)}: {done.stderr.strip()}")


@cache
def why_no_hosts() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    hosts = Hosts()
    try:
        hosts.start().add("probe")
    except RuntimeError as error:
        return f"network namespaces are not permitted here ({error})"
    finally:
        hosts.stop()
    return None


def _remove_what_killed_tests_left() -> None:
    namespaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=10, check=False).stdout
    for namespace, pid in re.findall(rf"^({_PREFIX}(\d+)-\S+)", namespaces, re.MULTILINE):
        if not os.path.exists(f"/proc/{pid}"):
            subprocess.run(["ip", "netns", "delete", namespace], check=False, timeout=10)
            subprocess.run(["ip", "link", "delete", f"{_PREFIX}{pid}b"], check=False, timeout=10, capture_output=True)


@dataclass(frozen=True)
class Host:
    """`launcher` before a command runs it there."""

    namespace: str
    address: str

    @property
    def launcher(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.namespace)

    def run(self, *command: str) -> str:
        return subprocess.run([*self.launcher, *command], capture_output=True, text=True, timeout=20, check=True).stdout


class Hosts:
    """A bridge and the hosts on it. Namespaces outlive the tests, so `stop` belongs into a `finally`."""

    def __init__(self) -> None:
        self._prefix = f"{_PREFIX}{os.getpid()}"
        self._bridge = f"{self._prefix}b"  # an interface's name has 15 characters at most
        self._hosts: list[Host] = []

    def start(self) -> "Hosts":
        _remove_what_killed_tests_left()
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("address", "add", f"{_NETWORK}.1/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        return self

    def add(self, name: str) -> Host:
        number = len(self._hosts) + 2
        host = Host(f"{self._prefix}-{name}", f"{_NETWORK}.{number}")
        _ip("netns", "add", host.namespace)
        self._hosts.append(host)
        port = self._port(host)
        _ip("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", host.namespace)
        _ip("link", "set", port, "master", self._bridge, "up")
        _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", INTERFACE)
        _ip("-n", host.namespace, "link", "set", INTERFACE, "up")
        _ip("-n", host.namespace, "link", "set", "lo", "up")
        _ip("-n", host.namespace, "route", "add", "default", "via", f"{_NETWORK}.1")
        return host

    def _port(self, host: Host) -> str:
        return f"{self._prefix}v{self._hosts.index(host)}"

    def cut_off(self, host: Host) -> None:
        """Pull its cable: nothing arrives and nothing leaves, and no connection is told."""
        _ip("link", "set", self._port(host), "down")

    def reconnect(self, host: Host) -> None:
        _ip("link", "set", self._port(host), "up")

    def stop(self) -> None:
        """Take everything down, whatever was there; processes in the namespaces have to end by themselves."""
        for host in self._hosts:
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False, timeout=10)
        subprocess.run(["ip", "link", "delete", self._bridge], check=False, timeout=10, capture_output=True)
