"""What is under Dynamo: etcd and NATS, the address where answers come in, and machines that are gone.

etcd and NATS are asked one small question each before the runtime is opened, which tells at once what is wrong. The
runtime's constructor blocks, its errors speak of gRPC, it takes a refusal by etcd for an outage and tries again for
two minutes; where etcd wants a user and none is given, it connects, and each step after that fails. A server that does
not answer the question is left to the runtime.
"""

import asyncio
import base64
import http.client
import json
import logging
import os
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit

import psutil

from common.environment import ETCD_TLS

logger = logging.getLogger(__name__)

_TIMEOUT_S = 5.0
_CONNECT_TIMEOUT_S = 2.0
_POLL_S = 0.5
_INSTANCES = base64.b64encode(b"v1/instances").decode()
_NATS_SIGNING = ("NATS_AUTH_NKEY", "NATS_AUTH_CREDENTIALS_FILE")

RESPONSE_HOST = "DYN_TCP_RESPONSE_STREAM_HOST"
"""Names the network interface on which answers come in: the address that workers are told when they are called."""
# Where no packet goes: connecting a UDP socket only asks for a route. (RFC 5737)
_SOMEWHERE = ("192.0.2.1", 9)
_IP = (socket.AF_INET, socket.AF_INET6)
# The other end's kernel answers, however busy or stopped its process is. Silent for 3 s, then three questions in 6 s.
_KEEPALIVE = {socket.TCP_KEEPIDLE: 3, socket.TCP_KEEPINTVL: 2, socket.TCP_KEEPCNT: 3}
_LOOK_S = 3.0


class ServersMissing(Exception):
    """A needed server did not accept a connection in time, or refused us."""


class Server(NamedTuple):
    """A server that the pipeline needs, as one of Dynamo's own variables names it. Any one of `urls` will do."""

    name: str
    variable: str
    default: str

    @property
    def urls(self) -> list[str]:
        """The variable's URLs, one or several with commas between; each with a scheme."""
        urls = (url.strip() for url in (os.environ.get(self.variable) or self.default).split(","))
        return [url if "//" in url else f"{urlsplit(self.default).scheme}://{url}" for url in urls if url]

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Raises:
        ServersMissing: the variable holds something that is not an address.
        """
        try:
            return [self.address(urlsplit(url)) for url in self.urls]
        except ValueError as error:  # the URL itself may hold a password
            raise ServersMissing(f"{self.variable} is not an address: {error}.") from None

    def address(self, url: SplitResult) -> tuple[str, int]:
        return url.hostname or "localhost", url.port or urlsplit(self.default).port or 0

    def __str__(self) -> str:
        return f"{self.name} at {', '.join(f'{host}:{port}' for host, port in self.addresses)} ({self.variable})"


ETCD = Server("etcd", "ETCD_ENDPOINTS", "http://localhost:2379")
NATS = Server("NATS", "NATS_SERVER", "nats://localhost:4222")
SERVERS = (ETCD, NATS)


async def wait_for_servers(timeout_s: float, servers: Iterable[Server] = SERVERS) -> None:
    """Return once each server accepts connections, saying once what is being waited for.

    Raises:
        ServersMissing: `timeout_s` passed; the message names the server and the variable that moves it.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    for server in servers:
        is_announced = False
        while not await _is_up(server):
            if loop.time() >= deadline:
                raise ServersMissing(f"{server} did not answer within {timeout_s:.0f} s. Is it running?")
            if not is_announced:
                logger.warning("waiting for %s", server)
                is_announced = True
            await asyncio.sleep(_POLL_S)


async def _is_up(server: Server) -> bool:
    for host, port in server.addresses:
        with suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, writer = await asyncio.open_connection(host, port)
            writer.close()
            return True
    return False


async def check_access() -> None:
    """Raises:
    ServersMissing: a server refused us; the message says which, why, and which variables hold the credentials.
    """
    for url in ETCD.urls:
        if await asyncio.to_thread(_etcd_answers, url):
            break
    for url in NATS.urls:
        if await _nats_answers(urlsplit(url)):
            break


def is_lease_known(lease_id: int) -> bool:
    """Whether etcd still has the lease; true where it cannot be asked. Blocks for as long as etcd takes."""
    for url in ETCD.urls:
        with suppress(ServersMissing, http.client.HTTPException, OSError, ValueError, KeyError):
            return int(_ask_etcd_as_user(url, "lease/timetolive", {"ID": lease_id})["TTL"]) >= 0
    return True


