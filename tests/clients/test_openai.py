"""The `openai` client, through all that it can ask of a server."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pydantic
import pytest
from conversing import WEATHER, call_text
from serving import Served

QUESTION = [{"role": "user", "content": "What is a mixture of experts?"}]
CALL = call_text({"city": "Oslo", "days": 3})


def _client(server: Served, **options) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60, **options
    )


def _ask(server: Served, messages=QUESTION, **options):
    options = {"model": "demo", "max_tokens": 20, "temperature": 0, **options}
    return _client(server).chat.completions.create(messages=messages, **options)


def _collected(stream):
    """A stream's text, its last finish reason, and its usage."""
    text, finish, usage = "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish, usage


def test_an_answer_is_the_models(demo, demo_model) -> None:
    answer = _ask(demo)
    (choice,) = answer.choices
    expected = demo_model.chat(QUESTION, temperature=0, max_tokens=20, processors=[]).answer
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is None
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "demo"
    assert answer.system_fingerprint.startswith("fp_")
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == 20
    assert answer.usage.total_tokens == expected.prompt_tokens + 20


def test_a_stream_is_the_answer_in_pieces(demo) -> None:
    whole = _ask(demo)
    chunks = list(_ask(demo, stream=True))
    assert {c.id for c in chunks} == {chunks[0].id}
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert [c.choices[0].delta.role for c in chunks[:2]] == ["assistant", None]
    assert _collected(chunks)[0] == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
    assert all(c.usage is None for c in chunks)
    text, finish, usage = _collected(
        _ask(demo, stream=True, stream_options={"include_usage": True})
    )
    assert (text, finish) == (whole.choices[0].message.content, "length")
    assert usage.completion_tokens == 20


def test_a_stop_string_and_the_end_both_say_stop(demo) -> None:
    demo.says("One two three.")
    assert _ask(demo).choices[0].finish_reason == "stop"
    answer = _ask(demo, stop=["two", "three"])
    assert answer.choices[0].message.content.strip() == "One"
    assert answer.choices[0].finish_reason == "stop"
    assert _collected(_ask(demo, stop="three", stream=True))[:2] == ("One two ", "stop")


def test_choices_differ_by_their_seeds(demo) -> None:
    options = {"temperature": 2.0, "seed": 7, "n": 3}
    answer = _ask(demo, **options)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    alone = [_ask(demo, temperature=2.0, seed=seed) for seed in (7, 8, 9)]
    assert texts == [a.choices[0].message.content for a in alone]
    assert len(set(texts)) == 3
    assert answer.usage.prompt_tokens == alone[0].usage.prompt_tokens
    assert answer.usage.completion_tokens == 60
    streamed = ["", "", ""]
    for chunk in _ask(demo, stream=True, **options):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


@pytest.mark.parametrize("text", ["Grüße, 世界! 🙂 fin", "  two spaces\n\nand lines\n"])
def test_logprobs_spell_the_content(demo, text) -> None:
    demo.says(text)
    answer = _ask(demo, logprobs=True, top_logprobs=3, max_tokens=60)
    listed = answer.choices[0].logprobs.content
    content = answer.choices[0].message.content
    assert b"".join(bytes(token.bytes) for token in listed) == content.encode()
    assert all(len(token.top_logprobs) == 3 for token in listed)
    assert all(token.logprob <= 0 for token in listed)
    streamed = []
    for chunk in _ask(demo, logprobs=True, stream=True, max_tokens=60):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert [t.token for t in streamed] == [t.token for t in listed]
    assert not streamed[0].top_logprobs


def test_logprobs_are_those_of_the_likeliest_tokens(demo) -> None:
    answer = _ask(demo, logprobs=True, top_logprobs=2)
    for token in answer.choices[0].logprobs.content:
        assert token.top_logprobs[0].token == token.token
        assert token.top_logprobs[0].logprob == pytest.approx(token.logprob)
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def test_a_tool_is_called_and_its_result_is_answered(demo) -> None:
    demo.says(f"Let me see.\n\n{CALL}")
    answer = _ask(demo, tools=[WEATHER], max_tokens=100)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert call.id.startswith("call_")
    assert json.loads(call.function.arguments) == {"city": "Oslo", "days": 3}

    demo.says("It rains.")
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    history = [*QUESTION, choice.message, result]
    second = _ask(demo, history, tools=[WEATHER], max_tokens=100)
    assert second.choices[0].message.content == "It rains."
    assert "<tool_response>\nrain\n</tool_response>" in demo.prompts[-1]
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached >= answer.usage.prompt_tokens


