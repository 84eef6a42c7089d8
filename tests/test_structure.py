"""The demo model, held to a structure through `Model.chat`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import flashmoe

SCHEMA = json.loads((Path(__file__).parent / "data/schemas/unbounded_review.json").read_text())
ASKED = [{"role": "user", "content": "Review the printer that you bought."}]


@pytest.fixture(scope="module")
def model() -> Iterator[flashmoe.Model]:
    with flashmoe.Model("demo", threads=1) as opened:
        yield opened


def set_timer(minutes: int, label: str = "") -> str:
    """Sets a timer."""
    return f"{label} in {minutes} minutes"


def test_an_answer_follows_a_schema_that_nobody_told_the_model(model: flashmoe.Model) -> None:
    answer = model.chat(ASKED, schema=SCHEMA, max_tokens=200, seed=1).answer
    jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert answer.finish_reason == "stop"
    again = model.chat(ASKED, schema=SCHEMA, max_tokens=200, seed=1).answer
    assert again.text == answer.text


def test_an_answer_that_would_be_cut_is_completed_and_says_so(model: flashmoe.Model) -> None:
    answer = model.chat(ASKED, schema=SCHEMA, max_tokens=45, seed=1).answer
    jsonschema.validate(json.loads(answer.text), SCHEMA)
    assert (answer.finish_reason, answer.hurried) == ("stop", True)
    assert answer.generated_tokens <= 45
    cut = model.chat(ASKED, schema=SCHEMA, max_tokens=10, seed=1).answer
    assert (cut.finish_reason, cut.hurried, cut.generated_tokens) == ("length", False, 10)


@pytest.mark.parametrize("choice", ["required", "set_timer", "auto"])
def test_a_tool_is_called_with_arguments_of_its_types(model: flashmoe.Model, choice: str) -> None:
    asked = [{"role": "user", "content": "Set a timer for 5 minutes. Call it tea."}]
    options: dict[str, Any] = {"tools": [set_timer], "max_tokens": 200, "temperature": 0}
    answer = model.chat(asked, tool_choice=choice, **options).answer
    (call, *_) = answer.tool_calls
    assert call.name == "set_timer"
    assert isinstance(call.arguments["minutes"], int)
    assert "minutes" in set_timer(**call.arguments)
    assert answer.finish_reason == "tool_calls"
    assert answer.text == ""
    none = model.chat(asked, tool_choice="none", **options).answer
    assert none.tool_calls == ()


def test_deltas_are_the_answer(model: flashmoe.Model) -> None:
    chat = model.chat(ASKED, json_object=True, max_tokens=100, seed=2)
    text = "".join(delta.text for delta in chat)
    assert text == chat.answer.text
    assert isinstance(json.loads(text), dict)


def test_what_cannot_be_enforced_is_refused_at_the_call(model: flashmoe.Model) -> None:
    with pytest.raises(flashmoe.ArgumentError, match="uniqueItems"):
        model.chat(ASKED, schema={"type": "array", "uniqueItems": True})
