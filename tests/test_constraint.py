"""Answers that follow a structure, whatever the model: here it is random numbers."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import flashmoe
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.generate import constraint as module
from flashmoe.generate.answer import Answer
from flashmoe.generate.constraint import Constraint, constraint_of, prepare
from flashmoe.generate.dialect import Dialect
from flashmoe.generate.parse import AnswerParser
from flashmoe.generate.tools import ToolSpec, tools_of

SCHEMAS = sorted((Path(__file__).parent / "data/schemas").glob("*.json"))
XML, HERMES = Dialect("xml", thinks=True), Dialect("hermes", thinks=True)
EOS, THINK_END = (0, 2), 4
TOOLS = tools_of(
    [
        {
            "name": "weather",
            "parameters": {
                "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 9}},
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "day": {"$ref": "#/$defs/day"},
                    "unit": {"enum": ["C", "F", "<think>"]},
                    "code": {"type": "string", "minLength": 2, "maxLength": 4},
                    "where": {
                        "type": "object",
                        "properties": {
                            "lat": {"type": "number"},
                            "tags": {"type": "array", "items": {"type": "string"}},
                        },
                        "required": ["lat", "tags"],
                        "additionalProperties": False,
                    },
                    "deep": {"type": ["boolean", "null"]},
                },
                "required": ["city", "unit", "where"],
                "additionalProperties": False,
            },
        },
        {"name": "now"},
    ]
)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open("demo")


def constrain(checkpoint: Checkpoint, **options: Any) -> Constraint:
    found = constraint_of(checkpoint, **{"dialect": XML, **options})
    assert found is not None
    return found


def tokens(constraint: Constraint, rng: np.random.Generator, most: int = 200) -> Iterator[int]:
    """What a model that knows nothing answers."""
    for left in range(most, 0, -1):
        logits = rng.gumbel(size=6144).astype(np.float32)
        token = int(np.argmax(constraint.mask(logits, left)))
        constraint.advance(token)
        if token in EOS:
            return
        yield token
        if constraint.finished:
            return


def text(checkpoint: Checkpoint, constraint: Constraint, seed: int, most: int = 200) -> str:
    ids = list(tokens(constraint, np.random.default_rng(seed), most))
    return checkpoint.tokenizer.library.decode(ids, skip_special_tokens=False)


def allowed(constraint: Constraint, checkpoint: Checkpoint, left: int | None = None) -> list[str]:
    masked = constraint.mask(np.zeros(6144, np.float32), left)
    return [checkpoint.tokenizer.library.id_to_token(int(i)) for i in np.flatnonzero(masked == 0)]


def say(constraint: Constraint, checkpoint: Checkpoint, words: str) -> None:
    for token in checkpoint.tokenizer.encode(words, special=False):
        masked = constraint.mask(np.zeros(6144, np.float32))
        assert masked[token] == 0, f"{checkpoint.tokenizer.piece(token)!r} of {words!r}"
        constraint.advance(token)


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_every_answer_follows_its_schema(path: Path, checkpoint: Checkpoint) -> None:
    schema = json.loads(path.read_text())
    for seed in range(4):
        found = constrain(checkpoint, schema=schema)
        answer = text(checkpoint, found, seed, 512)
        assert found.finished
        jsonschema.validate(json.loads(answer), schema)


@pytest.mark.parametrize("dialect", [XML, HERMES], ids=["xml", "hermes"])
@pytest.mark.parametrize("choice", ["required", "weather"])
def test_a_call_that_must_be_made_is_one_that_the_parser_reads(
    dialect: Dialect, choice: str, checkpoint: Checkpoint
) -> None:
    parameters = {tool.name: tool.parameters for tool in TOOLS}
    named = set()
    for seed in range(20):
        found = constrain(checkpoint, tools=TOOLS, tool_choice=choice, dialect=dialect)
        parser = AnswerParser(dialect, TOOLS)
        said = text(checkpoint, found, seed)
        answer = Answer.of([*parser.push(said), *parser.finish()])
        assert answer.text == ""
        assert answer.invalid_tool_calls == ()
        assert answer.tool_calls
        for call in answer.tool_calls:
            jsonschema.validate(call.arguments, parameters[call.name])
            named.add(call.name)
    assert named == ({"weather", "now"} if choice == "required" else {"weather"})


def test_one_call_at_a_time_where_that_is_wanted(checkpoint: Checkpoint) -> None:
    for many in (True, False):
        found = constrain(checkpoint, tools=TOOLS, tool_choice="now", parallel_tool_calls=many)
        say(found, checkpoint, "<tool_call>\n<function=now>\n</function>\n</tool_call>")
        assert ("Ċ" in allowed(found, checkpoint)) == many
        assert "<|im_end|>" in allowed(found, checkpoint)
        assert found.finished != many
        free = constrain(checkpoint, tools=TOOLS, parallel_tool_calls=many)
        say(free, checkpoint, "Well:\n<tool_call>\n<function=now>\n</function>\n</tool_call>\n")
        assert ("<tool_call>" in allowed(free, checkpoint)) == many
        assert "<|im_end|>" in allowed(free, checkpoint)


@pytest.mark.parametrize("dialect", [XML, HERMES], ids=["xml", "hermes"])
def test_a_call_in_free_text_is_constrained_from_its_opening(
    dialect: Dialect, checkpoint: Checkpoint
) -> None:
    found = constrain(checkpoint, tools=TOOLS, dialect=dialect)
    say(found, checkpoint, "`<tool_call>` opens a call, as in\n```\n<tool_call>\n```\n")
    assert len(allowed(found, checkpoint)) == 6144
    say(found, checkpoint, "Well:\n\n<tool_call>")
    assert allowed(found, checkpoint) == ["Ċ"]
    call = {
        "xml": "\n<function=now>\n</function>\n</tool_call>",
        "hermes": '\n{"name": "now", "arguments": {}}\n</tool_call>',
    }
    say(found, checkpoint, call[str(dialect.calls)])
    assert len(allowed(found, checkpoint)) == 6144
    say(found, checkpoint, "\n<tool_call>")
    assert allowed(found, checkpoint) == ["Ċ"]
    assert not found.finished


def test_a_text_of_any_least_length_may_be_asked_for(checkpoint: Checkpoint) -> None:
    """One that would take the library hours is only as long as it can count."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "minLength": 10**9}}}
    found = constrain(checkpoint, tools=tools_of([{"name": "f", "parameters": schema}]))
    say(found, checkpoint, "<tool_call>\n<function=f>\n<parameter=a>\nb")