def test_a_call_streams_its_head_once_and_then_its_arguments(demo) -> None:
    demo.says(call_text({"city": "Oslo", "days": 3}, {"city": "Rome", "days": 1}))
    chunks = list(_ask(demo, tools=[WEATHER], stream=True, max_tokens=200))
    pieces = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or ()]
    heads = [piece for piece in pieces if piece.id]
    assert [(h.index, h.type, h.function.name) for h in heads] == [
        (0, "function", "weather"),
        (1, "function", "weather"),
    ]
    assert heads[0].id != heads[1].id
    assert all(not p.function.name and p.type is None for p in pieces if not p.id)
    texts = ["", ""]
    for piece in pieces:
        texts[piece.index] += piece.function.arguments
    assert [json.loads(text) for text in texts] == [
        {"city": "Oslo", "days": 3},
        {"city": "Rome", "days": 1},
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with _client(demo).chat.completions.stream(
        model="demo", messages=QUESTION, tools=[WEATHER], max_tokens=200
    ) as stream:
        final = stream.get_final_completion()
    assert len(final.choices[0].message.tool_calls) == 2


def test_tool_choice_is_obeyed(demo) -> None:
    forced = _ask(demo, tools=[WEATHER], tool_choice="required", max_tokens=150)
    assert forced.choices[0].message.tool_calls[0].function.name == "weather"
    named = {"type": "function", "function": {"name": "weather"}}
    forced = _ask(demo, tools=[WEATHER], tool_choice=named, max_tokens=150)
    (call, *_) = forced.choices[0].message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    alone = _ask(
        demo, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=150
    )
    assert len(alone.choices[0].message.tool_calls) == 1
    assert _ask(demo, tools=[WEATHER], tool_choice="none").choices[0].message.tool_calls is None


class Reading(pydantic.BaseModel):
    kind: Literal["rain", "sun"]
    degrees: int


def test_structured_output_is_parsed(demo) -> None:
    client = _client(demo)
    parsed = client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Reading, max_tokens=60
    )
    assert isinstance(parsed.choices[0].message.parsed, Reading)
    with client.chat.completions.stream(
        model="demo", messages=QUESTION, response_format=Reading, max_tokens=60
    ) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Reading)
    answer = _ask(demo, response_format={"type": "json_object"}, max_tokens=60)
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_reasoning_comes_apart_and_goes_back_in(thinker) -> None:
    thinker.says("I think.\nHard.\n</think>\n\nForty-two.")
    answer = _ask(thinker, max_tokens=60)
    message = answer.choices[0].message
    assert message.content == "Forty-two."
    assert message.reasoning_content == "I think.\nHard."
    assert answer.usage.completion_tokens_details.reasoning_tokens > 3
    pieces = [chunk.choices[0].delta for chunk in _ask(thinker, max_tokens=60, stream=True)]
    reasoning = "".join(getattr(piece, "reasoning_content", None) or "" for piece in pieces)
    assert reasoning == "I think.\nHard."
    history = [*QUESTION, message.model_dump(exclude_none=True), {"role": "user", "content": "?"}]
    _ask(thinker, history, max_tokens=60)
    assert "<think>\nI think.\nHard.\n</think>\n\nForty-two.<|im_end|>" in thinker.prompts[-1]
    history[1] = {"role": "assistant", "content": "Forty-two."}  # many clients leave it out
    second = _ask(thinker, history, max_tokens=60)
    assert "<think>\nI think.\nHard.\n</think>" in thinker.prompts[-1]
    assert second.usage.prompt_tokens_details.cached_tokens >= answer.usage.total_tokens - 1


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, False),
        ({"reasoning_effort": "low"}, True),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, False),
    ],
)
def test_the_request_says_whether_to_reason(thinker, fields, thinks) -> None:
    thinker.says("a</think>\n\nb" if thinks else "b")
    message = _ask(thinker, **fields).choices[0].message
    assert message.content == "b"
    assert hasattr(message, "reasoning_content") is thinks


def test_a_message_is_continued(demo) -> None:
    demo.says(" is fine.")
    turns = [*QUESTION, {"role": "assistant", "content": "All"}]
    answer = _ask(demo, turns, extra_body={"continue_final_message": True})
    assert answer.choices[0].message.content == " is fine."
    assert demo.prompts[-1].endswith("All")


def test_what_was_computed_is_not_computed_again(demo) -> None:
    first = _ask(demo)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    turns = [
        *QUESTION,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Go on."},
    ]
    before = demo.rows()
    second = _ask(demo, turns)
    cached = second.usage.prompt_tokens_details.cached_tokens
    # Of an answer that was cut short the last token was not passed.
    assert cached >= first.usage.total_tokens - 1
    assert demo.rows() - before <= second.usage.total_tokens - cached


