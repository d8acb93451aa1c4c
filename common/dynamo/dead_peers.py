"""Machines that vanish: without power or network nobody says goodbye, and TCP waits for ever.

Whoever reads an answer sends nothing, so only keepalive shows that the other end is gone. Dynamo does not switch it
on and does not hand out its sockets. The kernel does: it has all of this process, and on Linux a connection inherits
the keepalive of the socket that accepted it.
"""

import os
import socket
from contextlib import suppress

# The other end's kernel answers, however busy or stopped its process is. Silent for 3 s, then three questions in 6 s.
IDLE_S, INTERVAL_S, NUM_PROBES = 3, 2, 3


def detect_dead_peers() -> None:
    """Have every TCP socket that is open now, and those that they will accept, fail 9 s after the other end is gone."""
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