def test_none_forbids_the_opening(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)  # it is not needed for that
    found = constrain(checkpoint, tools=TOOLS, tool_choice="none")
    say(found, checkpoint, "Hello\n")
    assert "<tool_call>" not in allowed(found, checkpoint)
    assert len(allowed(found, checkpoint)) == 6143
    assert constraint_of(checkpoint, dialect=XML) is None
    assert constraint_of(checkpoint, tools=TOOLS, dialect=Dialect()) is None


def test_structure_begins_when_the_reasoning_ends(checkpoint: Checkpoint) -> None:
    found = constrain(checkpoint, schema={"type": "object"}, in_reasoning=True)
    say(found, checkpoint, 'so {"a": 1} <tool_call>\n')
    assert sorted(
        set(range(6144)) - set(np.flatnonzero(found.mask(np.zeros(6144, np.float32)) == 0))
    ) == [0, 2]
    found.advance(THINK_END)
    say(found, checkpoint, "\n\n")
    assert all(token.startswith("{") for token in allowed(found, checkpoint))
    free = constrain(checkpoint, tools=TOOLS, in_reasoning=True)
    say(free, checkpoint, "\n<tool_call>\nhm")
    free.advance(THINK_END)
    say(free, checkpoint, "\n\nHi\n<tool_call>")
    assert allowed(free, checkpoint) == ["Ċ"]