async def nats_max_payload() -> int | None:
    """The largest message that NATS carries, in bytes; None when it does not say."""
    for url in NATS.urls:
        with suppress(OSError, ValueError, KeyError):
            async with _nats(urlsplit(url)) as (info, _, _):
                return int(info["max_payload"])
    return None


@asynccontextmanager
async def _nats(url: SplitResult) -> AsyncIterator[tuple[dict[str, Any], asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection, and what NATS says of itself to everybody who connects."""
    async with asyncio.timeout(_TIMEOUT_S):
        reader, writer = await asyncio.open_connection(*NATS.address(url))
        try:
            yield json.loads((await reader.readline()).removeprefix(b"INFO ")), reader, writer
        finally:
            writer.close()


def _etcd_answers(url: str, num_tries: int = 3) -> bool:
    """Log in and read a key through etcd's JSON gateway. False where nothing can be learned that way."""
    where = f"etcd at {urlsplit(url).netloc.rpartition('@')[2]}"
    try:
        _ask_etcd_as_user(url, "kv/range", {"key": _INSTANCES})
    except urllib.error.HTTPError as error:
        # Without a name in the request, etcd may still know us by our certificate; not through its gateway.
        is_by_name = os.environ.get("ETCD_AUTH_USERNAME") or not url.startswith("https")
        if error.code not in (400, 401, 403) or not is_by_name:
            return False
        reason = _etcd_reason(error.read())
        if "not enabled" in reason:  # a name where none is needed does no harm
            return True
        hint = "look at ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD."
        raise ServersMissing(f"{where} refused us ({reason}): {hint}") from None
    except (http.client.HTTPException, OSError, ValueError, KeyError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLError):
            reason = str(getattr(cause, "verify_message", "") or cause.reason or cause).lower().replace("_", " ")
            needed = f"Dynamo needs {', '.join(ETCD_TLS)} for it, all three, and no ETCD_AUTH_USERNAME."
            raise ServersMissing(f"no TLS with {where} ({reason}). {needed}") from None
        if isinstance(cause, ConnectionResetError) and num_tries > 1:  # so ends one greeting in 25 of TLS without TLS
            return _etcd_answers(url, num_tries - 1)
        if not url.startswith("https") and _speaks_tls(url):
            raise ServersMissing(f"{where} speaks TLS: write https:// in ETCD_ENDPOINTS.") from None
        return False
    return True


def _etcd_reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]).removeprefix("etcdserver: ")
    except (ValueError, KeyError, TypeError):
        return "no reason given"


def _speaks_tls(url: str) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection(ETCD.address(urlsplit(url)), _TIMEOUT_S) as connection,
            context.wrap_socket(connection),
        ):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # it refuses us, in TLS
    except OSError:
        return False


def _ask_etcd_as_user(url: str, method: str, question: dict[str, Any]) -> dict[str, Any]:
    user, password = os.environ.get("ETCD_AUTH_USERNAME"), os.environ.get("ETCD_AUTH_PASSWORD")
    tls = urllib.request.HTTPSHandler(context=_tls_context() if url.startswith("https") else None)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), tls)

    def ask(method: str, question: dict[str, Any], **headers: str) -> dict[str, Any]:
        headers["content-type"] = "application/json"
        request = urllib.request.Request(f"{url.rstrip('/')}/v3/{method}", json.dumps(question).encode(), headers)
        with opener.open(request, timeout=_TIMEOUT_S) as response:
            answer: dict[str, Any] = json.load(response)
            return answer

    if not user:
        return ask(method, question)
    login = ask("auth/authenticate", {"name": user, "password": password})
    return ask(method, question, authorization=login["token"])


def _tls_context() -> ssl.SSLContext:
    """Trust and certificate as the runtime has them.

    Raises:
        ServersMissing: a file cannot be used.
    """
    ca, certificate, key = (os.environ.get(name) for name in ETCD_TLS)
    if not (ca and certificate and key) or os.environ.get("ETCD_AUTH_USERNAME"):
        return ssl.create_default_context()
    try:
        context = ssl.create_default_context(cafile=ca)
        context.load_cert_chain(certificate, key)
    except OSError as error:  # an SSLError is one
        raise ServersMissing(f"cannot use {', '.join(ETCD_TLS)}: {error.strerror or error}.") from None
    return context


