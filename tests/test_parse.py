"""Answers parted into text, reasoning and tool calls: however they are cut, nothing is lost."""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flashmoe.checkpoint.template import ChatTemplate
from flashmoe.generate.answer import Answer, Delta
from flashmoe.generate.dialect import Dialect
from flashmoe.generate.parse import AnswerParser
from flashmoe.generate.tools import tools_of

TOOLS = tools_of(
    [
        {
            "name": "weather",
            "parameters": {
                "$defs": {"day": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}},
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"$ref": "#/$defs/day"},
                    "units": {"enum": ["C", "F", "1"]},
                    "limit": {"type": ["number", "null"]},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "either": {"oneOf": [{"type": "string"}, {"type": "integer"}]},
                    "deep": {"type": "boolean"},
                    "where": {"type": "object"},
                    "list": {"type": "array", "items": {"type": "string"}},
                    "loop": {"$ref": "#/$defs/loop"},
                    "both": {"allOf": [{"type": ["string", "integer"]}, {"type": "integer"}]},
                    "two": {"const": 2},
                },
            },
        },
        {"name": "now"},
    ]
)


def xml(name: str = "weather", /, **arguments: str) -> str:
    body = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{body}</function>\n</tool_call>"


def hermes(arguments: str, name: str = "weather") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def parts(text: str, size: int, dialect: str | None, reasoning: bool = False) -> list[Delta]:
    parser = AnswerParser(Dialect(dialect, thinks=True), TOOLS, in_reasoning=reasoning)
    deltas = [d for i in range(0, len(text), size) for d in parser.push(text[i : i + size])]
    return deltas + parser.finish()


def parse(
    text: str, dialect: str | None = "xml", *, reasoning: bool = False, size: int = 3
) -> Answer:
    return Answer.of(parts(text, size, dialect, reasoning))


def calls(answer: Answer) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in answer.tool_calls]


