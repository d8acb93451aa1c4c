"""Whether a port is free, and who has it where not."""

from __future__ import annotations

import socket
from collections.abc import Iterable

import psutil

from launch.command import LaunchError
from launch.settings import LOOPBACK, Port


class PortTaken(LaunchError):
    """Somebody listens where we must; the message says who and what to do."""


def require_free(ports: Iterable[Port]) -> None:
    """Look before anything is started: a server's own complaint would be a line in a log.

    Raises:
        PortTaken: names the port, its purpose, its holder where known, and the variable that moves it.
    """
    for port in ports:
        if not _is_free(port.number):
            raise PortTaken(
                f"port {port.number}, for {port.purpose}, is taken by {_holder(port.number)}:"
                f" stop that, or choose another port with {port.variable}"
            )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: a port whose last connections are still closing counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def _holder(port: int) -> str:
    try:
        for connection in psutil.net_connections(kind="tcp"):
            is_listening = connection.status == psutil.CONN_LISTEN
            if is_listening and connection.pid and connection.laddr and connection.laddr.port == port:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        pass  # another user's process: only its owner may know
    return "another process"