async def _nats_answers(url: SplitResult) -> bool:
    """Say CONNECT as the runtime will. False where the server did not answer."""
    try:
        async with _nats(url) as (info, reader, writer):
            is_signed = any(os.environ.get(variable) for variable in _NATS_SIGNING)
            if not info.get("auth_required") or info.get("tls_required") or is_signed or url.username:
                return True  # nothing to show, or nothing that we could show
            connect = {"verbose": False, "pedantic": False, "lang": "python", "version": "1", **_nats_login()}
            writer.write(f"CONNECT {json.dumps(connect)}\r\nPING\r\n".encode())
            answer = (await reader.readline()).decode(errors="replace")
    except (OSError, ValueError):
        return False
    if answer.startswith("-ERR"):
        reason = answer.removeprefix("-ERR").strip().strip("'").lower()
        raise ServersMissing(
            f"NATS at {url.netloc.rpartition('@')[2]} refused us ({reason}): look at NATS_AUTH_USERNAME and "
            "NATS_AUTH_PASSWORD, or NATS_AUTH_TOKEN, NATS_AUTH_NKEY, NATS_AUTH_CREDENTIALS_FILE."
        )
    return True


def _nats_login() -> dict[str, str | None]:
    """The runtime takes the first of these that is there; it has a user and a password for itself otherwise."""
    user, password = os.environ.get("NATS_AUTH_USERNAME"), os.environ.get("NATS_AUTH_PASSWORD")
    token = os.environ.get("NATS_AUTH_TOKEN")
    if user and password:
        return {"user": user, "pass": password}
    return {"auth_token": token} if token else {"user": "user", "pass": "user"}


def choose_response_address() -> None:
    """Have Dynamo listen on an address of the interface that the operator named.

    Dynamo takes the interface's last address, which on most machines is a link-local one of IPv6, and cannot listen
    there. Without the variable it takes the address that the default route leaves from. So the name is left away where
    that comes to the same, and refused where it does not.

    Raises:
        ServersMissing: there is no such interface, or Dynamo cannot use its address.
    """
    name = os.environ.get(RESPONSE_HOST, "")
    addresses = [entry.address for entry in psutil.net_if_addrs().get(name, ()) if entry.family in _IP]
    if not name:
        os.environ.pop(RESPONSE_HOST, None)
    elif not addresses:
        raise ServersMissing(f"{RESPONSE_HOST}={name}: this machine has no such network interface with an address.")
    elif addresses[-1].startswith("fe80:"):  # link-local
        if _default_source() not in addresses:
            first_ipv4 = next((address for address in addresses if ":" not in address), "ADDRESS")
            raise ServersMissing(
                f"{RESPONSE_HOST}={name}: Dynamo would listen on {addresses[-1]}, which is no use. Give the address a "
                f"name of its own (ip address add {first_ipv4}/... dev {name} label {name}:chat) and set "
                f"{RESPONSE_HOST}={name}:chat, or switch IPv6 off for {name}."
            )
        del os.environ[RESPONSE_HOST]


def is_out_of_reach() -> bool:
    """Whether only this machine's workers can answer, though NATS or etcd are on another one."""
    hosts = {host for server in SERVERS for host, _ in server.addresses}
    is_one_here = any(host in ("localhost", "::1") or host.startswith("127.") for host in hosts)
    return os.environ.get(RESPONSE_HOST) == "lo" and not is_one_here


def _default_source() -> str | None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(_SOMEWHERE)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def detect_dead_peers() -> None:
    """Have every TCP socket that is open now, and those that they will accept, fail 9 s after the other end is gone.

    Whoever reads an answer sends nothing, so only keepalive shows that the other end's machine has vanished. Dynamo
    does not switch it on and does not hand out its sockets; the kernel has all of this process, and on Linux a
    connection inherits the keepalive of the socket that accepted it.
    """
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # no TCP socket, or closed meanwhile
            tcp = socket.socket(fileno=int(descriptor))
            try:
                for option, value in _KEEPALIVE.items():
                    tcp.setsockopt(socket.IPPROTO_TCP, option, value)
                tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            finally:
                tcp.detach()  # it stays Dynamo's


async def keep_detecting_dead_peers() -> None:
    """For one that serves: it opens a connection for each answer, which may carry nothing for as long as it is open."""
    while True:
        with suppress(OSError):  # too many files are open
            await asyncio.to_thread(detect_dead_peers)
        await asyncio.sleep(_LOOK_S)