PARIS = ("weather", {"city": "Paris"})
CASES: dict[str, tuple[str, str, bool, str, str, list[tuple[str, dict[str, Any]]]]] = {
    "text": ("xml", "Hello.\n\n  Two < 3 > 1\n", False, "Hello.\n\n  Two < 3 > 1\n", "", []),
    "reasoning": ("xml", "hm\n\nso\n</think>\n\nHi \n", True, "Hi \n", "hm\n\nso", []),
    "its own reasoning": ("xml", "<think>\nhm\n</think>\n\nHi", False, "Hi", "hm", []),
    "empty reasoning": ("xml", "<think>\n\n</think>\n\nHi", False, "Hi", "", []),
    "one call": ("xml", xml(city="Paris"), False, "", "", [PARIS]),
    "text and calls": (
        "xml",
        "hm</think>\n\nLet me look.\n\n" + xml(city="Paris") + "\n" + xml("now") + "\n",
        True,
        "Let me look.",
        "hm",
        [PARIS, ("now", {})],
    ),
    "text after a call": (
        "xml",
        "A\n" + xml("now") + "\n\nB ",
        False,
        "A\n\nB ",
        "",
        [("now", {})],
    ),
    "a call within a line": ("xml", "Look:" + xml(city="Paris"), False, "Look:", "", [PARIS]),
    "no spaces": (
        "xml",
        "<tool_call><function=weather><parameter=city>\nParis\n</parameter>\n</function></tool_call>",
        False,
        "",
        "",
        [PARIS],
    ),
    "bare": ("xml", "A\n\n" + xml(city="Paris")[12:-13], False, "A", "", [PARIS]),
    "a tool that was not offered": (
        "xml",
        xml("other", a="1"),
        False,
        "",
        "",
        [("other", {"a": 1})],
    ),
    "no newline at the end": (
        "xml",
        xml(city="Paris").replace("\n</parameter>", "</parameter>"),
        False,
        "",
        "",
        [PARIS],
    ),
    "hermes": (
        "hermes",
        "A\n" + hermes('{"city": "P}]\\"{s"}'),
        False,
        "A",
        "",
        [("weather", {"city": 'P}]"{s'})],
    ),
    "hermes, two": (
        "hermes",
        hermes("{}", "now") + "\n" + hermes('{"list": ["a", {"b": 1.5}]}'),
        False,
        "",
        "",
        [("now", {}), ("weather", {"list": ["a", {"b": 1.5}]})],
    ),
    "hermes, another order": (
        "hermes",
        'x\n<tool_call>{"arguments": {"city": "Paris"}, "name": "weather"}</tool_call>',
        False,
        "x",
        "",
        [PARIS],
    ),
    "hermes, arguments as text": (
        "hermes",
        hermes('"{\\"city\\": \\"Paris\\"}"'),
        False,
        "",
        "",
        [PARIS],
    ),
}
NO_CALLS = {
    "within reasoning": f"I could {xml(city='Paris')} or not",
    "as code": f"Write `{xml(city='Paris')}` or",
    "in a code block": f"So:\n```xml\n{xml(city='Paris')}\n```\nis a call",
    "in words": "The tags <tool_call>, <function=weather> and <parameter=city> open a call",
    "inline": "Write <tool_call><function=weather></function></tool_call> for it",
    "not offered, bare": "<function=other>\n<parameter=a>\n1\n</parameter>\n</function>",
    "no parameters": "<tool_call>\n<function=weather>\nParis\n</function>\n</tool_call>",
    "hermes": "<tool_call>\nParis\n</tool_call> and <tool_call>{'name': 1}</tool_call>!",
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_an_answer_has_its_parts(case: str, size: int) -> None:
    dialect, text, reasoning, said, thought, called = CASES[case]
    answer = parse(text, dialect, reasoning=reasoning, size=size)
    assert (answer.text, answer.reasoning, calls(answer)) == (said, thought, called)
    assert answer.invalid_tool_calls == ()
    assert answer.finish_reason == ("tool_calls" if called else "stop")


@pytest.mark.parametrize("case", NO_CALLS)
@pytest.mark.parametrize("dialect", ["xml", "hermes"])
def test_markup_in_prose_and_reasoning_is_no_call(case: str, dialect: str) -> None:
    text = NO_CALLS[case]
    if case == "within reasoning":
        answer = parse(text + "\n</think>\n\nHi", dialect, reasoning=True)
        assert (answer.reasoning, answer.text) == (text, "Hi")
    else:
        answer = parse(text, dialect)
        assert answer.text == text
    assert answer.tool_calls == answer.invalid_tool_calls == ()


@pytest.mark.parametrize("reasoning", [False, True])
def test_without_tools_everything_is_text(reasoning: bool) -> None:
    parser = AnswerParser(Dialect("xml", thinks=True), in_reasoning=reasoning)
    text = f"A {xml(city='Paris')}\n\n"
    deltas = [*parser.push("hm</think>" * reasoning + text), *parser.finish()]
    assert Answer.of(deltas) == Answer(text, "hm" * reasoning)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("city", "Paris", "Paris"),
        ("city", "null", "null"),
        ("city", "0123", "0123"),
        ("city", '"Paris"', '"Paris"'),
        ("city", "", ""),
        ("city", "\n a\n\n", "\n a\n\n"),
        ("city", "a\n</parameter>\nb", "a\n</parameter>\nb"),
        ("city", "a\n</parameter>\n<b>", "a\n</parameter>\n<b>"),
        ("city", "</parameter>", "</parameter>"),
        ("city", "<tool_call>\n</tool_call>\n", "<tool_call>\n</tool_call>\n"),
        ("city", 'quote " backslash \\ tab \t é ☃ 𝄞', 'quote " backslash \\ tab \t é ☃ 𝄞'),
        ("days", "3", 3),
        ("days", " 3\n", 3),
        ("days", "3.0", 3),
        ("days", "three", "three"),
        ("days", "NaN", "NaN"),
        ("days", "9" * 5000, "9" * 5000),
        ("units", "C", "C"),
        ("units", "1", "1"),
        ("limit", "null", None),
        ("limit", "None", None),
        ("limit", "2.5", 2.5),
        ("limit", "3", 3),
        ("limit", "1e999", "1e999"),
        ("note", "null", None),
        ("note", "None", "None"),
        ("note", "3", "3"),
        ("either", "3", 3),
        ("either", "03", "03"),
        ("either", "null", "null"),
        ("deep", "true", True),
        ("deep", "False", False),
        ("deep", "1", "1"),
        ("where", '{"a": [1, null]}', {"a": [1, None]}),
        ("where", '{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ("where", "[1]", "[1]"),
        ("list", '["a",\n "b"]', ["a", "b"]),
        ("list", "[" * 5000, "[" * 5000),
        ("loop", "3", 3),
        ("both", "3", 3),
        ("two", "2", 2),
        ("unknown", "text", "text"),
        ("unknown", "3", 3),
        ("unknown", '{"a": 1}', {"a": 1}),
    ],
)
@pytest.mark.parametrize("size", [1, 1000])
def test_a_value_has_the_type_that_the_schema_says(
    name: str, text: str, value: Any, size: int
) -> None:
    answer = parse(xml(**{name: text, "more": "x"}), size=size)
    assert calls(answer) == [("weather", {name: value, "more": "x"})]
    assert type(answer.tool_calls[0].arguments[name]) is type(value)


def test_a_call_streams_its_name_once_and_then_its_arguments() -> None:
    deltas = parts("Look.\n" + xml(city="Paris and London", days="3") + xml("now"), 1, "xml")
    called = [d for d in deltas if d.kind == "tool_call"]
    heads = [d for d in called if d.id is not None]
    assert [(d.index, d.name, d.text) for d in heads] == [(0, "weather", ""), (1, "now", "")]
    assert len({d.id for d in heads}) == 2
    assert all(d.name is None for d in called if d.id is None)
    raw = [d.text for d in called if d.index == 0]
    assert "".join(raw) == '{"city": "Paris and London", "days": 3}'
    assert raw.count("n") >= 3, "a string comes as it is written"
    for size in (1, 5):
        raw = [d.text for d in parts(hermes('{"city": "Paris"}'), size, "hermes")]
        assert "".join(raw) == '{"city": "Paris"}'
        assert len(raw) > 4


