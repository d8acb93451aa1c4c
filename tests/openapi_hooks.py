"""What schemathesis is told in test_openapi.py: ask the served model, in few tokens, and read streams to the letter.

schemathesis loads this file by itself (SCHEMATHESIS_HOOKS), in a process of its own.
"""

from typing import Any

import schemathesis
from schemathesis import Case, CheckContext, HookContext, Response

from tests.processes import MODEL
from tests.streams import read_stream

VOCAB_SIZE = 49152
MOST_TOKENS = 3


def _is_count(value: Any) -> bool:
    return type(value) in (int, float) and value >= 1 and value == int(value)


def _with_a_schema(response_format: dict[str, Any]) -> dict[str, Any]:
    """One that there is a grammar for, in place of any object."""
    json_schema = response_format.get("json_schema")
    if not isinstance(json_schema, dict) or not isinstance(json_schema.get("schema"), dict):
        return response_format
    return {**response_format, "json_schema": {**json_schema, "schema": {"type": "integer"}}}


@schemathesis.hook
def map_body(context: HookContext, body: Any) -> Any:
    """The rules that a JSON schema cannot say. What is wrong in a body stays wrong."""
    if not isinstance(body, dict):
        return body
    body = dict(body)
    if isinstance(body.get("model"), str) and body["model"]:
        body["model"] = MODEL
    if body.get("max_tokens") is None or _is_count(body["max_tokens"]):
        body["max_tokens"] = min(body.get("max_tokens") or MOST_TOKENS, MOST_TOKENS)
    if _is_count(body.get("max_completion_tokens")):
        body["max_completion_tokens"] = min(body["max_completion_tokens"], MOST_TOKENS)
    if isinstance(body.get("response_format"), dict):
        body["response_format"] = _with_a_schema(body["response_format"])
    bias = body.get("logit_bias")
    if isinstance(bias, dict) and all(key.isascii() and key.isdigit() and len(key) <= 10 for key in bias):
        body["logit_bias"] = {str(int(key) % VOCAB_SIZE): value for key, value in bias.items()}
    if isinstance(body.get("tools"), list) and body["tools"]:
        _choose_tool(body)
    if isinstance(ids := body.get("stop_token_ids"), list) and all(each == 0 or _is_count(each) for each in ids):
        body["stop_token_ids"] = [each % VOCAB_SIZE for each in ids]
    if _is_count(body.get("min_tokens")):
        body["min_tokens"] = 1
    return body


def _choose_tool(body: dict[str, Any]) -> None:
    """The model cannot choose by itself to call one. Without a grammar, an engine can be made to call none."""
    if body.get("tool_choice") in (None, "auto", "required") or _is_named_tool(body["tool_choice"]):
        body["tool_choice"] = "none"


def _is_named_tool(choice: Any) -> bool:
    match _without_nulls(choice):
        case {"type": "function", "function": dict() as function, **others} if not others:
            return list(_without_nulls(function)) == ["name"] and isinstance(function["name"], str)
    return False


def _without_nulls(value: Any) -> Any:
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, dict) else value


@schemathesis.check
def a_stream_is_to_the_letter(ctx: CheckContext, response: Response, case: Case) -> None:
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        read_stream(response.content)
