"""The chapter's last two terminal commands, run and checked: the curl, and the look into etcd."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from launch.command import LaunchError
from launch.infra import local_opener
from launch.settings import LOOPBACK, Settings, binary

ANSWER_TIMEOUT_S = 300
INSTANCE_PREFIX = "v1/instances"
EXPECTED_INSTANCES = ("inference/engine/generate", "inference/processor/process")

# Dynamo's variables for a secured etcd, and etcdctl's for the same.
ETCDCTL_VARIABLES = {
    "ETCD_AUTH_CA": "ETCDCTL_CACERT",
    "ETCD_AUTH_CLIENT_CERT": "ETCDCTL_CERT",
    "ETCD_AUTH_CLIENT_KEY": "ETCDCTL_KEY",
    "ETCD_AUTH_USERNAME": "ETCDCTL_USER",
    "ETCD_AUTH_PASSWORD": "ETCDCTL_PASSWORD",
}


class WrongAnswer(LaunchError):
    """The pipeline is up and does not do what the chapter says; the message holds what it did."""


def chat_url(settings: Settings) -> str:
    return f"{settings.frontend_url}/v1/chat/completions"


def question(settings: Settings) -> str:
    """The chapter's JSON, for this launch's model."""
    return (
        "{\n"
        f'    "model": {json.dumps(settings.model)},\n'
        '    "messages": [{"role": "user", "content": "Hello!"}],\n'
        '    "max_tokens": 25\n'
        "  }"
    )


def curl_command(settings: Settings) -> str:
    """The chapter's curl, as a reader types it."""
    return (
        f"curl -X POST {chat_url(settings)} \\\n"
        '  -H "Content-Type: application/json" \\\n'
        f"  -d {shlex.quote(question(settings))}"
    )


def ask(settings: Settings) -> dict[str, Any]:
    """Send the question with that very command, or without curl on this machine, the same bytes.

    Raises:
        WrongAnswer: it is not a chat completion that says something.
    """
    try:
        body = _with_curl(settings) if shutil.which("curl") else _without_curl(settings)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WrongAnswer(f"the request failed: {error}") from error
    try:
        answer: dict[str, Any] = json.loads(body)
        content = answer["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        raise WrongAnswer(f"the answer is not a chat completion: {body.strip() or 'nothing'}") from None
    if not content:
        raise WrongAnswer(f"the answer has no content: {body}")
    return answer


def _with_curl(settings: Settings) -> str:
    no_proxy = {"NO_PROXY": f"localhost,{LOOPBACK}", "no_proxy": f"localhost,{LOOPBACK}"}
    done = subprocess.run(
        ["sh", "-c", curl_command(settings)],
        capture_output=True,
        text=True,
        timeout=ANSWER_TIMEOUT_S,
        env=os.environ | no_proxy,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise WrongAnswer(f"the request failed: {said[-1]}")
    return done.stdout


def _without_curl(settings: Settings) -> str:
    request = urllib.request.Request(
        chat_url(settings),
        data=question(settings).encode(),
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    try:
        with local_opener().open(request, timeout=ANSWER_TIMEOUT_S) as response:
            return str(response.read(), "utf-8")
    except urllib.error.HTTPError as error:  # as curl does: an error's body is an answer too
        with error:
            return str(error.read(), "utf-8")


def etcdctl_command(settings: Settings) -> str:
    """As a reader types it, from the checkout."""
    is_default = settings.etcd_endpoints in ("http://127.0.0.1:2379", "http://localhost:2379")
    where = "" if is_default else f" --endpoints {shlex.quote(settings.etcd_endpoints)}"
    return f".venv/bin/etcdctl{where} get --prefix {INSTANCE_PREFIX}"


def instances(settings: Settings, environ: Mapping[str, str]) -> str:
    """What etcdctl prints of the pipeline's instances.

    Raises:
        WrongAnswer: the engine or the processor is not among them.
    """
    secured = {theirs: environ[ours] for ours, theirs in ETCDCTL_VARIABLES.items() if environ.get(ours)}
    arguments = shlex.split(etcdctl_command(settings))[1:]
    done = subprocess.run(
        [binary("etcdctl"), *arguments], capture_output=True, text=True, timeout=30, env={**environ, **secured}
    )
    if done.returncode != 0:
        raise WrongAnswer(f"etcdctl failed: {done.stderr.strip()}")
    for instance in EXPECTED_INSTANCES:
        if f"{INSTANCE_PREFIX}/{instance}/" not in done.stdout:
            raise WrongAnswer(f"etcd knows no instance of {instance}: {done.stdout.strip() or 'it is empty'}")
    return done.stdout
