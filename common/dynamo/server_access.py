"""Whether etcd and NATS let us in: asked before the runtime asks.

The runtime takes a refusal by etcd for an outage and tries again for two minutes; where etcd wants a user and none
is given, it connects, and each step after that fails. One small question to each server tells at once what is
wrong. A server that does not answer the question is left to the runtime.
"""

import asyncio
import base64
import http.client
import json
import os
import socket
import ssl
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from common.dynamo.environment import ETCD_TLS
from common.dynamo.servers import ServersMissing, etcd_urls, nats_urls

_TIMEOUT_S = 5.0
_INSTANCES = base64.b64encode(b"v1/instances").decode()
_NATS_SIGNING = ("NATS_AUTH_NKEY", "NATS_AUTH_CREDENTIALS_FILE")


async def check_access() -> None:
    """Raises:
    ServersMissing: a server refused us; the message says which, why, and which variables hold the credentials.
    """
    for url in etcd_urls():
        if await asyncio.to_thread(_etcd_answers, url):
            break
    for url in nats_urls():
        if await _nats_answers(url):
            break


def _etcd_answers(url: str) -> bool:
    """Log in and read a key through etcd's JSON gateway. False where nothing can be learned that way."""
    where = f"etcd at {urlsplit(url).netloc.rpartition('@')[2]}"
    user = os.environ.get("ETCD_AUTH_USERNAME")
    try:
        _ask_etcd_as_user(url, "kv/range", {"key": _INSTANCES})
    except urllib.error.HTTPError as error:
        # Without a name in the request, etcd may still know us by our certificate; not through its gateway.
        if error.code in (400, 401, 403) and (user or not url.startswith("https")):
            reason = _etcd_reason(error.read())
            if "not enabled" in reason:  # a name where none is needed does no harm
                return True
            raise ServersMissing(
                f"{where} refused us ({reason}): look at ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD."
            ) from None
        return False
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError, KeyError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLError):
            raise ServersMissing(
                f"no TLS with {where} ({_tls_reason(cause)}). Dynamo needs {', '.join(ETCD_TLS)} for it, all three, "
                "and no ETCD_AUTH_USERNAME."
            ) from None
        if not url.startswith("https") and _speaks_tls(url):
            raise ServersMissing(f"{where} speaks TLS: write https:// in ETCD_ENDPOINTS.") from None
        return False
    return True


def _speaks_tls(url: str) -> bool:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    address = (urlsplit(url).hostname or "localhost", urlsplit(url).port or 2379)
    try:
        with socket.create_connection(address, _TIMEOUT_S) as connection, context.wrap_socket(connection):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")  # it refuses us, in TLS
    except OSError:
        return False


async def is_lease_known(lease_id: int) -> bool:
    """Whether etcd still has the lease; true where it cannot be asked."""
    return await asyncio.to_thread(_is_lease_known, lease_id)


def _is_lease_known(lease_id: int) -> bool:
    for url in etcd_urls():
        with suppress(ServersMissing, http.client.HTTPException, OSError, ValueError, KeyError):
            return int(_ask_etcd_as_user(url, "lease/timetolive", {"ID": lease_id})["TTL"]) >= 0
    return True


def _ask_etcd_as_user(url: str, method: str, question: dict[str, Any]) -> dict[str, Any]:
    user, password = os.environ.get("ETCD_AUTH_USERNAME"), os.environ.get("ETCD_AUTH_PASSWORD")
    tls = _tls_context() if url.startswith("https") else None
    token = ""
    if user:
        token = _ask_etcd(url, "auth/authenticate", {"name": user, "password": password}, tls)["token"]
    return _ask_etcd(url, method, question, tls, token)


def _ask_etcd(
    url: str, method: str, question: dict[str, Any], tls: ssl.SSLContext | None, token: str = ""
) -> dict[str, Any]:
    request = urllib.request.Request(f"{url.rstrip('/')}/v3/{method}", json.dumps(question).encode())
    request.add_header("content-type", "application/json")
    if token:
        request.add_header("authorization", token)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls))
    with opener.open(request, timeout=_TIMEOUT_S) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


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


def _etcd_reason(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]).removeprefix("etcdserver: ")
    except (ValueError, KeyError, TypeError):
        return "no reason given"


def _tls_reason(error: ssl.SSLError) -> str:
    return str(getattr(error, "verify_message", "") or error.reason or error).lower().replace("_", " ")


async def _nats_answers(url: str) -> bool:
    """Say CONNECT as the runtime will. False where the server did not answer."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port or 4222)
            try:
                info = await _nats_info(reader)
                is_signed = any(os.environ.get(variable) for variable in _NATS_SIGNING)
                if not info.get("auth_required") or info.get("tls_required") or is_signed or urlsplit(url).username:
                    return True  # nothing to show, or nothing that we could show
                connect = {"verbose": False, "pedantic": False, "lang": "python", "version": "1", **_nats_login()}
                writer.write(f"CONNECT {json.dumps(connect)}\r\nPING\r\n".encode())
                answer = (await reader.readline()).decode(errors="replace")
            finally:
                writer.close()
    except (OSError, ValueError):  # TimeoutError is an OSError
        return False
    if answer.startswith("-ERR"):
        reason = answer.removeprefix("-ERR").strip().strip("'").lower()
        raise ServersMissing(
            f"NATS at {urlsplit(url).netloc.rpartition('@')[2]} refused us ({reason}): look at NATS_AUTH_USERNAME and "
            "NATS_AUTH_PASSWORD, or NATS_AUTH_TOKEN, NATS_AUTH_NKEY, NATS_AUTH_CREDENTIALS_FILE."
        )
    return True


async def _nats_info(reader: asyncio.StreamReader) -> dict[str, Any]:
    """What NATS says of itself to everybody who connects."""
    line = await reader.readline()
    info: dict[str, Any] = json.loads(line.removeprefix(b"INFO "))
    return info


def _nats_login() -> dict[str, str | None]:
    """The runtime takes the first of these that is there; it has a user and a password for itself otherwise."""
    user, password = os.environ.get("NATS_AUTH_USERNAME"), os.environ.get("NATS_AUTH_PASSWORD")
    token = os.environ.get("NATS_AUTH_TOKEN")
    if user and password:
        return {"user": user, "pass": password}
    return {"auth_token": token} if token else {"user": "user", "pass": "user"}


async def nats_max_payload() -> int | None:
    """The largest message that NATS carries, in bytes; None when it does not say."""
    for url in nats_urls():
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port or 4222)
                try:
                    return int((await _nats_info(reader))["max_payload"])
                finally:
                    writer.close()
        except (OSError, ValueError, KeyError):
            continue
    return None
