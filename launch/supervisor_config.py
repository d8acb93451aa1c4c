"""supervisord's configuration file, from a list of programs. Knows nothing about running it."""

from __future__ import annotations

import configparser
import hashlib
import io
import os
import pwd
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

LOGS = "logs"
DRAIN_S = 40
"""How long a program may take to end by itself after SIGTERM."""

SECONDS_TO_COUNT_AS_STARTED = 2
MAX_SOCKET_PATH = 90
"""The kernel's limit is 107 bytes, and supervisord appends a process id while it starts."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """One process to keep running. The lowest priority starts first and stops last."""

    name: str
    command: Sequence[str]
    priority: int


def logs_folder(folder: Path) -> Path:
    return folder / LOGS


def socket_file(folder: Path) -> Path:
    """In the folder, or where that makes too long a path for a socket, in the system's temporary folder."""
    path = folder / "supervisor.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
        return path
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"dynamo-chat-{digest}.sock"


def config_text(folder: Path, programs: Sequence[Program], directory: Path) -> str:
    """What supervisord, started in `folder`, and supervisorctl read; the programs run in `directory`."""
    config = configparser.RawConfigParser()
    socket = _literal(str(socket_file(folder)))
    config["supervisord"] = {
        "logfile": f"{LOGS}/supervisord.log",
        "pidfile": "supervisord.pid",
        "childlogdir": LOGS,
        "nodaemon": "true",
        "silent": "true",
        "minfds": "256",
    }
    if os.geteuid() == 0:  # supervisord warns of root unless the user is named
        config["supervisord"]["user"] = pwd.getpwuid(0).pw_name
    config["unix_http_server"] = {"file": socket, "chmod": "0700"}
    config["supervisorctl"] = {"serverurl": f"unix://{socket}"}
    config["rpcinterface:supervisor"] = {
        "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface"
    }
    for program in programs:
        config[f"program:{program.name}"] = _program_section(program, directory)
    text = io.StringIO()
    config.write(text)
    return text.getvalue()


def _program_section(program: Program, directory: Path) -> dict[str, str]:
    return {
        "command": _literal(shlex.join(program.command)),
        "directory": _literal(str(directory)),
        "priority": str(program.priority),
        "autorestart": "true",
        "startsecs": str(SECONDS_TO_COUNT_AS_STARTED),
        "startretries": "3",
        "stopsignal": "TERM",
        "stopwaitsecs": str(DRAIN_S),
        # SIGTERM goes to the program alone: an engine that drains still needs its scheduler. SIGKILL goes to all.
        "stopasgroup": "false",
        "killasgroup": "true",
        "redirect_stderr": "true",
        "stdout_logfile": f"{LOGS}/{program.name}.log",
        "stdout_logfile_maxbytes": "20MB",
        "stdout_logfile_backups": "1",
    }


def _literal(value: str) -> str:
    """supervisord's configuration gives % a meaning."""
    return value.replace("%", "%%")
