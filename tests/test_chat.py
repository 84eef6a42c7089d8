"""Chat templates against transformers' own rendering, which tests/golden/chat.json keeps."""

import datetime
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import golden
import pytest
from fake_engine import TEMPLATE

import flashmoe
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.checkpoint.template import ChatTemplate

# What real templates use: namespaces, loop variables and controls, macros, tests, whitespace
# control, tojson with options, mappings, string methods, tools and tool calls as XML.
TOOLS_TEMPLATE = r"""
{%- set ns = namespace(last=messages|length - 1) -%}
{%- macro text(content) -%}
    {%- if content is string -%}{{- content -}}
    {%- elif content is none or content is not defined -%}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type != 'text' -%}{{- raise_exception('no images') -}}{%- endif -%}
            {{- part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- bos_token if bos_token is defined else '' -}}
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}{{ tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>' }}
    {%- if messages[0].role == 'system' %}{{- '\n\n' + text(messages[0].content)|trim }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + text(messages[0].content) + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}{% break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if message.reasoning_content is string and loop.index0 > ns.last %}
            {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- text(message.content) }}
        {%- for call in message.tool_calls or [] %}
            {%- set call = call.function %}
            {{- '\n<tool_call>\n<function=' + call.name + '>\n' }}
            {%- for name, value in call.arguments|items %}
                {{- '<parameter=' + name + '>\n' }}
                {{- value if value is string else value | tojson }}
                {{- '\n</parameter>\n' }}
            {%- endfor %}
            {{- '</function>\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem and loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + text(message.content) + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
    {%- elif message.role == 'user' %}
        {{- '<|im_start|>user\n' + text(message.content) + '<|im_end|>\n' }}
    {%- else %}
        {{- raise_exception('Unexpected message role.') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {{- '<think>\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '\n</think>\n\n' }}{% endif %}
{%- endif %}
{#- comments and blocks leave no lines behind -#}
"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Wetter in <Stadt> & Umgebung: 'heute' \"morgen\" ☀",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {}}},
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "arguments": {"city": "Zürich", "days": [1, {"a": None}]},
            },
        },
        {"type": "function", "function": {"name": "now", "arguments": {}}},
    ],
}
DIALOGUES = {
    "one turn": ([{"role": "user", "content": "Hello"}], None),
    "system": (
        [
            {"role": "system", "content": " Be brief. "},
            {"role": "user", "content": "<b>Hi</b> & bye"},
        ],
        None,
    ),
    "several turns": (
        [
            {"role": "user", "content": "One\n"},
            {"role": "assistant", "content": "Two", "reasoning_content": "\nhm\n"},
            {"role": "user", "content": "  Three"},
        ],
        None,
    ),
    "content in parts": (
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            }
        ],
        None,
    ),
    "tools": ([{"role": "user", "content": "Weather?"}], TOOLS),
    "tools and system": (
        [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "Weather?"}],
        TOOLS,
    ),
    "tool calls and results": (
        [
            {"role": "user", "content": "Weather?"},
            CALL | {"reasoning_content": "I should look."},
            {"role": "tool", "content": "sunny"},
            {"role": "tool", "content": '{"now": 12}'},
        ],
        TOOLS,
    ),
}


TEMPLATES = {"tools": TOOLS_TEMPLATE, "simple": TEMPLATE}
VARIABLES = {
    "as it is": {},
    "no thinking": {"enable_thinking": False},
    "no generation prompt": {"add_generation_prompt": False},
}
TO_JSON = ["", "(indent=2)", "(separators=(',', ':'), sort_keys=true)"]


def rendered(render: Callable[..., str]) -> dict[str, str]:
    """Every case by its name; `render` takes a template, messages, tools and variables."""
    result = {}
    for (kind, template), (name, dialogue), (setting, variables) in itertools.product(
        TEMPLATES.items(), DIALOGUES.items(), VARIABLES.items()
    ):
        given = {"add_generation_prompt": True, **variables}
        result[f"{kind}, {name}, {setting}"] = render(template, *dialogue, **given)
    message = {"role": "user", "content": "<é> & '\"", "extra": {"b": [1, 2.5], "a": True}}
    for options in TO_JSON:
        template = "{{ messages[0] | tojson" + options + " }}"
        result[f"tojson{options}"] = render(template, [message], None)
    return result


def _template(text: str) -> ChatTemplate:
    return ChatTemplate(text, Path("t.jinja"), {"bos_token": "<|endoftext|>"})


def test_dialogues_are_rendered_as_transformers_renders_them() -> None:
    def render(template, messages, tools, **variables):
        return _template(template).render(messages, tools=tools, **variables)

    assert rendered(render) == golden.texts("chat")


def test_the_date_is_todays() -> None:
    ours = _template("{{ strftime_now('%Y') }}")
    assert ours.render([]) == str(datetime.datetime.now().year)


def test_what_the_template_refuses_is_an_argument_error() -> None:
    ours = _template(TOOLS_TEMPLATE)
    with pytest.raises(flashmoe.ArgumentError, match=r"t\.jinja.*Unexpected message role"):
        ours.render([{"role": "robot", "content": "x"}])


@pytest.mark.parametrize("messages", ["Hello", {"role": "user", "content": "x"}, ["Hello"], [1]])
def test_what_is_no_list_of_turns_is_refused(messages) -> None:
    with pytest.raises(flashmoe.ArgumentError, match="list of turns"):
        _template(TEMPLATE).render(messages)


def test_a_template_that_is_not_jinja_is_named() -> None:
    with pytest.raises(flashmoe.CheckpointError, match=r"t\.jinja: the chat template is not valid"):
        _template("{% if %}").render([])


@pytest.mark.parametrize(
    "attack",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"],
)
def test_a_template_cannot_leave_its_sandbox(attack: str) -> None:
    with pytest.raises(flashmoe.ArgumentError, match="refuses"):
        _template(attack).render([{"role": "user", "content": "x"}])


def test_what_a_template_cannot_compute_with_is_an_argument_error() -> None:
    with pytest.raises(flashmoe.ArgumentError, match=r"refuses this: .*int"):
        _template("{{ messages[0].content + 'x' }}").render([{"role": "user", "content": 5}])


@pytest.mark.parametrize("named", [["D"], [{"name": "default"}], [{"name": [], "template": ""}]])
def test_a_damaged_template_names_its_file(tmp_path, named) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": named}))
    with pytest.raises(flashmoe.CheckpointError, match=rf"{path}: chat_template is a list"):
        ChatTemplate.load(Metadata(tmp_path))
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff")
    with pytest.raises(flashmoe.CheckpointError, match=rf"{path}: not UTF-8"):
        ChatTemplate.load(Metadata(tmp_path))


def test_the_template_is_found_where_checkpoints_keep_it(tmp_path) -> None:
    assert ChatTemplate.load(Metadata(tmp_path)) is None
    path = tmp_path / "tokenizer_config.json"
    path.write_text(
        json.dumps({"chat_template": "A{{ eos_token }}", "eos_token": {"content": "E"}})
    )
    assert ChatTemplate.load(Metadata(tmp_path)).render([]) == "AE"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    path.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(Metadata(tmp_path)).render([]) == "D"
    assert ChatTemplate.load(Metadata(tmp_path), tools=True).render([]) == "T"
    path.unlink()
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "P"}))
    assert ChatTemplate.load(Metadata(tmp_path)).render([]) == "P"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert ChatTemplate.load(Metadata(tmp_path)).render([]) == "J"
