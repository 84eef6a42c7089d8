"""Conversations as programs send them: chat templates take all of them, and lose nothing."""

from pathlib import Path
from typing import Any

import pytest
from fake_engine import TEMPLATE

import flashmoe
from flashmoe.checkpoint.template import ChatTemplate
from flashmoe.generate.messages import prepare

PUBLISHED = Path(__file__).parents[2] / "shared/templates"
STRICT = """{% for m in messages %}{% if m.role == 'system' and not loop.first %}
{{ raise_exception('System message must be at the beginning.') }}{% endif %}
{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}
{% for name, value in c.function.arguments | items %}{{ name }}={{ value }};{% endfor %}{% endfor %}
|{% endfor %}"""
LOSES = (
    """{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"""
)
USER = {"role": "user", "content": "Hi"}


def template(text: str) -> ChatTemplate:
    return ChatTemplate(text, Path("t.jinja"))


def call(arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {
        "role": "assistant",
        "tool_calls": [{"id": "1", "type": "function", "function": function}],
    }


@pytest.mark.parametrize(
    ("given", "object_"),
    [
        ('{"a": 1, "b": [null]}', {"a": 1, "b": [None]}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (None, {}),
        ('{"a": ', {"arguments": '{"a": '}),
        ("[1]", {"arguments": "[1]"}),
        ('{"a": NaN}', {"arguments": '{"a": NaN}'}),
    ],
)
def test_arguments_become_objects(given: Any, object_: dict[str, Any]) -> None:
    (_, turn) = prepare([USER, call(given)], template(STRICT))
    assert turn["tool_calls"][0]["function"] == {"name": "f", "arguments": object_}
    template(STRICT).render([turn])


def test_developer_means_system_and_system_turns_in_front_are_one() -> None:
    given = [
        {"role": "developer", "content": "A"},
        {
            "role": "system",
            "content": [{"type": "text", "text": "B"}, {"type": "text", "text": "C"}],
        },
        USER,
    ]
    assert prepare(given, template(STRICT)) == [{"role": "system", "content": "A\n\nBC"}, USER]


@pytest.mark.parametrize(
    ("text", "role"), [(STRICT, "user"), (LOSES, "user"), (TEMPLATE, "system")]
)
def test_a_late_system_turn_is_neither_refused_nor_lost(text: str, role: str) -> None:
    turns = prepare([USER, {"role": "developer", "content": "Be brief."}, USER], template(text))
    assert turns[1] == {"role": role, "content": "Be brief."}
    assert "Be brief." in template(text).render(turns)


@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.6", "qwen3.8"])
def test_published_templates_take_what_agents_send(name: str) -> None:
    path = PUBLISHED / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    given = [
        {"role": "developer", "content": "Be brief."},
        USER,
        call('{"city": "Paris", "days": 3}') | {"content": None, "reasoning": "I should look."},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "sunny"}]},
        {"role": "system", "content": "The user is back."},
        USER,
    ]
    ours = ChatTemplate(path.read_text(), path)
    text = ours.render(prepare(given, ours))
    for words in ("Be brief.", "<parameter=city>\nParis\n</parameter>", "sunny", "is back."):
        assert words in text
    text = ours.render(prepare(given[:4], ours))
    assert "<think>\nI should look.\n</think>" in text


@pytest.mark.parametrize(
    ("turn", "what"),
    [
        ("Hello", "list of turns"),
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            r"messages\[0\].content\[0\].*image_url",
        ),
        ({"role": "user", "content": 5}, r"messages\[0\].content must be text"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, r"messages\[0\].tool_calls must be a list"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1"}]},
            r"tool_calls\[0\] must have a function",
        ),
    ],
)
def test_what_is_no_turn_is_named(turn: Any, what: str) -> None:
    with pytest.raises(flashmoe.ArgumentError, match=what):
        prepare([turn], template(STRICT))
