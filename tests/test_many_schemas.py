"""Made-up schemas through the real engine: what is not cut off by its length holds to its schema.

Two hundred, or as many as NUM_SCHEMAS says: `make test-long NUM_SCHEMAS=1000`.
"""

import asyncio
import json
import os
import random
from collections import Counter
from decimal import Decimal
from typing import Any

import httpx
import jsonschema
import pytest

from tests.processes import Pipeline

pytestmark = [pytest.mark.pipeline, pytest.mark.long, pytest.mark.timeout(1800)]

NUM_SCHEMAS = int(os.environ.get("NUM_SCHEMAS", "200"))
AT_ONCE, MAX_TOKENS, MAX_DEPTH = 16, 100, 3
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "hostname")
PATTERNS = ("^[A-Z]{2}[0-9]{3}$", "^(red|green|blue)$", "^[a-z]+@[a-z]+\\.com$", "[0-9]")


def made_up(dice: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of keywords that llguidance knows, and of which an answer is short."""
    simple = [of_string, of_number, of_integer, of_enum, lambda _: {"type": dice.choice(["null", "boolean"])}]
    if depth == MAX_DEPTH or (depth and dice.random() < 0.5):
        return dice.choice(simple)(dice)
    kind = dice.choice([of_object, of_object, of_array, of_choice, of_reference])
    return kind(dice, depth + 1)


def of_string(dice: random.Random) -> dict[str, Any]:
    keywords = [{}, {"minLength": 2}, {"pattern": dice.choice(PATTERNS)}, {"format": dice.choice(FORMATS)}]
    keyword = dice.choice(keywords)
    return {"type": "string", **keyword} if "pattern" in keyword or "format" in keyword else {
        "type": "string", "maxLength": dice.randint(2, 20), **keyword
    }  # fmt: skip


def of_integer(dice: random.Random) -> dict[str, Any]:
    low = dice.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + dice.randint(0, 5000)}


def of_number(dice: random.Random) -> dict[str, Any]:
    low = dice.choice([-1.5, 0, 0.25, 10])
    return {"type": "number", dice.choice(["minimum", "exclusiveMinimum"]): low, "maximum": low + 3}


def of_enum(dice: random.Random) -> dict[str, Any]:
    values = [None, True, 0, -1.5, "", 'a "quote"', "grün", "\n", [1, "2"], {"a": {}}]
    return {"const": dice.choice(values)} if dice.random() < 0.3 else {"enum": dice.sample(values, 3)}


def of_object(dice: random.Random, depth: int) -> dict[str, Any]:
    names = dice.sample(["name", "age", "a b", "größe", "$ref", "type", "x\ty", "items", ""], dice.randint(1, 4))
    required = [name for name in names if dice.random() < 0.7]
    properties = {name: made_up(dice, depth) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def of_array(dice: random.Random, depth: int) -> dict[str, Any]:
    if dice.random() < 0.3:
        first = [made_up(dice, depth) for _ in range(2)]
        return {"type": "array", "prefixItems": first, "items": False, "minItems": dice.randint(0, 2)}
    low = dice.randint(0, 2)
    return {"type": "array", "items": made_up(dice, depth), "minItems": low, "maxItems": low + dice.randint(0, 2)}


def of_choice(dice: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [made_up(dice, depth) for _ in range(dice.randint(1, 3))]}


def of_reference(dice: random.Random, depth: int) -> dict[str, Any]:
    """A tree, of which the root only may refer to itself by name: others refer to it."""
    if depth > 1:
        return {"type": "array", "items": {"$ref": "#"}, "maxItems": 1}
    return {"$defs": {"part": made_up(dice, depth)}, "type": "array", "items": {"$ref": "#/$defs/part"}, "maxItems": 2}


def outcomes_of(schemas: dict[int, dict[str, Any]], url: str, model: str) -> Counter[str]:
    """Schemas by the seed of their answers. How many answers ended how, and what was wrong with others."""

    async def ask(client: httpx.AsyncClient, turns: asyncio.Semaphore, seed: int, schema: dict[str, Any]) -> str:
        body = {
            "model": model, "max_tokens": MAX_TOKENS, "temperature": 1, "seed": seed,
            "messages": [{"role": "user", "content": "Make something up."}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "any", "schema": schema}},
        }  # fmt: skip
        async with turns:
            answer = await client.post("/v1/chat/completions", json=body)
        if answer.status_code != 200:
            return f"{seed}: {answer.text}: {json.dumps(schema)}"
        (choice,) = answer.json()["choices"]
        if choice["finish_reason"] == "stop":
            try:  # numbers as they are written: 10.0000000000000003 is above 10, though not as a float
                jsonschema.validate(json.loads(choice["message"]["content"], parse_float=Decimal), schema)
            except (ValueError, jsonschema.ValidationError) as error:
                return f"{seed}: {error}: {choice['message']['content']}"
        return str(choice["finish_reason"])

    async def run() -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            turns = asyncio.Semaphore(AT_ONCE)
            return await asyncio.gather(*(ask(client, turns, seed, schema) for seed, schema in schemas.items()))

    return Counter(asyncio.run(run()))


def test_every_answer_holds_to_its_schema(pipeline: Pipeline, embedded_model: str) -> None:
    schemas = {seed: made_up(random.Random(seed)) for seed in range(NUM_SCHEMAS)}
    outcomes = outcomes_of(schemas, pipeline.url, embedded_model)
    print(outcomes)
    assert outcomes.keys() <= {"stop", "length"}
    assert outcomes["stop"] > NUM_SCHEMAS / 2
