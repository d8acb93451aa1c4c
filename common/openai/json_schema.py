"""JSON schemas that clients send: are they small enough, can an answer end, and is there a grammar for them?

What is compiled here runs in the engine beside everybody else's tokens, so the limits are far below what it could take;
OpenAI's strict mode takes as many values of enums, and more properties. llguidance makes the grammars, here as in an
engine on a CPU, within the same limits. It needs no model for that.
"""

import asyncio
import functools
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import unquote

import msgspec
from pydantic import AfterValidator, Field

from common.errors import InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

# How an engine's scheduler tells its engine.
GRAMMAR_FAILED = "the one that it made has failed, since it is too complex"

MAX_CHARACTERS = 65_536
MAX_DEPTH = 48  # of the JSON: what a property holds is two levels below its object
MAX_VALUES = 5000
MAX_MEMBERS = 1000  # of all its enums together, of all its properties, ...: `allOf` makes one object of many
MAX_PROPERTIES = 250  # of one object: llguidance's parser looks at all that may come next
MAX_STRING = 1000  # characters, of what becomes a part of the grammar, and of names

_COUNTED: dict[str, type[Any]] = {"enum": list, "required": list, "properties": dict, "patternProperties": dict}
_SCHEMAS_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_NO_SCHEMAS = ("const", "enum", "default", "examples")
_GRAMMAR_VALUES = ("const", "enum")  # each string in them is a part of the grammar, whatever its key
_TEXTS = ("description", "title", "$comment", "$id", "$schema")
_DRAFT_3 = ("disallow", "divisibleBy", "extends")  # later drafts do not have them, so llguidance takes no notice
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")


def schema_text(schema: dict[str, Any] | None) -> str:
    """What an engine is sent; None: any JSON object. Without llguidance's own key: white space is not the client's."""
    asked = {"type": "object"} if schema is None else schema
    return msgspec.json.encode({name: value for name, value in asked.items() if name != "x-guidance"}).decode()


def check_size(schema: dict[str, Any]) -> dict[str, Any]:
    """Looks at MAX_VALUES values at most.

    Raises:
        ValueError: it is too large.
    """
    num_members: Counter[str] = Counter()
    for num_values, (keyword, name, value, depth) in enumerate(values_of(schema)):
        if depth > MAX_DEPTH:
            raise ValueError(f"the schema is nested more than {MAX_DEPTH} levels deep")
        if num_values == MAX_VALUES:
            raise ValueError(f"the schema has more than {MAX_VALUES} values")
        if keyword == "properties" and isinstance(value, dict) and len(value) > MAX_PROPERTIES:
            raise ValueError(f"an object has more than {MAX_PROPERTIES} properties")
        if keyword in _COUNTED and isinstance(value, _COUNTED[keyword]):
            num_members[keyword] += len(value)
        if num_members[keyword] > MAX_MEMBERS:
            raise ValueError(f"the schema has more than {MAX_MEMBERS} values under {keyword}, all together")
        if len(name) > MAX_STRING or (isinstance(value, str) and keyword not in _TEXTS and len(value) > MAX_STRING):
            raise ValueError(f"a string of the schema has more than {MAX_STRING} characters")
    if len(schema_text(schema)) > MAX_CHARACTERS:
        raise ValueError(f"the schema has more than {MAX_CHARACTERS} characters")
    return schema


JsonSchema = Annotated[
    dict[str, Any],
    AfterValidator(check_size),
    Field(description="One that is too large, or that there is no grammar for, is a 400."),
]


def values_of(json: Any) -> Iterator[tuple[str, str, Any, int]]:
    """Each value with its keyword, its own name where it has one, and its depth. Looks no further than it is asked."""
    stack = [iter([("", "", json)])]
    while stack:
        if (found := next(stack[-1], None)) is None:
            stack.pop()
            continue
        keyword, name, value = found
        yield keyword, name, value, len(stack) - 1
        if isinstance(value, dict | list):
            stack.append(_values_in(keyword, value))


def _values_in(keyword: str, value: dict[str, Any] | list[Any]) -> Iterator[tuple[str, str, Any]]:
    if isinstance(value, list):
        return ((keyword, "", inner) for inner in value)
    if keyword in _GRAMMAR_VALUES:
        return ((keyword, name, inner) for name, inner in value.items())
    if keyword in _SCHEMAS_BY_NAME:  # the client chose these names
        return (("", name, inner) for name, inner in value.items())
    return ((name, name, inner) for name, inner in value.items())


async def check_grammar(schema: str, param: str) -> None:
    """schema: its text. param: what asks for the grammar.

    Raises:
        InvalidRequest: llguidance has none for this schema.
    """
    if (reason := await asyncio.get_running_loop().run_in_executor(_thread, why_no_grammar, schema)) is not None:
        raise InvalidRequest(f"Invalid value for {param}: {reason}.", param=param)


