"""What a router is for, shown: the time to the first token of each turn of a conversation, without it and with it."""

import json
import time
from dataclasses import dataclass
from typing import Any

import httpx

from launch.command import LaunchError, say
from launch.first_question import ANSWER_TIMEOUT_S
from launch.settings import LOOPBACK, Settings

_TEXT = "The keeper climbs the stairs, lights the lamp, and writes down who came by: ships, birds, fog and rain. " * 60
TURNS = (
    "I am writing about a {place}. Greet me in one sentence.",
    f"Here is what I have so far. {_TEXT} Praise it in one sentence.",
    "Find a title for it.",
)
MAX_TOKENS = 12


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
        turns.append(ask(settings, messages))
        messages.append({"role": "assistant", "content": turns[-1].text})
    return turns


def ask(settings: Settings, messages: list[dict[str, str]]) -> Turn:
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
        with (
            httpx.Client(trust_env=False, timeout=ANSWER_TIMEOUT_S) as client,
            client.stream("POST", url, json=body) as response,
        ):
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