def test_a_call_that_was_cut_short_is_not_to_be_run() -> None:
    whole = xml(city="Paris", days="3")
    for end in range(whole.index("<parameter"), whole.index("</function>") + 10):
        answer = parse("A\n" + whole[:end], size=end)
        assert answer.tool_calls == ()
        assert answer.finish_reason == "stop"
    (call,) = answer.invalid_tool_calls
    assert (call.name, call.arguments) == ("weather", {})
    assert call.raw.startswith('{"city": "Paris", "days": 3')


def words(text: str) -> str:
    """Letters and digits, without those of whole markup and of JSON's layout."""
    text = re.sub(r"tool_call|function|parameter|think|name|arguments", " ", text)
    return re.sub(r"[^\w]|_", "", text).casefold()


def told(deltas: Sequence[Delta]) -> str:
    texts = []
    for d in deltas:
        text = d.text
        if d.kind == "tool_call":
            text = re.sub(r"\\(u.{4}|.)", lambda m: json.loads(f'"{m[0]}"'), text)
        texts.append(f"{d.name or ''}{text}")
    return "".join(texts)


ALL = [(c[0], c[1], c[2]) for c in CASES.values()] + [
    (dialect, text, False) for dialect in ("xml", "hermes") for text in NO_CALLS.values()
]


@pytest.mark.parametrize("number", range(len(ALL)))
def test_no_beginning_of_an_answer_loses_text(number: int) -> None:
    dialect, text, reasoning = ALL[number]
    if '"arguments": "' in text:
        return  # written anew: its escapes go
    for end in range(len(text) + 1):
        deltas = parts(text[:end], 1, dialect, reasoning)
        given = words(text[:end])
        if '{"arguments"' in text:  # the name comes first
            assert sorted(words(told(deltas))) == sorted(given)
        else:
            assert words(told(deltas)) == given


PIECES = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "<function=weather>", "<function=x>"),
    *("</function>", "<parameter=city>", "<parameter=days>", "</parameter>", "<parameter=", "\n"),
    *("\n", "\n", "\n\n", " ", "`", "```", "alpha", "beta 7", "<", ">", "{", "}", '"'),
    *('{"name": "weather", "arguments": ', '{"city": "x"}', "}", "null", "é☃", "\ufffd", "\0"),
]


@pytest.mark.parametrize("dialect", ["xml", "hermes", None])
def test_how_an_answer_is_cut_changes_nothing_and_loses_nothing(dialect: str | None) -> None:
    rng = random.Random(7)
    for _ in range(1500):
        if rng.random() < 0.7:
            text = "".join(rng.choices(PIECES, k=rng.randrange(24)))
        else:
            text = rng.randbytes(rng.randrange(60)).decode(errors="replace").replace("\\", "/")
        if rng.random() < 0.3:
            text = f"{xml(city='a', days='1')[: rng.randrange(90)]}{text}"
        reasoning = rng.random() < 0.3
        whole = parts(text, max(len(text), 1), dialect, reasoning)
        for size in (1, 3):
            cut = parts(text, size, dialect, reasoning)
            assert _joined(cut) == _joined(whole), repr(text)
        if dialect != "hermes":  # whose JSON may be written anew
            assert words(told(whole)) == words(text), repr(text)


def _joined(deltas: Sequence[Delta]) -> list[tuple[str, int, str | None, str]]:
    joined: list[tuple[str, int, str | None, str]] = []
    for d in deltas:
        if joined and d.id is None and joined[-1][:2] == (d.kind, d.index):
            joined[-1] = (*joined[-1][:3], joined[-1][3] + d.text)
        else:
            joined.append((d.kind, d.index, d.name, d.text))
    return joined


@pytest.mark.parametrize(
    ("text", "dialect"),
    [
        ("{{ '<tool_call>\\n<function=' }} </think>", Dialect("xml", True)),
        ('<tool_call>\n{"name": ', Dialect("hermes", False)),
        ("<think></think>", Dialect(None, True)),
        ("{{ messages }}", Dialect(None, False)),
    ],
)
def test_the_template_shows_the_dialect(text: str, dialect: Dialect) -> None:
    assert Dialect.of(ChatTemplate(text, Path("t"))) == dialect
    assert Dialect.of(None) == Dialect()


def test_the_prompt_shows_whether_reasoning_is_open() -> None:
    thinks = Dialect("xml", thinks=True)
    assert thinks.in_reasoning("<|im_start|>assistant\n<think>\n")
    assert thinks.in_reasoning("<|im_start|>assistant\n<think>\nso far")
    assert not thinks.in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not thinks.in_reasoning("<|im_start|>user\n<think>?<|im_end|>\n<|im_start|>assistant\n")
    assert not Dialect("xml", thinks=False).in_reasoning("<think>\n")
