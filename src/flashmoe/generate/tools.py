"""Tools that a model may call: JSON schemas, or Python functions that become some."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

from flashmoe.errors import ArgumentError

_PLAIN = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    list: "array",
    tuple: "array",
    dict: "object",
}


@dataclass(frozen=True)
class ToolSpec:
    """A tool that may be called.

    Attributes:
        name: by which the model calls it.
        description: what it does, for the model.
        parameters: JSON schema of its arguments, an object.
        definition: what chat templates render, {"type": "function", "function": {…}}, as given.
        function: that runs it, where Python has one.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    definition: Mapping[str, Any]
    function: Callable[..., Any] | None = None


def tools_of(tools: Iterable[Any] | None) -> tuple[ToolSpec, ...]:
    """Tools in any form that people have them: OpenAI's, Anthropic's, or functions.

    Raises:
        ArgumentError: what cannot be a tool, or two of one name; the message says which.
    """
    if tools is None:
        return ()
    if isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Iterable):
        raise ArgumentError(f"tools must be a list of JSON schemas or functions; got {tools!r}")
    specs: dict[str, ToolSpec] = {}
    for number, tool in enumerate(tools):
        spec = _tool_of(tool, f"tools[{number}]")
        if spec.name in specs:
            raise ArgumentError(f"tools[{number}]: a second tool of the name {spec.name!r}")
        specs[spec.name] = spec
    return tuple(specs.values())


def _tool_of(tool: Any, where: str) -> ToolSpec:
    if isinstance(tool, ToolSpec):
        return tool
    if callable(tool):
        return _function_tool(tool, where)
    if not isinstance(tool, Mapping):
        raise ArgumentError(f"{where}: a tool is a JSON schema or a function; got {tool!r}")
    function = tool.get("function", tool)
    if not isinstance(function, Mapping):
        raise ArgumentError(f"{where}.function must be an object; got {function!r}")
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[^\s<>\"\\]{1,256}", name):
        raise ArgumentError(
            f"{where}: a tool's name must be text without spaces, quotes, < and >; got {name!r}"
        )
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise ArgumentError(f"{where} ({name}): description must be text; got {description!r}")
    parameters = function.get("parameters", function.get("input_schema"))
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise ArgumentError(f"{where} ({name}): parameters must be a JSON schema; got {parameters}")
    if "function" in tool:
        definition = {"type": "function", **tool}
    else:
        own = {"name": name, "description": description, "parameters": parameters}
        definition = {"type": "function", "function": own}
    return ToolSpec(name, description, parameters, definition)


def _function_tool(function: Callable[..., Any], where: str) -> ToolSpec:
    name = getattr(function, "__name__", type(function).__name__)
    if not name.isidentifier():
        raise ArgumentError(f"{where}: a tool's function needs a name; got {name!r}")
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
    except (TypeError, ValueError, NameError) as error:
        raise ArgumentError(f"{where} ({name}): its signature cannot be read: {error}") from error
    description, said = _docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required = []
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ArgumentError(
                f"{where} ({name}): {parameter.name} is positional-only; tools get keywords"
            )
        schema = _schema_of(hints.get(parameter.name, Any), f"{where} ({name}), {parameter.name}")
        if parameter.name in said:
            schema = schema | {"description": said[parameter.name]}
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    own = {"name": name, "description": description, "parameters": parameters}
    return ToolSpec(name, description, parameters, {"type": "function", "function": own}, function)


def _schema_of(hint: Any, where: str) -> dict[str, Any]:
    """JSON schema of a type annotation."""
    origin, given = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint is None or hint in _PLAIN:
        return {"type": _PLAIN[type(None) if hint is None else hint]}
    if origin is Annotated:
        texts = [text for text in given[1:] if isinstance(text, str)]
        return _schema_of(given[0], where) | ({"description": texts[0]} if texts else {})
    if origin is Literal:
        return {"enum": list(given)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(part, where) for part in given]}
    if origin is list or (origin is tuple and len(given) == 2 and given[1] is ...):
        return {"type": "array", "items": _schema_of(given[0], where)}
    if origin is dict and given[0] is str:
        return {"type": "object", "additionalProperties": _schema_of(given[1], where)}
    raise ArgumentError(
        f"{where}: no JSON schema for {hint}; use str, int, float, bool, None, list, dict[str, …], "
        "Literal, unions and Annotated of these, or give the tool as a JSON schema"
    )


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of a function and, in a Google-style `Args:`, of its parameters."""
    head, _, rest = text.partition("Args:\n")
    section = re.split(r"^\S", rest, maxsplit=1, flags=re.MULTILINE)[0]
    found = re.findall(
        r"^ +\*{0,2}(\w+)(?: *\([^)]*\))?: *(.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE
    )
    said = {name: re.sub(r"\s+", " ", words).strip() for name, words in found}
    head = re.split(r"^(?:Returns|Raises|Yields|Examples?):", head, maxsplit=1, flags=re.MULTILINE)[
        0
    ]
    return head.strip(), said
