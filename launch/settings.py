"""What the environment says about a launch, read once, in one place; and how a launch speaks to a person."""

import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationError

ROOT = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"
BIN = Path(sys.executable).parent
"""Where wheels put their programs."""

EMBEDDED_MODEL = "models/SmolLM2-135M-Instruct"
"""Also the name that clients send: the value of `--model`, as in the chapter."""

Port = Annotated[int, Field(ge=1, le=65535)]
Words = Annotated[list[str], BeforeValidator(shlex.split)]
InRoot = Annotated[Path, AfterValidator(lambda path: (ROOT / path).resolve())]


class LaunchError(Exception):
    """A launch cannot start or go on. The message is one line for the person at the terminal, then quotes of logs."""


def say(line: str) -> None:
    with suppress(OSError):  # a closed terminal is no reason not to stop in order
        print(line, flush=True)


def shown(path: Path) -> Path:
    """As somebody in the checkout would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


class Settings(BaseModel):
    """One launch. A given server already runs, and is used in place of an own one."""

    nats_port: Port = Field(4222, alias="NATS_PORT")
    nats_monitoring_port: Port = Field(8222, alias="NATS_MONITORING_PORT")
    etcd_port: Port = Field(2379, alias="ETCD_PORT")
    http_port: Port = Field(8080, alias="HTTP_PORT")
    given_nats_server: str | None = Field(None, alias="NATS_SERVER")
    given_etcd_endpoints: str | None = Field(None, alias="ETCD_ENDPOINTS")
    model: str = Field(EMBEDDED_MODEL, alias="MODEL")
    engine_args: Words = Field([], alias="ENGINE_ARGS")
    num_engines: Annotated[int, Field(ge=1, le=16)] = Field(1, alias="ENGINES")
    has_router: bool = Field(False, alias="ROUTER")
    ready_timeout_s: float = Field(600.0, alias="READY_TIMEOUT_S")
    is_run_once: bool = Field(False, alias="RUN_ONCE")
    data_folder: InRoot = Field(ROOT / ".data", alias="DATA_DIR")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Settings":
        """Read the variables; an empty one counts as not set.

        Raises:
            LaunchError: one holds what cannot be.
        """
        try:
            return cls.model_validate({name: value for name, value in environ.items() if value})
        except ValidationError as error:
            first = error.errors()[0]
            raise LaunchError(f"{first['loc'][0]}={first['input']}: {first['msg']}") from None

    @property
    def nats_server(self) -> str:
        return self.given_nats_server or f"nats://{LOOPBACK}:{self.nats_port}"

    @property
    def etcd_endpoints(self) -> str:
        return self.given_etcd_endpoints or f"http://{LOOPBACK}:{self.etcd_port}"

    @property
    def server_variables(self) -> dict[str, str]:
        """Dynamo's own, for those who connect to them."""
        return {"NATS_SERVER": self.nats_server, "ETCD_ENDPOINTS": self.etcd_endpoints}

    @property
    def frontend_url(self) -> str:
        return f"http://localhost:{self.http_port}"

    @property
    def run_folder(self) -> Path:
        """Of all launches but `make infra`: so `make status` finds each of them."""
        return self.data_folder / "run"
