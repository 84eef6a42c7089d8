"""Values of arguments that a model writes as text, typed by the tool's JSON schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashmoe.checkpoint.json import strict_json

ANY = frozenset({"string", "integer", "number", "boolean", "null", "object", "array"})
_SPELT_BY_PYTHON = {"True": True, "False": False, "None": None}


def property_of(schema: Any, name: str) -> Any:
    """The schema of an object's property; {} where it says nothing of it."""
    if not isinstance(schema, Mapping):
        return {}
    found = resolve(schema, schema)
    properties = found.get("properties")
    if isinstance(properties, Mapping) and name in properties:
        return properties[name]
    return found.get("additionalProperties", {})


def resolve(schema: Any, root: Any) -> Any:
    """What a schema's `$ref` points to in `root`, else the schema; {} for what is not there."""
    for _ in range(32):  # a reference to itself says nothing
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema if isinstance(schema, Mapping) else {}
        target: Any = root
        for part in schema["$ref"].removeprefix("#").split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            target = target.get(key) if isinstance(target, Mapping) else None
        schema = target
    return {}


def kinds(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema allows; "number" comes with "integer"."""
    if depth > 32:
        return ANY
    schema = resolve(schema, root)
    allowed = ANY
    given = schema.get("type")
    names = [given] if isinstance(given, str) else given
    if isinstance(names, list):
        known = {name for name in names if isinstance(name, str)} & ANY
        allowed = frozenset(known | ({"integer"} if "number" in known else set())) or ANY
    values = schema.get("enum")
    if "const" in schema:
        values = [schema["const"]]
    if isinstance(values, list):
        allowed &= {kind_of(value) for value in values}
    for key in ("anyOf", "oneOf"):
        choices = schema.get(key)
        if isinstance(choices, list) and choices:
            allowed &= frozenset().union(*(kinds(c, root, depth + 1) for c in choices))
    for part in schema.get("allOf") or ():
        allowed &= kinds(part, root, depth + 1)
    return allowed


def kind_of(value: Any) -> str:
    """The JSON type of a value; a whole number is an "integer" however it is written."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "integer" if value == int(value) else "number"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, dict) else "array"


def typed(text: str, schema: Any, root: Any) -> Any:
    """An argument's value.

    A string is the text as it is, even where it reads like a number. Of other types it is the
    JSON value that the text is; text that is none of the types that the schema allows stays text.
    """
    allowed = kinds(schema, root)
    if allowed == {"string"}:
        return text
    literal = text.strip()
    if "string" in allowed and literal in (resolve(schema, root).get("enum") or ()):
        return literal
    try:
        value = strict_json(literal)
    except ValueError:
        # Templates write booleans as Python does, and models learn it.
        if literal not in _SPELT_BY_PYTHON or "string" in allowed:
            return text
        value = _SPELT_BY_PYTHON[literal]
    kind = kind_of(value)
    if kind == "string" or kind not in allowed:
        return text
    return int(value) if kind == "integer" and "number" not in allowed else value
