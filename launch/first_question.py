"""The chapter's last two terminal commands, run and checked: the curl, and the look into etcd."""

import json
import os
import shlex
import subprocess
import time
from contextlib import suppress
from typing import Any

import httpx

from launch.command import LaunchError, say
from launch.settings import BIN, Settings

ANSWER_TIMEOUT_S = 300

# Dynamo's variables for a secured etcd, and etcdctl's for the same.
ETCDCTL_VARIABLES = {
    "ETCD_AUTH_CA": "ETCDCTL_CACERT",
    "ETCD_AUTH_CLIENT_CERT": "ETCDCTL_CERT",
    "ETCD_AUTH_CLIENT_KEY": "ETCDCTL_KEY",
    "ETCD_AUTH_USERNAME": "ETCDCTL_USER",
    "ETCD_AUTH_PASSWORD": "ETCDCTL_PASSWORD",
}


def show_answer(settings: Settings) -> None:
    """The chapter's fourth terminal, and its look into etcd.

    Raises:
        LaunchError: either is not what it should be; the message holds what it is.
    """
    say(f"\n$ {curl_command(settings)}")
    started_at = time.monotonic()
    answer = ask(settings)
    say(json.dumps(answer, indent=2, ensure_ascii=False))
    say(f"run: answered in {time.monotonic() - started_at:.1f} s")
    say(f"\n$ {etcdctl_command(settings)}")
    say(instances(settings))


def curl_command(settings: Settings) -> str:
    """The chapter's curl, as a reader types it, for this launch's model."""
    question = (
        "{\n"
        f'    "model": {json.dumps(settings.model)},\n'
        '    "messages": [{"role": "user", "content": "Hello!"}],\n'
        '    "max_tokens": 25\n'
        "  }"
    )
    return (
        f"curl -X POST {settings.frontend_url}/v1/chat/completions \\\n"
        '  -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(question)}"
    )


def ask(settings: Settings) -> dict[str, Any]:
    """What that command sends, and its answer.

    Raises:
        LaunchError: it is not a chat completion with content.
    """
    _, _, _, url, *_, question = shlex.split(curl_command(settings))
    try:
        _, body = fetch(url, question, timeout_s=ANSWER_TIMEOUT_S)
    except httpx.HTTPError as error:
        raise LaunchError(f"the request failed: {error}") from error
    with suppress(ValueError, LookupError, TypeError):
        answer: dict[str, Any] = json.loads(body)
        if answer["choices"][0]["message"]["content"]:
            return answer
    raise LaunchError(f"the answer is not a chat completion with content: {body.strip() or 'nothing'}")


def fetch(url: str, json_body: str | None = None, *, timeout_s: float) -> tuple[int, str]:
    """GET, or POST some JSON: the status and the body, of an error too.

    Raises:
        httpx.HTTPError: there is no answer.
    """
    method, headers = ("POST", {"Content-Type": "application/json"}) if json_body else ("GET", {})
    # A proxy that the environment names has nothing to do with this machine's own servers.
    with httpx.Client(trust_env=False, timeout=timeout_s) as client:
        response = client.request(method, url, content=json_body, headers=headers)
    return response.status_code, response.text


def etcdctl_command(settings: Settings) -> str:
    """As a reader types it, from the checkout."""
    is_default = settings.etcd_endpoints in ("http://127.0.0.1:2379", "http://localhost:2379")
    where = "" if is_default else f" --endpoints {shlex.quote(settings.etcd_endpoints)}"
    return f".venv/bin/etcdctl{where} get --prefix v1/instances"


def instances(settings: Settings) -> str:
    """What etcdctl prints of the pipeline's instances.

    Raises:
        LaunchError: the engine or the processor is not among them.
    """
    # etcdctl refuses to run where this variable and its flag are both there.
    environ = {name: value for name, value in os.environ.items() if name != "ETCDCTL_ENDPOINTS"}
    environ |= {theirs: os.environ[ours] for ours, theirs in ETCDCTL_VARIABLES.items() if os.environ.get(ours)}
    command = [str(BIN / "etcdctl"), *shlex.split(etcdctl_command(settings))[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=environ)  # gives up after 5 s by itself
    found = done.stdout
    if done.returncode != 0:
        raise LaunchError(f"etcdctl failed: {done.stderr.strip()}")
    for instance in ("inference/engine/generate", "inference/processor/process"):
        if f"v1/instances/{instance}/" not in found:
            raise LaunchError(f"etcd knows no instance of {instance}: {found.strip() or 'it is empty'}")
    return found
