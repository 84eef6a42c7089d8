"""Tools in every form that people have them, and functions as the JSON schemas they stand for."""

from typing import Annotated, Any, Literal

import pytest

import flashmoe
from flashmoe.generate.tools import chosen, tools_of

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def weather(
    city: str,
    days: int = 1,
    *,
    unit: Literal["C", "F"] = "C",
    where: dict[str, float] | None = None,
    tags: list[str] | None = None,
    more: Any = None,
    deep: Annotated[bool, "look further"] = False,
) -> str:
    """Tells the weather.

    At any place.

    Args:
        city: where, by
            its name.
        days (int): how many.

    Returns:
        a sentence.
    """
    return city


def test_a_function_is_the_schema_that_it_stands_for() -> None:
    (spec,) = tools_of([weather])
    assert spec.function is weather
    assert spec.name == "weather"
    assert spec.description == "Tells the weather.\n\nAt any place."
    assert spec.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "where, by its name."},
            "days": {"type": "integer", "description": "how many."},
            "unit": {"enum": ["C", "F"]},
            "where": {
                "anyOf": [
                    {"type": "object", "additionalProperties": {"type": "number"}},
                    {"type": "null"},
                ]
            },
            "tags": {"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "null"}]},
            "more": {},
            "deep": {"type": "boolean", "description": "look further"},
        },
        "required": ["city"],
    }
    assert spec.definition["function"]["parameters"] == spec.parameters


@pytest.mark.parametrize(
    "tool",
    [
        {
            "type": "function",
            "function": {"name": "f", "description": "d", "parameters": PARAMETERS},
        },
        {"name": "f", "description": "d", "parameters": PARAMETERS},
        {"name": "f", "description": "d", "input_schema": PARAMETERS},
    ],
    ids=["openai", "bare", "anthropic"],
)
def test_a_schema_is_taken_in_every_form(tool: dict[str, Any]) -> None:
    (spec,) = tools_of([tool])
    assert (spec.name, spec.description, spec.parameters) == ("f", "d", PARAMETERS)
    assert spec.definition == {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": PARAMETERS},
    }
    assert tools_of([spec]) == (spec,)
    assert tools_of(None) == ()


def odd(thing: set[int]) -> None: ...


def first(a: int, /) -> None: ...


@pytest.mark.parametrize(
    ("tools", "what"),
    [
        ({"name": "f"}, "must be a list"),
        ("f", "must be a list"),
        ([5], r"tools\[0\]: a tool is a JSON schema or a function; got 5"),
        ([{}], r"tools\[0\]: a tool's name"),
        ([{"name": "a b"}], "without spaces"),
        ([{"function": 1}], r"tools\[0\].function must be an object"),
        ([{"name": "f", "parameters": []}], "parameters must be a JSON schema"),
        ([{"name": "f", "description": 1}], "description must be text"),
        ([{"name": "f"}, {"name": "f"}], r"tools\[1\]: a second tool of the name 'f'"),
        ([odd], r"\(odd\), thing: no JSON schema for set"),
        ([first], "positional-only"),
        ([lambda x: x], "needs a name"),
    ],
)
def test_what_is_no_tool_is_named(tools: Any, what: str) -> None:
    with pytest.raises(flashmoe.ArgumentError, match=what):
        tools_of(tools)


def test_a_choice_leaves_some_of_the_tools() -> None:
    specs = tools_of([{"name": "f"}, {"name": "g"}])
    assert chosen(specs, "auto") == chosen(specs, None) == (specs, False)
    assert chosen(specs, "none") == ((), False)
    assert chosen(specs, "required") == chosen(specs, {"type": "any"}) == (specs, True)
    assert chosen(specs, {"type": "none"}) == ((), False)
    for named in (
        "g",
        {"type": "function", "function": {"name": "g"}},
        {"type": "tool", "name": "g"},
    ):
        assert chosen(specs, named) == (specs[1:], True)
    for wrong in ("h", {"type": "tool"}, 5):
        with pytest.raises(flashmoe.ArgumentError, match=r"tool's name .f, g."):
            chosen(specs, wrong)
