"""JSON schemas that clients send, before a grammar is made of them: are they small enough, and can an answer end?

What is compiled here runs in the engine beside everybody else's tokens, so the limits are far below what it could take;
they are above those of OpenAI's strict mode, except for the values of enums (ours 1000, as theirs).
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple
from urllib.parse import unquote

import msgspec
from pydantic import AfterValidator, Field

MAX_CHARACTERS = 65_536
MAX_DEPTH = 48  # of the JSON: what a property holds is two levels below its object
MAX_VALUES = 5000
MAX_ENUM_VALUES = 1000  # all of its enums together
MAX_PROPERTIES = 250  # of one object: llguidance's parser looks at all that may come next
MAX_STRING = 1000  # characters, of what becomes a part of the grammar

_DATA = ("const", "enum", "default", "examples")  # their values are no schemas
_TEXTS = ("description", "title", "$comment", "$id", "$schema")
_ANY_OBJECT = {"type": "object"}


def schema_text(schema: dict[str, Any] | None) -> str:
    """What an engine is sent; None: any JSON object. Without llguidance's own key: white space is not the client's."""
    asked = _ANY_OBJECT if schema is None else {name: value for name, value in schema.items() if name != "x-guidance"}
    return msgspec.json.encode(asked).decode()


def check_size(schema: dict[str, Any]) -> dict[str, Any]:
    """Looks at MAX_VALUES values at most.

    Raises:
        ValueError: it is too large.
    """
    num_enum_values = 0
    for num_values, (key, value, depth) in enumerate(_values(schema)):
        num_enum_values += len(value) if key == "enum" and isinstance(value, list) else 0
        if depth > MAX_DEPTH:
            raise ValueError(f"the schema is nested more than {MAX_DEPTH} levels deep")
        if num_values == MAX_VALUES:
            raise ValueError(f"the schema has more than {MAX_VALUES} values")
        if num_enum_values > MAX_ENUM_VALUES:
            raise ValueError(f"the schema's enums have more than {MAX_ENUM_VALUES} values")
        if key == "properties" and isinstance(value, dict) and len(value) > MAX_PROPERTIES:
            raise ValueError(f"an object has more than {MAX_PROPERTIES} properties")
        if isinstance(value, str) and key not in _TEXTS and len(value) > MAX_STRING:
            raise ValueError(f"a string of the schema has more than {MAX_STRING} characters")
    if len(schema_text(schema)) > MAX_CHARACTERS:
        raise ValueError(f"the schema has more than {MAX_CHARACTERS} characters")
    return schema


JsonSchema = Annotated[
    dict[str, Any],
    AfterValidator(check_size),
    Field(description="One that is too large, or that there is no grammar for, is a 400."),
]


def _values(schema: dict[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Each value with the key that leads to it, and its depth."""
    stack: list[tuple[str, Any, int]] = [("", schema, 0)]
    while stack:
        key, value, depth = stack.pop()
        yield key, value, depth
        if isinstance(value, dict):
            stack += [(name, inner, depth + 1) for name, inner in value.items()]
        elif isinstance(value, list):
            stack += [(key, inner, depth + 1) for inner in value]


def check_ends(root: dict[str, Any]) -> None:
    """Each part of a schema must have a JSON value: `{"$ref": "#"}` has none, nor has an object that holds another one
    of its kind, and so on.

    Raises:
        ValueError: some part has none.
    """
    parts = {id(part): _Part.of(part, root) for part in _parts(root)}
    dependents = defaultdict(list)
    for part_id, part in parts.items():
        for needed_id in itertools.chain(part.all_of, *part.any_of):
            dependents[needed_id].append(part_id)
    ending = dependents.keys() - parts.keys()  # no parts: a reference into an example, say
    pending = list(parts)
    while pending:
        part_id = pending.pop()
        if part_id not in ending and parts[part_id].ends(ending):
            ending.add(part_id)
            pending += dependents[part_id]
    if not ending.issuperset(parts):
        raise ValueError("the schema refers to itself in such a way that no answer could end")


class _Part(NamedTuple):
    """What has to have a value for a part of a schema to have one: all of these, and one of each of those. By id."""

    all_of: list[int]
    any_of: list[list[int]]

    @classmethod
    def of(cls, part: dict[str, Any], root: dict[str, Any]) -> "_Part":
        target = [_target(part["$ref"], root)] if isinstance(part.get("$ref"), str) else []
        choices = [_list_of(part, name) for name in ("anyOf", "oneOf")]
        return cls(
            _ids(target + _list_of(part, "allOf") + _always_within(part)),
            # One that is no object, such as true, has a value.
            [_ids(choice) for choice in choices if choice and all(isinstance(each, dict) for each in choice)],
        )

    def ends(self, ending: set[int]) -> bool:
        return ending.issuperset(self.all_of) and all(not ending.isdisjoint(choice) for choice in self.any_of)


def _ids(schemas: list[Any]) -> list[int]:
    return [id(schema) for schema in schemas if isinstance(schema, dict)]


def _parts(root: dict[str, Any]) -> Iterator[dict[str, Any]]:
    stack: list[Any] = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            yield value
            stack += [inner for name, inner in value.items() if name not in _DATA]
        elif isinstance(value, list):
            stack += value


def _always_within(part: dict[str, Any]) -> list[Any]:
    """The schemas of what an object or array of this part always holds."""
    properties = part.get("properties")
    if part.get("type") == "object" and isinstance(properties, dict):
        return [properties.get(name) for name in _list_of(part, "required") if isinstance(name, str)]
    min_items = part.get("minItems")
    if part.get("type") == "array" and isinstance(min_items, int) and min_items > 0:
        first = _list_of(part, "prefixItems")
        return first[:min_items] + ([part.get("items")] if min_items > len(first) else [])
    return []


def _list_of(part: dict[str, Any], name: str) -> list[Any]:
    value = part.get(name)
    return value if isinstance(value, list) else []


def _target(ref: str, root: dict[str, Any]) -> Any:
    """What a JSON pointer within the schema points to; None for any other reference, which llguidance judges.

    Raises:
        ValueError: there is nothing.
    """
    if ref != "#" and not ref.startswith("#/"):
        return None
    found: Any = root
    for step in unquote(ref[1:]).split("/")[1:]:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isdecimal() and len(key) < 6 and int(key) < len(found):
            found = found[int(key)]
        elif isinstance(found, dict) and key in found:
            found = found[key]
        else:
            raise ValueError(f"$ref {ref} points to nothing")
    return found
