"""Reading a stream of chat.completion.chunk events, with no more patience than the strictest client."""

import json
from dataclasses import dataclass, field
from typing import Any

import httpx

HEAD = ("id", "object", "created", "model")


@dataclass
class Stream:
    """One whole stream. events: its parsed JSON, without "[DONE]"; usage: of the last event, where asked for."""

    events: list[dict[str, Any]]
    is_done: bool
    error: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    contents: dict[int, str] = field(default_factory=dict)
    deltas: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    reasoning: dict[int, str] = field(default_factory=dict)
    tool_calls: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    num_tool_call_deltas: int = 0
    finish_reasons: dict[int, str] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """The text of the only choice."""
        (content,) = self.contents.values()
        return content


def events_of(raw: bytes) -> tuple[list[dict[str, Any]], bool]:
    """The JSON of each event, and whether "[DONE]" ended them. An event is one `data: ` line and a blank line."""
    assert raw.endswith(b"\n\n"), raw[-200:]
    blocks = raw.decode().removesuffix("\n\n").split("\n\n")
    for block in blocks:
        assert block.startswith("data: "), block
        assert "\n" not in block, block
        assert "\r" not in block, block
    data = [block.removeprefix("data: ") for block in blocks]
    is_done = data[-1] == "[DONE]"
    return [json.loads(text) for text in (data[:-1] if is_done else data)], is_done


def read_stream(raw: bytes) -> Stream:
    """A stream, checked: heads, the order of each choice's chunks, the places of usage and of an error."""
    events, is_done = events_of(raw)
    stream = Stream(events, is_done)
    if "error" in events[-1]:
        assert not is_done, "an error is followed by [DONE]"
        stream.error = _error_of(events[-1])
        events = events[:-1]
    else:
        assert is_done, raw[-200:]
    if not events:
        return stream
    assert events[0]["id"].startswith("chatcmpl-")
    assert events[0]["object"] == "chat.completion.chunk"
    for event in events:
        assert {name: event[name] for name in HEAD} == {name: events[0][name] for name in HEAD}
    if "usage" in events[0]:
        _read_usage(stream, events)
    for event in events:
        assert ("usage" in event) == ("usage" in events[0])
        if event["choices"]:
            (choice,) = event["choices"]
            _read_choice(stream, choice)
    if is_done:
        assert stream.contents.keys() == stream.finish_reasons.keys()
    return stream


def _error_of(event: dict[str, Any]) -> dict[str, Any]:
    assert set(event) == {"error"}
    error: dict[str, Any] = event["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def _read_usage(stream: Stream, events: list[dict[str, Any]]) -> None:
    """Null, or everywhere and never less than before; and in one more event with no choices."""
    usages = [event["usage"] for event in events if event["choices"]]
    if any(usage is not None for usage in usages):
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts)
    if stream.is_done:
        assert events[-1]["choices"] == []
        stream.usage = events[-1]["usage"]
        assert stream.usage is not None
        assert stream.usage["total_tokens"] == stream.usage["prompt_tokens"] + stream.usage["completion_tokens"]


def _read_choice(stream: Stream, choice: dict[str, Any]) -> None:
    """The role and empty content first, then content, then an empty delta with the finish_reason."""
    assert set(choice) == {"index", "delta", "logprobs", "finish_reason"}
    index, delta = choice["index"], choice["delta"]
    assert index not in stream.finish_reasons, "a chunk after the finish_reason"
    if index not in stream.contents:
        assert delta in ({"role": "assistant", "content": content, "refusal": None} for content in ("", None))
        assert choice["finish_reason"] is None
        stream.contents[index], stream.deltas[index], stream.logprobs[index] = "", [], []
        stream.tool_calls[index], stream.reasoning[index] = [], ""
    elif choice["finish_reason"] is not None:
        assert delta == {}
        assert choice["finish_reason"] in ("stop", "length", "tool_calls")
        stream.finish_reasons[index] = choice["finish_reason"]
    else:
        _read_delta(stream, index, delta)
        if choice["logprobs"] is not None:
            stream.logprobs[index] += choice["logprobs"]["content"]


def _read_delta(stream: Stream, index: int, delta: dict[str, Any]) -> None:
    """Thoughts, content, or a piece of one call."""
    if "reasoning_content" in delta:
        assert set(delta) == {"reasoning_content"}
        assert not stream.contents[index]
        stream.reasoning[index] += delta["reasoning_content"]
    elif "tool_calls" in delta:
        assert set(delta) == {"tool_calls"}
        (call,) = delta["tool_calls"]
        stream.num_tool_call_deltas += 1
        _read_tool_call(stream.tool_calls[index], call)
    else:
        assert set(delta) == {"content"}
        stream.contents[index] += delta["content"]
        stream.deltas[index].append(delta["content"])


def _read_tool_call(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    """A call's id, type and name in its first delta and in no other; calls one after the other."""
    if delta["index"] == len(calls):
        assert set(delta) == {"index", "id", "type", "function"}
        assert set(delta["function"]) == {"name", "arguments"}
        calls.append({key: delta[key] for key in ("id", "type")} | {"function": dict(delta["function"])})
    else:
        assert set(delta) == {"index", "function"}
        assert delta["index"] == len(calls) - 1
        assert set(delta["function"]) == {"arguments"}
        calls[-1]["function"]["arguments"] += delta["function"]["arguments"]


def ask_stream(client: httpx.Client, body: dict[str, Any], **headers: str) -> Stream:
    """The answer to a body, asked for as a stream."""
    response = client.post("/v1/chat/completions", json=body | {"stream": True}, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].split(";")[0] == "text/event-stream"
    return read_stream(response.content)
