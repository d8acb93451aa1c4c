"""What a router is for, shown: the time to the first token of each turn of a conversation, without it and with it."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable

from launch.command import LaunchError, say
from launch.first_question import ANSWER_TIMEOUT_S
from launch.settings import LOOPBACK, Settings

_TEXT = "The keeper climbs the stairs, lights the lamp, and writes down who came by: ships, birds, fog and rain. " * 24
TURNS = (
    "I am writing about a {place}. Greet me in one sentence.",
    f"Here is what I have so far. {_TEXT} Praise it in one sentence.",
    "Find a title for it.",
)
MAX_TOKENS = 12


def show_conversations(settings: Settings, start_router: Callable[[], None]) -> None:
    """The same conversation about two places, so that none finds what the other one left."""
    say(f"\nrun: a conversation with {settings.num_engines} engines; its second turn brings a long text")
    say("run: seconds to the first token       turn 1   turn 2   turn 3")
    say(_row("engines take turns", conversation(settings, "mill")))
    start_router()
    say(_row("a router chooses", conversation(settings, "lighthouse")))
    say("run: the third turn repeats all before it; the engine that answered the second one has that in its cache,")
    say("run: and the router knows which one it was\n")


def _row(who: str, seconds: list[float]) -> str:
    return f"run: {who:<32}" + "".join(f"{each:9.2f}" for each in seconds)


def conversation(settings: Settings, place: str) -> list[float]:
    """Seconds to the first token, of each turn."""
    messages: list[dict[str, str]] = []
    seconds = []
    for turn in TURNS:
        messages.append({"role": "user", "content": turn.format(place=place)})
        first_s, text = ask(settings, messages)
        messages.append({"role": "assistant", "content": text})
        seconds.append(first_s)
    return seconds


def ask(settings: Settings, messages: list[dict[str, str]]) -> tuple[float, str]:
    """Seconds to the first token, and the whole answer, streamed.

    Raises:
        LaunchError: there is none.
    """
    body = {"model": settings.model, "messages": messages, "max_tokens": MAX_TOKENS, "stream": True}
    connection = http.client.HTTPConnection(LOOPBACK, settings.http_port, timeout=ANSWER_TIMEOUT_S)
    started_at, first_s, text = time.monotonic(), None, ""
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        for line in connection.getresponse():
            if line.startswith(b"data: {"):
                choices = json.loads(line.removeprefix(b"data: ")).get("choices")
                if content := choices and choices[0]["delta"].get("content"):
                    first_s = first_s or time.monotonic() - started_at
                    text += content
    except (OSError, http.client.HTTPException) as error:
        raise LaunchError(f"the conversation failed: {error}") from error
    finally:
        connection.close()
    if first_s is None:
        raise LaunchError("a turn of the conversation got no answer")
    return first_s, text