def test_beside_a_schema_tools_may_be_called(checkpoint: Checkpoint) -> None:
    for words, ends in (('{"a": 1}', "}"), ("<tool_call>\n<function=now>", ">")):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
        found = constrain(checkpoint, schema=schema, tools=TOOLS)
        say(found, checkpoint, words)
        assert words.endswith(ends)
    with pytest.raises(AssertionError, match="Hello"):
        say(constrain(checkpoint, schema=schema, tools=TOOLS), checkpoint, "Hello")


def test_whitespace_is_bounded(checkpoint: Checkpoint) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for good in ('{"a":1}', '{ "a" : 1 }', '{\n    "a": 1\n}', "{\n" + " " * 24 + '"a": 1}'):
        say(constrain(checkpoint, schema=schema), checkpoint, good)
    for bad in ("{    ", "{\n\n", "{\n" + " " * 25, "{\t"):
        with pytest.raises(AssertionError):
            say(constrain(checkpoint, schema=schema), checkpoint, bad)


def test_a_regular_expression_and_a_grammar_are_followed(checkpoint: Checkpoint) -> None:
    for seed in range(5):
        found = constrain(checkpoint, regex=r"[a-c]{2,4}/[0-9]+;")
        answer = text(checkpoint, found, seed, 400)
        assert found.finished
        head, number = answer.removesuffix(";").split("/")
        assert set(head) <= set("abc")
        assert number.isdecimal()
    found = constrain(checkpoint, grammar='start: "yes" | "no" "!"+')
    say(found, checkpoint, "no!!")
    assert not found.finished


@pytest.mark.parametrize("value", ["<think>", "</tool_call>x"])
def test_a_forced_text_may_hold_markup(value: str, checkpoint: Checkpoint) -> None:
    found = constrain(checkpoint, schema={"const": value})
    assert json.loads(text(checkpoint, found, 0)) == value


@pytest.mark.parametrize("most", [12, 20, 40, 100])
def test_an_answer_ends_before_its_tokens_do(most: int, checkpoint: Checkpoint) -> None:
    schema = json.loads(SCHEMAS[-1].read_text())
    for seed in range(10):
        found = constrain(checkpoint, schema=schema)
        ids = list(tokens(found, np.random.default_rng(seed), most))
        assert len(ids) <= most
        assert found.finished
    endless = constrain(checkpoint, regex="a*")
    logits = np.zeros(6144, np.float32)
    logits[checkpoint.tokenizer.encode("a")[0]] = 9
    for left in range(most, 0, -1):
        token = int(np.argmax(endless.mask(logits, left)))
        endless.advance(token)
        if token in EOS:
            break
    assert token in EOS
    assert endless.hurried


