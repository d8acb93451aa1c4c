"""Chat requests for tests of faults: one by one, or as a load that goes on while something is done to the pipeline."""

import json
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from tests.processes import MODEL, Pipeline, wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 20}
_PAUSE_AFTER_FAILURE_S = 0.05


@dataclass(frozen=True)
class Asked:
    """One request and how it ended. outcome: "200" for a whole answer, else its status and code, the code of an error
    in the stream, or the name of a broken connection's exception.
    """

    outcome: str
    text: str
    started: float
    took_s: float

    @property
    def ended(self) -> float:
        return self.started + self.took_s


def chat(pipeline: Pipeline, timeout_s: float = 60, **fields: object) -> httpx.Response:
    return httpx.post(f"{pipeline.url}/v1/chat/completions", json=CHAT | fields, timeout=timeout_s)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in response.text
    return error


def ask(client: httpx.Client, fields: dict[str, Any], on_first: threading.Event | None = None) -> Asked:
    """One request, streamed or not; `on_first` is set with the first text of a stream."""
    started, text = time.monotonic(), ""
    try:
        if fields.get("stream"):
            with client.stream("POST", "/v1/chat/completions", json=CHAT | fields) as response:
                if response.status_code != 200:
                    response.read()
                    outcome = f"{response.status_code} {response.json()['error']['code']}"
                else:
                    outcome = "the stream has no end"
                    for line in response.iter_lines():
                        data = line.removeprefix("data: ")
                        if data == "[DONE]":
                            outcome = "200"
                        elif data:
                            event = json.loads(data)
                            if "error" in event:
                                outcome = f"in the stream: {event['error']['code']}"
                                continue
                            text += event["choices"][0]["delta"].get("content", "")
                            if on_first and text:
                                on_first.set()
        else:
            answer = client.post("/v1/chat/completions", json=CHAT | fields)
            if answer.status_code == 200:
                outcome, text = "200", answer.json()["choices"][0]["message"]["content"]
            else:
                outcome = f"{answer.status_code} {answer.json()['error']['code']}"
    except httpx.HTTPError as error:
        outcome = type(error).__name__
    return Asked(outcome, text, started, time.monotonic() - started)


def streamed_text(
    pipeline: Pipeline, on_first: threading.Event | None = None, timeout_s: float = 60, **fields: object
) -> str:
    """The joined deltas; the stream must end as it should."""
    with httpx.Client(base_url=pipeline.url, timeout=timeout_s) as client:
        asked = ask(client, {"stream": True} | fields, on_first)
    assert asked.outcome == "200"
    return asked.text


class Load:
    """Clients that ask again and again while something is done to the pipeline; keeps what they got.

    Answers are those of `tests.fake_engine`: all the same, so that one that lost or repeated a token is found.
    """

    def __init__(self, pipeline: Pipeline, *, num_clients: int = 4, **fields: object) -> None:
        self.pipeline, self.fields = pipeline, fields
        self.asked: list[Asked] = []
        self.outcomes: Counter[str] = Counter()
        self._text: str | None = None
        self._end = threading.Event()
        self._threads = ThreadPoolExecutor(num_clients)
        self._clients = [self._threads.submit(self._ask_on_and_on) for _ in range(num_clients)]

    def _ask_on_and_on(self) -> None:
        with httpx.Client(base_url=self.pipeline.url, timeout=60) as client:
            while not self._end.is_set():
                asked = ask(client, self.fields)
                outcome = asked.outcome
                if outcome == "200":
                    self._text = self._text or asked.text
                    if asked.text != self._text:
                        outcome = "wrong answer"
                self.asked.append(asked)
                self.outcomes[outcome] += 1
                if outcome != "200":
                    time.sleep(_PAUSE_AFTER_FAILURE_S)

    @property
    def slowest_s(self) -> float:
        return max(asked.took_s for asked in self.asked)

    def wait_for(self, num_answers: int, timeout_s: float = 60) -> float:
        """Until that many more whole answers have come. Returns the seconds it took."""
        target = self.outcomes["200"] + num_answers
        return wait_until(
            lambda: self.outcomes["200"] >= target, timeout_s, f"{num_answers} more answers; had {self.outcomes}"
        )

    def disturbed_s(self, since: float) -> float:
        """Seconds from `since` to the end of the last request that failed, or took much longer than those before."""
        usual_s = statistics.median(asked.took_s for asked in self.asked if asked.ended < since)
        limit_s = 3 * usual_s + 0.3
        disturbed = [asked.ended for asked in self.asked if asked.outcome != "200" or asked.took_s > limit_s]
        return max([0.0, *(ended - since for ended in disturbed)])

    def __enter__(self) -> "Load":
        try:
            self.wait_for(8)
        except TimeoutError:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._threads.shutdown()
        for client in self._clients:
            client.result()
        print(f"{dict(self.outcomes)}, longest wait {self.slowest_s:.1f} s")