def test_a_text_is_completed(demo, demo_model) -> None:
    client = _client(demo)
    options = {"model": "demo", "prompt": "It was a cold morning, and", "temperature": 0}
    answer = client.completions.create(**options)
    expected = "".join(
        t.text
        for t in demo_model.generate("It was a cold morning, and", max_tokens=16, temperature=0)
    )
    assert answer.object == "text_completion"
    assert answer.choices[0].text == expected
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    chunks = list(client.completions.create(stream=True, **options))
    assert "".join(c.choices[0].text for c in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert client.completions.create(echo=True, **options).choices[0].text == (
        "It was a cold morning, and" + expected
    )
    longer = client.completions.create(
        **options | {"prompt": "It was a cold morning, and" + expected}
    )
    assert longer.usage.prompt_tokens_details.cached_tokens > 0
    ids = demo_model.tokenizer.encode("It was a cold morning, and").ids
    many = client.completions.create(**options | {"prompt": [ids, "It was"], "n": 2})
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text == expected
    listed = client.completions.create(logprobs=2, **options).choices[0].logprobs
    assert "".join(listed.tokens) == expected
    assert all(len(top) == 2 for top in listed.top_logprobs)
    assert listed.text_offset[0] == 0
    assert listed.text_offset[-1] == len(expected) - len(listed.tokens[-1])


def test_the_model_is_listed_with_its_context(demo) -> None:
    client = _client(demo)
    (model,) = client.models.list()
    assert (model.id, model.context_length) == ("demo", 4096)
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.models.retrieve("gpt-none")


def test_too_long_a_conversation_is_said_in_the_words_that_agents_know(demo) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            _ask(demo, [{"role": "user", "content": "word " * 6000}], stream=stream)
        assert caught.value.code == "context_length_exceeded"
        assert "maximum context length is 4096 tokens" in str(caught.value)


def test_more_tokens_than_the_context_has_room_for_are_what_it_has(demo) -> None:
    demo.says("Short.")
    assert _ask(demo, max_tokens=10**9).choices[0].message.content == "Short."
    assert _ask(demo, max_tokens=None).choices[0].message.content == "Short."


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": 5}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
        ({"extra_body": {"chat_template_kwargs": {"tools": 1}}}, "chat_template_kwargs.tools"),
        ({"extra_body": {"continue_final_message": True}}, None),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0]",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_value_is_named(demo, fields, param, stream) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        _ask(demo, **{"stream": stream, **fields})
    assert caught.value.status_code == 400
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param
    assert (param or "continue") in caught.value.message


def test_a_schema_that_cannot_be_enforced_is_refused(demo) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "no-such"}}}
    schema["patternProperties"] = {"(?=x)y": {"not": {}}}
    format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="cannot be enforced") as caught:
        _ask(demo, response_format=format)
    assert caught.value.param == "response_format"


def test_a_token_is_forbidden(demo, demo_model) -> None:
    first = _ask(demo, logprobs=True).choices[0].logprobs.content[0].token
    (token,) = demo_model.tokenizer.encode(first, add_special_tokens=False).ids
    banned = _ask(demo, logprobs=True, logit_bias={str(token): -100})
    assert banned.choices[0].logprobs.content[0].token != first


def test_eight_at_once_get_what_each_gets_alone(demo) -> None:
    asks = [
        {
            "messages": [{"role": "user", "content": f"Tell me of the number {i}. " * (i + 1)}],
            "temperature": 0.8,
            "seed": i,
            "max_tokens": 24,
        }
        for i in range(8)
    ]
    alone = [_ask(demo, **ask).choices[0].message.content for ask in asks]
    demo.model.conversations.clear()
    together = threading.Barrier(8)

    def run(ask):
        together.wait()
        return _collected(_ask(demo, stream=True, **ask))[0]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(run, asks)) == alone


def test_a_client_that_leaves_stops_the_work(demo) -> None:
    start = demo.rows()
    stream = _ask(demo, max_tokens=3000, stream=True, logit_bias={"2": -100, "0": -100})
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    assert demo.health()["busy"] == 1
    stream.close()
    demo.wait_until_idle()
    before = demo.rows()
    assert before - start < 2500
    assert demo.health()["busy"] == 0
    assert demo.rows() == before


def test_an_async_client_streams(demo) -> None:
    import asyncio  # noqa: PLC0415

    async def main() -> str:
        client = openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0)
        stream = await client.chat.completions.create(
            model="demo", messages=QUESTION, max_tokens=20, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(main()) == _ask(demo).choices[0].message.content