def test_an_answer_is_not_hurried_without_need(checkpoint: Checkpoint) -> None:
    found = constrain(checkpoint, schema={"enum": [12345]})
    assert text(checkpoint, found, 0, 200) == "12345"
    assert not found.hurried
    short = constrain(checkpoint, schema={"enum": ["x" * 100]})
    assert len(list(tokens(short, np.random.default_rng(0), 5))) == 5
    assert not short.finished


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (
            {"schema": {"type": "array", "uniqueItems": True}},
            "schema cannot be enforced.*uniqueItems",
        ),
        ({"schema": {"type": "strnig"}}, "schema cannot be enforced.*strnig"),
        ({"schema": True}, "schema must be a JSON schema"),
        ({"schema": {"const": {1}}}, "schema is not JSON"),
        ({"regex": "("}, "regex cannot be enforced"),
        ({"regex": ""}, "regex must be text"),
        ({"grammar": "start: ("}, "grammar cannot be enforced"),
        ({"grammar": 'start: "a"', "tools": TOOLS}, "exclude one another"),
        ({"schema": {}, "json_object": True}, "one of schema and json_object"),
        ({"tools": TOOLS, "tool_choice": "required", "regex": "a"}, "exclude one another"),
        ({"tools": TOOLS, "tool_choice": "other"}, "a tool's name .weather, now.; got 'other'"),
        ({"tools": TOOLS, "tool_choice": "required", "dialect": Dialect()}, "knows no tools"),
        ({"tool_choice": "required"}, "no tools"),
    ],
)
def test_what_cannot_be_enforced_is_refused(
    options: dict[str, Any], what: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(flashmoe.ArgumentError, match=what):
        constrain(checkpoint, **options)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "uniqueItems": True},
        {"type": "object", "properties": {"b": {"not": {"type": "null"}}}},
        {"type": "integer", "not": {"const": 5}},
        {"type": "array", "items": {"type": "string", "pattern": "(?=a)b"}},
        {"$ref": "http://example.com/schema"},
        {"type": "strnig"},
        True,
    ],
)
@pytest.mark.parametrize("dialect", [XML, HERMES], ids=["xml", "hermes"])
def test_tools_are_taken_leniently(schema: Any, dialect: Dialect, checkpoint: Checkpoint) -> None:
    parameters = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    tools = tools_of([{"name": "f", "parameters": parameters}])
    found = constrain(checkpoint, tools=tools, tool_choice="required", dialect=dialect)
    parser = AnswerParser(dialect, tools)
    said = text(checkpoint, found, 0)
    (call, *_) = Answer.of([*parser.push(said), *parser.finish()]).tool_calls
    assert set(call.arguments) >= ({"a"} if dialect is XML else set())


def test_a_token_that_was_forbidden_is_an_error(checkpoint: Checkpoint) -> None:
    found = constrain(checkpoint, schema={"type": "object"})
    with pytest.raises(flashmoe.ArgumentError, match="cannot go on by its schema"):
        found.advance(checkpoint.tokenizer.encode("x")[0])


def test_without_the_library_it_says_what_to_install(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_grammars", type(module._grammars)())
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(flashmoe.ArgumentError, match=r"pip install 'flashmoe\[chat\]'"):
        constrain(checkpoint, schema={})
    assert constraint_of(checkpoint, tools=TOOLS, dialect=XML) is None


def test_the_tokenizer_is_built_once(checkpoint: Checkpoint) -> None:
    assert prepare(checkpoint) is prepare(checkpoint)
    assert prepare(Checkpoint.open("demo")) is not prepare(checkpoint)


def test_a_tool_is_written_as_the_template_writes_it() -> None:
    spec: ToolSpec = TOOLS[1]
    assert spec.definition["function"]["parameters"] == {"type": "object", "properties": {}}


def test_masks_that_are_known_again_are_those_that_are_computed(checkpoint: Checkpoint) -> None:
    """In text that looks like the markup around it too, and behind half of a character."""
    pieces = [
        "\n",
        "\n",
        "<",
        "</",
        "</param",
        "eter",
        ">",
        "<parameter=city>\n",
        "</function>\n",
        "é",
    ]
    pieces += ["x", "\n</parameter>\n", "\nab", "<function=now>\n"]
    encode = checkpoint.tokenizer.library.encode
    parameters = {"properties": {"city": {"type": "string"}, "n": {}}, "required": ["city"]}
    tools = tools_of([{"name": name, "parameters": parameters} for name in ("f0", "f1")])
    rng = np.random.default_rng(3)
    again = 0
    for _ in range(60):
        found = constrain(checkpoint, tools=tools, tool_choice="required")
        say(found, checkpoint, f"<tool_call>\n<function=f{rng.integers(2)}>\n<parameter=city>\n")
        for _ in range(60):
            if found.finished:
                break
            matcher, place = found._matcher, found._values.place
            computed = matcher.compute_bitmask()
            assert found._grammars.mask(matcher, place) == computed, place
            again += place is not None
            allowed_ids = np.flatnonzero(found.mask(np.zeros(6144, np.float32)) == 0)
            ways = [i for p in pieces for i in encode(p).ids[:1] if i in allowed_ids]
            found.advance(int(rng.choice(ways if ways else allowed_ids)))
    assert again > 100