@functools.lru_cache(maxsize=256)
def why_no_grammar(schema: str) -> str | None:
    """None where there is one."""
    from llguidance import LLMatcher

    try:
        decoded = msgspec.json.decode(schema)
        _check_keywords(decoded)
        check_ends(decoded)
        grammar = LLMatcher.grammar_from_json_schema(schema)
        matcher = LLMatcher(_bytes(), grammar, log_level=0, limits=grammar_limits())
    except ValueError as error:
        return one_line(str(error))
    if not matcher.is_error():
        matcher.compute_bitmask()  # what may come first
    return one_line(matcher.get_error()) if matcher.is_error() else None


def grammar_limits() -> "LLParserLimits":
    """llguidance's own allow a pattern to take 40 ms of every token of the whole batch, and 500 MB.

    A token takes 2 ms at most (14,000 units of fuel a ms), a grammar 100 MB of states. Dates, addresses, lists of a
    thousand values need a tenth of that.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=200_000, step_lexer_fuel=30_000, max_lexer_states=50_000, max_grammar_size=50_000,
        verbose_errors=False,
    )  # fmt: skip


@functools.cache
def _bytes() -> "LLTokenizer":
    """A tokenizer of single bytes."""
    from llguidance import LLTokenizer

    return LLTokenizer("byte")


def one_line(message: str) -> str:
    """Of an error of llguidance: the reason, in one line."""
    return " ".join(message.partition("<non-verbose/>")[0].split()).rstrip(".")


def _check_keywords(root: dict[str, Any]) -> None:
    """Raises:
    ValueError: there is a keyword that only draft 3 had, and llguidance would ignore.
    """
    for part in parts_of(root, with_targets=True):
        if name := next((name for name in _DRAFT_3 if name in part), None):
            raise ValueError(f"{name} is a keyword of JSON Schema's draft 3 only")
        properties = part.get("properties")
        for inner in properties.values() if isinstance(properties, dict) else ():
            if isinstance(inner, dict) and isinstance(inner.get("required"), bool):
                raise ValueError("required must be a list of names, beside properties")


def check_ends(root: dict[str, Any]) -> None:
    """Each part of a schema must have a JSON value: `{"$ref": "#"}` has none, nor has an object that holds another one
    of its kind, and so on.

    Raises:
        ValueError: some part has none.
    """
    needs = {id(part): _needs(part, root) for part in parts_of(root, with_targets=True)}
    dependents = defaultdict(list)
    for part_id, choices in needs.items():
        for needed_id in itertools.chain(*choices):
            dependents[needed_id].append(part_id)
    ending: set[int] = set()
    pending = list(needs)
    while pending:
        part_id = pending.pop()
        if part_id not in ending and not any(ending.isdisjoint(choice) for choice in needs[part_id]):
            ending.add(part_id)
            pending += dependents[part_id]
    if not ending.issuperset(needs):
        raise ValueError("the schema refers to itself in such a way that no answer could end")


def _needs(part: dict[str, Any], root: dict[str, Any]) -> list[list[int]]:
    """What has to have a value for a part of a schema to have one: one of each of these choices, by id."""
    all_of = _targets(part, root) + _list_of(part, "allOf") + _always_within(part)
    choices = [[each] for each in all_of] + [_list_of(part, name) for name in ("anyOf", "oneOf")]
    # One that is no object, such as true, has a value.
    return [list(map(id, choice)) for choice in choices if choice and all(isinstance(each, dict) for each in choice)]


def parts_of(root: dict[str, Any], *, with_targets: bool = False) -> list[dict[str, Any]]:
    """All schemas: those within others, and with_targets what a reference points to, wherever that is."""
    parts: dict[int, dict[str, Any]] = {}
    stack: list[Any] = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, list):
            stack += value
        elif isinstance(value, dict) and id(value) not in parts:
            parts[id(value)] = value
            stack += _targets(value, root) if with_targets else []
            for name, inner in value.items():
                is_by_name = name in _SCHEMAS_BY_NAME and isinstance(inner, dict)
                stack += inner.values() if is_by_name else [] if name in _NO_SCHEMAS else [inner]
    return list(parts.values())


def _always_within(part: dict[str, Any]) -> list[Any]:
    """The schemas of what an object or array of this part always holds."""
    properties = part.get("properties")
    if part.get("type") in ("object", ["object"]) and isinstance(properties, dict):
        return [properties.get(name) for name in _list_of(part, "required") if isinstance(name, str)]
    min_items = part.get("minItems")
    if part.get("type") in ("array", ["array"]) and isinstance(min_items, int) and min_items > 0:
        first = _list_of(part, "prefixItems")
        return first[:min_items] + ([part.get("items")] if min_items > len(first) else [])
    return []


def _list_of(part: dict[str, Any], name: str) -> list[Any]:
    value = part.get(name)
    return value if isinstance(value, list) else []


def _targets(part: dict[str, Any], root: dict[str, Any]) -> list[Any]:
    return [_target(part["$ref"], root)] if isinstance(part.get("$ref"), str) else []


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
