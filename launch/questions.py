"""What `make run` asks the pipeline: the chapter's question and its look into etcd, and conversations that show what a
router is for: the time to the first token of each turn, without it and with it.
"""

import json
import os
import shlex
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from launch.settings import BIN, LOOPBACK, LaunchError, Settings, say

ANSWER_TIMEOUT_S = 300

_TEXT = "The keeper climbs the stairs, lights the lamp, and writes down who came by: ships, birds, fog and rain. " * 60
TURNS = (
    "I am writing about a {place}. Greet me in one sentence.",
    f"Here is what I have so far. {_TEXT} Praise it in one sentence.",
    "Find a title for it.",
)
MAX_TOKENS = 12

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
    response = httpx.request(method, url, content=json_body, headers=headers, trust_env=False, timeout=timeout_s)
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
    if done.returncode != 0:
        raise LaunchError(f"etcdctl failed: {done.stderr.strip()}")
    for instance in ("inference/engine/generate", "inference/processor/process"):
        if f"v1/instances/{instance}/" not in done.stdout:
            raise LaunchError(f"etcd knows no instance of {instance}: {done.stdout.strip() or 'it is empty'}")
    return done.stdout


@dataclass(frozen=True)
class Turn:
    """first_token_s: seconds until it came. usage: OpenAI's."""

    first_token_s: float
    text: str
    usage: dict[str, Any]

    def found(self) -> str:
        """How much of the prompt was cached, where the engine tells."""
        details = self.usage.get("prompt_tokens_details") or {}
        if (num_cached := details.get("cached_tokens")) is None:
            return ""
        return f"   {num_cached} of {self.usage['prompt_tokens']} tokens cached"


def show_turns_of_engines(settings: Settings) -> None:
    """A conversation before there is a router."""
    say(f"\nrun: a conversation with {settings.num_engines} engines; its second turn brings a long text")
    say("run: seconds to the first token       turn 1   turn 2   turn 3")
    say(_row("engines take turns", conversation(settings, "mill")))


def show_choices_of_the_router(settings: Settings) -> None:
    """The same one about another place, so that it finds nothing that the first one left."""
    say(_row("a router chooses", conversation(settings, "lighthouse")))
    say("run: the third turn repeats all before it; the engine that answered the second one has that in its cache,")
    say("run: and the router knows which one it was\n")


def _row(who: str, turns: list[Turn]) -> str:
    return f"run: {who:<32}" + "".join(f"{turn.first_token_s:9.2f}" for turn in turns) + turns[-1].found()


def conversation(settings: Settings, place: str) -> list[Turn]:
    messages: list[dict[str, str]] = []
    turns = []
    for question in TURNS:
        messages.append({"role": "user", "content": question.format(place=place)})
        turns.append(answered_turn(settings, messages))
        messages.append({"role": "assistant", "content": turns[-1].text})
    return turns


def answered_turn(settings: Settings, messages: list[dict[str, str]]) -> Turn:
    """One turn, streamed.

    Raises:
        LaunchError: it has no answer.
    """
    body = {
        "model": settings.model, "messages": messages, "max_tokens": MAX_TOKENS,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    url = f"http://{LOOPBACK}:{settings.http_port}/v1/chat/completions"
    started_at, first_token_s, text = time.monotonic(), None, ""
    usage: dict[str, Any] = {}
    try:
        with httpx.stream("POST", url, json=body, trust_env=False, timeout=ANSWER_TIMEOUT_S) as response:
            for event in (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")):
                usage = event.get("usage") or usage
                for choice in event.get("choices", ()):
                    if content := choice["delta"].get("content"):
                        first_token_s = first_token_s or time.monotonic() - started_at
                        text += content
    except httpx.HTTPError as error:
        raise LaunchError(f"the conversation failed: {error}") from error
    if first_token_s is None:
        raise LaunchError("a turn of the conversation got no answer")
    return Turn(first_token_s, text, usage)
