"""A model of JSON that refuses what it does not know, and whose JSON schema says exactly what it takes."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, model_validator

IGNORED: Any = ...

# For a union of a string and something else, so that an error speaks of the one that was sent.
IS_STRING, IS_LIST, IS_OBJECT = Tag("<string>"), Tag("<list>"), Tag("<object>")
STRING_OR_LIST = Discriminator(lambda value: (IS_LIST if isinstance(value, list) else IS_STRING).tag)
STRING_OR_OBJECT = Discriminator(lambda value: (IS_STRING if isinstance(value, str) else IS_OBJECT).tag)


def _is_no_op(value: Any, no_op_values: Any) -> bool:
    # Python takes 0 for False, JSON does not.
    return no_op_values is IGNORED or any(type(value) is type(no_op) and value == no_op for no_op in no_op_values)


def whole_number(value: Any) -> Any:
    # JSON has one kind of number, so 1.0 is an integer. Integers beyond 64 bits arrive as floats, and rounded.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**63 else value


def _describe(schema: dict[str, Any], model: "type[StrictModel]") -> None:
    """Put into pydantic's schema what it cannot see: nulls, the no-ops, and the rules between fields."""
    properties: dict[str, Any] = schema.setdefault("properties", {})
    for name, field in properties.items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            outer = {key: field.pop(key) for key in ("title", "default", "description") if key in field}
            properties[name] = {"anyOf": [field, {"type": "null"}], **outer}
    for name, values in model.no_ops.items():
        if name in properties:
            continue  # a field of ours that has a no-op value as well
        properties[name] = (
            {"description": "Ignored."}
            if values is IGNORED
            else {"description": "Only with a value that changes nothing.", "enum": [*values, None]}
        )
    schema["additionalProperties"] = {"type": "null"}
    if model.rules:
        schema["allOf"] = model.rules


class StrictModel(BaseModel):
    """JSON types are taken as they are (no "5" for 5), and a name we do not know is an error.

    A field sent as null, known or not, is the same as none, and so is one with a value of `no_ops` (any value,
    where that is IGNORED). rules: what holds between fields, in JSON schema, for readers; validators enforce it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_describe)
    no_ops: ClassVar[dict[str, Any]] = {}
    rules: ClassVar[list[dict[str, Any]]] = []

    @model_validator(mode="before")
    @classmethod
    def _drop_no_ops(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: whole_number(value)
            for name, value in data.items()
            if value is not None and not (name in cls.no_ops and _is_no_op(value, cls.no_ops[name]))
        }


def present(name: str, **schema: Any) -> dict[str, Any]:
    """A rule: the field `name` is there, is not null, and matches `schema`."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}} | schema}}


def absent(name: str) -> dict[str, Any]:
    """A rule: the field `name` is missing or null."""
    return {"properties": {name: {"type": "null"}}}


def any_of(*rules: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": list(rules)}
