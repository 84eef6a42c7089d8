"""Requests of both APIs as one, and replies in the words of each: all of the server but HTTP."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from fake_engine import install, make_directory, make_tokenizer, spelling
from programs import environment
from typer.testing import CliRunner

import flashmoe
from flashmoe.checkpoint.tokenizer import Tokenizer
from flashmoe.cli.main import app
from flashmoe.generate.answer import Answer, Delta, Token
from flashmoe.generate.processors import FrequencyPenalty, LogitBias
from flashmoe.serve import anthropic, openai
from flashmoe.serve.anthropic import MessageReply
from flashmoe.serve.ask import Ask, failure_of
from flashmoe.serve.fields import Fields, RequestError, TooLongError
from flashmoe.serve.openai_reply import ChatReply, Logprobs
from flashmoe.serve.reply import Reply

USER = [{"role": "user", "content": "Hello"}]


def _chat(**fields: Any) -> Ask:
    return openai.chat_of(Fields({"messages": USER, **fields}), "own", 512)


def _message(**fields: Any) -> Ask:
    body = Fields({"messages": USER, "max_tokens": 5, **fields})
    return anthropic.message_of(body, "own")


@pytest.fixture
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer())


def _events(reply: Reply, deltas: list[Delta], answer: Answer) -> list[dict[str, Any]]:
    """The events of a reply of one answer."""

    class Begun:
        prompt_ids = (1, 2, 3)
        cached_tokens = 2

    events = [*reply.begin([Begun()]), *reply.choice(0)]  # type: ignore[list-item]
    for delta in deltas:
        events += reply.piece(0, delta)
    return [*events, *reply.ended(0, answer), *reply.finish()]


def test_a_field_is_named_by_its_place() -> None:
    body = Fields({"a": [{"b": {"c": 5}}]})
    (inner,) = body.objects("a")
    with pytest.raises(RequestError, match=r"a\[0\].b.c must be text; got 5") as caught:
        inner.needed_object("b").text("c")
    assert caught.value.param == "a[0].b.c"
    with pytest.raises(RequestError, match=r"a\[0\].x: field required"):
        inner.needed_text("x")
    with pytest.raises(RequestError, match="the body must be an object"):
        Fields([])


def test_a_whole_number_may_be_written_with_a_point() -> None:
    assert Fields({"n": 3.0}).whole("n", 1, 5) == 3
    for value in (3.5, True, "3", 0, 6):
        with pytest.raises(RequestError, match="n must be a whole number from 1 to 5"):
            Fields({"n": value}).whole("n", 1, 5)


def test_a_long_value_is_not_repeated_whole() -> None:
    with pytest.raises(RequestError) as caught:
        Fields({"n": "x" * 10_000}).whole("n")
    assert len(caught.value.message) < 200


def test_both_apis_ask_for_the_same() -> None:
    schema = {"type": "object"}
    one = _chat(
        max_completion_tokens=5,
        max_tokens=9,
        stop="x",
        top_k=3,
        temperature=1,
        reasoning_effort="none",
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
        tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}],
        tool_choice={"type": "function", "function": {"name": "f"}},
    )
    other = _message(
        stop_sequences=["x"],
        top_k=3,
        temperature=1,
        output_config={"format": {"type": "json_schema", "schema": schema}},
        tools=[{"name": "f", "input_schema": schema}],
        tool_choice={"type": "tool", "name": "f"},
    )
    assert one.messages == other.messages == USER
    differing = {"variables", "logprobs"}
    for name in one.options.keys() - differing:
        assert one.options[name] == other.options[name], name
    assert one.options["tool_choice"] == {"name": "f"}  # which may be the name "none" too
    assert one.model == other.model == "own"


def test_any_model_is_called_as_the_client_calls_it() -> None:
    assert _chat(model="gpt-any").model == "gpt-any"
    assert _message(model="claude-any").model == "claude-any"


@pytest.mark.parametrize(
    ("fields", "think", "variables"),
    [
        ({}, None, {}),
        ({"reasoning_effort": "none"}, False, {"reasoning_effort": "none"}),
        ({"reasoning_effort": "high"}, True, {"reasoning_effort": "high"}),
        (
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
            None,
            {"reasoning_effort": "high", "enable_thinking": False},
        ),
    ],
)
def test_the_templates_own_words_go_before_the_apis(fields, think, variables) -> None:
    options = _chat(**fields).options
    assert (options["think"], options["variables"]) == (think, variables)


def test_negative_seeds_and_a_top_p_of_nothing_are_taken() -> None:
    options = _chat(seed=-1, top_p=0).options
    assert options["seed"] == 2**64 - 1
    assert 0 < options["top_p"] < 1e-6


@pytest.mark.parametrize("given", ["once", [5, 6], ["a", "b"], [[5], "b"]])
def test_prompts_are_taken_in_every_form(given) -> None:
    prompts = openai.completion_of(Fields({"prompt": given}), "own", 512).prompts
    assert prompts == {"once": ["once"], "[5, 6]": [[5, 6]]}.get(str(given), given)


@pytest.mark.parametrize("given", [None, "", [], [""], [[]], [5, "a"], [[5, "a"]], [True], {}])
def test_what_is_no_prompt_is_refused(given) -> None:
    with pytest.raises(RequestError, match="prompt") as caught:
        openai.completion_of(Fields({"prompt": given}), "own", 512)
    assert caught.value.param == "prompt"


def test_results_of_tools_come_before_what_the_user_says() -> None:
    content = [
        {"type": "text", "text": "Well?"},
        {"type": "tool_result", "tool_use_id": "a", "content": "one"},
        {"type": "tool_result", "tool_use_id": "b", "is_error": True},
        {"type": "text", "text": "Go on."},
    ]
    assert _message(messages=[{"role": "user", "content": content}]).messages == [
        {"role": "tool", "tool_call_id": "a", "content": "one"},
        {"role": "tool", "tool_call_id": "b", "content": ""},
        {"role": "user", "content": "Well?\nGo on."},
    ]


def test_an_assistants_blocks_are_one_turn() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "One "},
        {"type": "text", "text": "two."},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
    ]
    turns = [*USER, {"role": "assistant", "content": blocks}, *USER]
    turn = _message(messages=turns).messages[1]
    assert turn["content"] == "One two."
    assert turn["reasoning_content"] == "Hm."
    assert turn["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    with pytest.raises(RequestError, match="tool_result must follow"):
        _message(messages=turns[:2])


def test_results_are_in_the_order_of_the_calls() -> None:
    """Templates write no ids: a model tells results apart by their order."""
    calls = [
        {"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}} for id in "ab"
    ]
    results = [{"role": "tool", "tool_call_id": id, "content": id} for id in "xba"]
    turns = _chat(messages=[*USER, {"role": "assistant", "tool_calls": calls}, *results, *USER])
    assert [turn["content"] for turn in turns.messages] == ["Hello", "", "a", "b", "x", "Hello"]


def test_errors_have_each_apis_shape() -> None:
    error = RequestError("n is wrong", "n")
    assert openai.error_body(error) == {
        "error": {
            "message": "n is wrong",
            "type": "invalid_request_error",
            "param": "n",
            "code": None,
        }
    }
    assert anthropic.error_body(error) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "n is wrong"},
    }
    long = TooLongError(5000, 4096)
    assert openai.error_body(long)["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is 4096 tokens" in openai.error_body(long)["error"]["message"]
    message = anthropic.error_body(long)["error"]["message"]
    assert message == "prompt is too long: 5000 tokens > 4096 maximum"


def test_what_went_wrong_here_is_told_without_its_details() -> None:
    for error in (flashmoe.ReadError("/home/me/x: gone"), KeyError("my prompt")):
        failure = failure_of(error)
        assert failure.status == 500
        assert "my" not in failure.message
        assert "/home" not in failure.message
    assert failure_of(flashmoe.OutOfMemoryError("full")).status == 503


def test_blocks_of_a_message_open_and_close_in_order(tokenizer) -> None:
    deltas = [
        Delta("reasoning", "Hm"),
        Delta("reasoning", "."),
        Delta("text", ""),
        Delta("tool_call", "", 0, "call_1", "f"),
        Delta("tool_call", '{"a": 1}', 0),
        Delta("tool_call", "", 1, "call_2", "g"),
        Delta("tool_call", "{", 1),
    ]
    answer = Answer.of(deltas, "length", prompt_tokens=3, cached_tokens=2, generated_tokens=9)
    reply = MessageReply(_message(), tokenizer, "fp")
    events = _events(reply, deltas, answer)
    assert [(e["type"], e.get("index")) for e in events] == [
        ("message_start", None),
        ("content_block_start", 0),
        *[("content_block_delta", 0)] * 3,
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("content_block_start", 2),
        ("content_block_delta", 2),
        ("content_block_stop", 2),
        ("message_delta", None),
        ("message_stop", None),
    ]
    usage = {"input_tokens": 1, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2}
    usage |= {"output_tokens_details": {"thinking_tokens": 0}}
    assert events[0]["message"]["usage"] == usage | {"output_tokens": 0}
    assert events[-2]["usage"] == usage | {"output_tokens": 9}
    assert events[-2]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert [block.get("input") for block in reply.whole()["content"]] == [None, {"a": 1}, {}]


def test_a_call_that_was_cut_short_is_the_same_streamed_and_whole(tokenizer) -> None:
    deltas = [Delta("tool_call", "", 0, "call_1", "f"), Delta("tool_call", '{"a": "b', 0)]
    reply = ChatReply(_chat(), tokenizer, "fp")
    events = _events(reply, deltas, Answer.of(deltas, "length"))
    pieces = [e["choices"][0]["delta"].get("tool_calls") for e in events]
    assert [p[0]["function"]["arguments"] for p in pieces if p] == ["", '{"a": "b']
    choice = reply.whole()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": "b'


@pytest.mark.parametrize(
    ("pieces", "listed"),
    [
        ([("text", "the"), ("text", " fox")], "the fox"),
        # Layout before the text, some of it in the text's first token.
        ([("text", "", "\n"), ("text", "", "\n"), ("text", "fox")], "fox"),
        ([("reasoning", "the"), ("text", "", "\n"), ("text", "fox")], "fox"),
        # Held back, as what may begin a stop string is, and given later.
        ([("text", "a"), ("text", "", "b"), ("text", "bc", "c")], "abc"),
        # Held back and never given.
        ([("text", "a"), ("text", "", "b"), ("text", "", "c")], "a"),
        ([("text", "a"), ("tool_call", "x"), ("text", "", "\n"), ("text", "b")], "ab"),
    ],
)
def test_the_listed_tokens_are_those_of_the_text(tokenizer, pieces, listed) -> None:
    logprobs = Logprobs(tokenizer)
    taken = []
    for kind, text, *spelled in pieces:
        # Every token of one byte or a word that the tokenizer knows.
        ids = tokenizer.encode(spelled[0] if spelled else text, special=False)
        *first, last = ids
        for id in first:
            taken += logprobs.take(Delta(kind, "", token=Token(id, "", 0.0)))
        taken += logprobs.take(Delta(kind, text, token=Token(last, "", 0.0)))
    data = b"".join(bytes(logprobs.spelled(token.id)["bytes"]) for token in taken)
    assert data.decode() == listed


def test_a_token_that_is_part_of_a_character_has_its_bytes(tokenizer) -> None:
    logprobs = Logprobs(tokenizer)
    first, *_, last = tokenizer.encode("é", special=False)
    assert logprobs.take(Delta("text", "", token=Token(first, "", 0.0))) == []
    taken = logprobs.take(Delta("text", "é", token=Token(last, "", 0.0)))
    assert [logprobs.spelled(token.id)["bytes"] for token in taken] == [[0xC3], [0xA9]]
    assert logprobs.spelled(first)["token"] == "\ufffd"


def test_a_frequency_penalty_grows_with_every_use_and_spares_the_prompt() -> None:
    penalize, zeros = FrequencyPenalty(0.5), np.zeros(4, np.float32)
    assert penalize([1, 1, 2], zeros.copy()).tolist() == [0, 0, 0, 0]
    assert penalize([1, 1, 2, 3], zeros.copy()).tolist() == [0, 0, 0, -0.5]
    assert penalize([1, 1, 2, 3, 3], zeros.copy()).tolist() == [0, 0, 0, -1]
    assert penalize([1, 1, 2, 3, 3, 1], zeros.copy()).tolist() == [0, -0.5, 0, -1]


def test_biases_are_added() -> None:
    assert LogitBias({1: 5, 3: -100})([], np.ones(4, np.float32)).tolist() == [1, 6, 1, -99]


def test_a_completion_is_cached_and_says_what_generate_says(monkeypatch, tmp_path) -> None:
    engine = install(monkeypatch, spelling("Hi there.", make_tokenizer()))
    with flashmoe.Model(make_directory(tmp_path / "model")) as model:
        expected = "".join(token.text for token in model.generate("the fox"))
        first = model.complete("the fox", stop="re").answer
        assert (first.text, first.finish_reason, first.stop) == ("Hi the", "stop", "re")
        assert first.cached_tokens == 0
        engine.calls.clear()
        again = model.complete("the fox")
        assert again.cached_tokens == first.prompt_tokens
        assert (again.answer.text, again.answer.stop) == (expected, None)
        assert engine.calls == [1] * (again.answer.generated_tokens - 1)
        with pytest.raises(flashmoe.ArgumentError, match="max_tokens"):
            model.complete("the fox", max_tokens=-1)
        with pytest.raises(flashmoe.ArgumentError, match="the prompt is empty"):
            model.complete([])


def test_without_the_extra_it_is_said_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    for name in [name for name in sys.modules if name.startswith("flashmoe.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    result = CliRunner().invoke(app, ["serve", "demo"])
    assert result.exit_code == 2
    assert "pip install 'flashmoe[serve]'" in result.stderr


def test_only_the_server_needs_the_extra() -> None:
    """What is tested here is used where starlette and uvicorn are absent."""
    code = (
        "import sys; sys.modules['starlette'] = sys.modules['uvicorn'] = None;"
        "import flashmoe.serve.openai_reply, flashmoe.serve.anthropic, flashmoe.cli.main"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())
