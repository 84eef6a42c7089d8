"""The `anthropic` client, and what Claude Code sends, through all that they can ask of a server."""

import json

import anthropic
import pydantic
import pytest
from conversing import call_text
from serving import Served

QUESTION = [{"role": "user", "content": "What is a mixture of experts?"}]
CALL = call_text({"city": "Oslo", "days": 3})
WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
    },
    "cache_control": {"type": "ephemeral"},
}
THINK = {"type": "enabled", "budget_tokens": 1024}


def _client(server: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=60)


def _ask(server: Served, messages=QUESTION, **options):
    options = {"model": "claude-any-1", "max_tokens": 60, "messages": messages, **options}
    if "temperature" in options:  # which newer versions of the client have no argument for
        more = {"temperature": options.pop("temperature")}
        options["extra_body"] = {**more, **options.get("extra_body", {})}
    return _client(server).messages.create(**options)


def test_an_answer_is_the_models(demo, demo_model) -> None:
    answer = _ask(demo, max_tokens=20, temperature=0)
    expected = demo_model.chat(QUESTION, temperature=0, max_tokens=20, processors=[]).answer
    assert [(block.type, block.text) for block in answer.content] == [("text", expected.text)]
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", "claude-any-1")
    assert answer.id.startswith("msg_")
    assert (answer.stop_reason, answer.stop_sequence) == ("max_tokens", None)
    assert answer.usage.input_tokens == expected.prompt_tokens
    assert answer.usage.output_tokens == 20


def test_the_stream_has_the_strict_order(thinker) -> None:
    thinker.says(f"Hm.\n</think>\n\nLet me see.\n\n{CALL}")
    events = list(_ask(thinker, tools=[WEATHER], thinking=THINK, max_tokens=300, stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    blocks = []
    for event in events[1:-2]:
        if event.type == "content_block_start":
            assert event.index == len(blocks)
            blocks.append((event.content_block, []))
        elif event.type == "content_block_delta":
            assert event.index == len(blocks) - 1
            blocks[-1][1].append(event.delta)
        else:
            assert (event.type, event.index) == ("content_block_stop", len(blocks) - 1)
    assert [block.type for block, _ in blocks] == ["thinking", "text", "tool_use"]
    thoughts = blocks[0][1]
    assert "".join(d.thinking for d in thoughts[:-1]) == "Hm."
    assert thoughts[-1].type == "signature_delta"
    assert thoughts[-1].signature
    assert "".join(d.text for d in blocks[1][1]) == "Let me see."
    use, pieces = blocks[2]
    assert (use.name, use.input) == ("weather", {})
    assert use.id.startswith("toolu_")
    assert json.loads("".join(d.partial_json for d in pieces)) == {"city": "Oslo", "days": 3}
    assert events[-2].delta.stop_reason == "tool_use"
    start = events[0].message
    assert (start.content, start.stop_reason) == ([], None)
    assert start.usage.input_tokens == events[-2].usage.input_tokens > 0
    assert events[-2].usage.output_tokens > 20


def test_the_clients_own_accumulation_gives_the_whole_message(thinker) -> None:
    thinker.says(f"Hm.\n</think>\n\nLet me see.\n\n{CALL}")
    options = {"tools": [WEATHER], "thinking": THINK, "max_tokens": 300}
    whole = _ask(thinker, **options)
    with _client(thinker).messages.stream(model="m", messages=QUESTION, **options) as stream:
        final = stream.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    for one, other in zip(whole.content, final.content, strict=True):
        assert one.model_dump(exclude={"id", "parsed_output"}) == other.model_dump(
            exclude={"id", "parsed_output"}
        )
    assert whole.stop_reason == final.stop_reason == "tool_use"
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_tools_result_is_answered(thinker) -> None:
    thinker.says(f"Hm.\n</think>\n\n{CALL}")
    first = _ask(thinker, tools=[WEATHER], thinking=THINK, max_tokens=300)
    thinker.says("So.\n</think>\n\nIt rains.")
    use = first.content[-1]
    result = {
        "type": "tool_result",
        "tool_use_id": use.id,
        "content": [{"type": "text", "text": "rain", "cache_control": {"type": "ephemeral"}}],
    }
    history = [
        *QUESTION,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
    ]
    second = _ask(thinker, history, tools=[WEATHER], thinking=THINK, max_tokens=300)
    assert second.content[-1].text == "It rains."
    prompt = thinker.prompts[-1]
    assert "<think>\nHm.\n</think>" in prompt
    assert "\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>user\nWell?" in prompt
    assert second.usage.cache_read_input_tokens >= first.usage.input_tokens


def test_reasoning_is_given_only_where_it_is_asked_for(thinker) -> None:
    thinker.says("Plain.")
    assert [block.type for block in _ask(thinker).content] == ["text"]
    assert thinker.prompts[-1].endswith("<think>\n\n</think>\n\n")
    disabled = _ask(thinker, thinking={"type": "disabled"})
    assert [block.type for block in disabled.content] == ["text"]
    thinker.says("Hm.\n</think>\n\nSo.")
    for thinking in (THINK, {"type": "adaptive"}):
        kinds = [block.type for block in _ask(thinker, thinking=thinking).content]
        assert kinds == ["thinking", "text"]


def test_tool_choice_is_obeyed(demo) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        answer = _ask(demo, tools=[WEATHER], tool_choice=choice, max_tokens=200, temperature=0)
        uses = [block for block in answer.content if block.type == "tool_use"]
        assert uses[0].name == "weather"
        assert set(uses[0].input) == {"city", "days"}
    one = {"type": "any", "disable_parallel_tool_use": True}
    answer = _ask(demo, tools=[WEATHER], tool_choice=one, max_tokens=200, temperature=0)
    assert [block.type for block in answer.content] == ["tool_use"]
    answer = _ask(demo, tools=[WEATHER], tool_choice={"type": "none"}, temperature=0)
    assert [block.type for block in answer.content] == ["text"]


class Reading(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=12)
    degrees: int


def test_structured_output_is_parsed(demo) -> None:
    parsed = _client(demo).messages.parse(
        model="m", max_tokens=80, messages=QUESTION, output_format=Reading
    )
    assert isinstance(parsed.parsed_output, Reading)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    format = {"type": "json_schema", "schema": schema}
    answer = _ask(demo, output_config={"format": format, "effort": "low"})
    assert isinstance(json.loads(answer.content[0].text)["a"], int)
    answer = _ask(demo, extra_body={"output_format": format})
    assert isinstance(json.loads(answer.content[0].text)["a"], int)


def test_a_stop_sequence_is_named(demo) -> None:
    demo.says("One two three.")
    answer = _ask(demo, stop_sequences=["five", "three"])
    assert answer.content[0].text.strip() == "One two"
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "three")
    answer = _ask(demo)
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    events = list(_ask(demo, stop_sequences=["three"], stream=True))
    assert events[-2].delta.stop_sequence == "three"


def test_a_prefill_is_continued(demo) -> None:
    demo.says(" is fine.")
    for prefill in ("All", [{"type": "text", "text": "All"}]):
        answer = _ask(demo, [*QUESTION, {"role": "assistant", "content": prefill}])
        assert answer.content[0].text == " is fine."
        assert demo.prompts[-1].endswith("All")


def test_what_was_computed_is_read_from_the_cache(demo) -> None:
    first = _ask(demo, temperature=0)
    assert first.usage.cache_read_input_tokens == 0
    turns = [
        *QUESTION,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": "Go on."},
    ]
    second = _ask(demo, turns, temperature=0)
    read = second.usage.cache_read_input_tokens
    assert read >= first.usage.input_tokens + first.usage.output_tokens - 1
    start = next(iter(_ask(demo, turns, temperature=0, stream=True)))
    total = second.usage.input_tokens + read
    usage = start.message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == total
    assert usage.cache_read_input_tokens >= read


def test_no_tokens_only_fill_the_cache(demo) -> None:
    warm = _ask(demo, max_tokens=0)
    assert (warm.content, warm.stop_reason) == ([], "max_tokens")
    assert _ask(demo, max_tokens=1).usage.cache_read_input_tokens == warm.usage.input_tokens


def test_claude_codes_request_is_answered_and_its_header_breaks_no_prefix(demo) -> None:
    def ask(number: int, *turns):
        system = [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.{number}; cch=0"},
            {
                "type": "text",
                "text": "You are Claude Code.",
                "cache_control": {"type": "ephemeral"},
            },
            {
                "type": "text",
                "text": "Be brief.",
                "cache_control": {"type": "ephemeral", "ttl": "1h"},
            },
        ]
        return _client(demo).beta.messages.create(
            model="claude-opus-4-6",
            max_tokens=32000,
            system=system,
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "<system-reminder>\nx\n</system-reminder>"},
                        {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}},
                    ],
                },
                *turns,
            ],
            tools=[WEATHER],
            metadata={"user_id": "user_1"},
            thinking={"type": "adaptive"},
            betas=["claude-code-20250219", "interleaved-thinking-2025-05-14", "no-such-beta"],
            extra_body={"temperature": 1, "context_management": {"edits": []}, "anything": None},
        )

    demo.says("Hello.")
    first = ask(1)
    assert first.content[0].text == "Hello."
    assert "billing" not in demo.prompts[-1]
    assert "You are Claude Code.\nBe brief." in demo.prompts[-1]
    second = ask(2, {"role": "assistant", "content": first.content}, *QUESTION)
    total = first.usage.input_tokens + first.usage.output_tokens
    assert second.usage.cache_read_input_tokens >= total - 1


def test_tokens_are_counted(demo) -> None:
    client = _client(demo)
    tokens = client.messages.count_tokens(model="m", messages=QUESTION).input_tokens
    assert tokens == _ask(demo, max_tokens=1).usage.input_tokens
    more = client.messages.count_tokens(
        model="m", messages=QUESTION, tools=[WEATHER], system="Be brief."
    )
    assert more.input_tokens > tokens + 50


def test_the_model_is_listed(demo) -> None:
    (model,) = _client(demo).models.list()
    assert (model.id, model.type, model.max_input_tokens) == ("demo", "model", 4096)
    assert model.created_at.year >= 2024
    assert _client(demo).models.retrieve("demo").id == "demo"
    with pytest.raises(anthropic.NotFoundError) as caught:
        _client(demo).models.retrieve("other")
    assert caught.value.body["error"]["type"] == "not_found_error"


def test_too_long_a_prompt_is_said_in_the_words_that_agents_know(demo) -> None:
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError) as caught:
            _ask(demo, [{"role": "user", "content": "word " * 6000}], stream=stream)
        message = caught.value.body["error"]["message"]
        assert message.startswith("prompt is too long: 60")
        assert message.endswith("tokens > 4096 maximum")


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens: field required"),
        ({"temperature": -1}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"thinking": {"type": "much"}}, "thinking.type"),
        ({"tool_choice": {"type": "must"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0]"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
        ({"system": 5}, "system"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}
                        ],
                    }
                ]
            },
            "messages[0].content[0].content[0]",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_value_is_named(demo, fields, name, stream) -> None:
    with pytest.raises(anthropic.BadRequestError) as caught:
        _ask(demo, **{"stream": stream, **fields})
    body = caught.value.body
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert name in body["error"]["message"]


def test_a_client_that_leaves_stops_the_work(demo) -> None:
    demo.says("word " * 3000)
    with _client(demo).messages.stream(model="m", max_tokens=3000, messages=QUESTION) as stream:
        for _, _event in zip(range(8), stream, strict=False):
            pass
        assert demo.health()["busy"] == 1
    demo.wait_until_idle()
    before = demo.rows()
    demo.health()
    assert demo.rows() == before


def test_an_answer_that_is_cut_short_within_a_call_has_what_is_there(demo) -> None:
    demo.says(CALL)
    whole = _ask(demo, tools=[WEATHER], max_tokens=20)
    assert whole.stop_reason == "max_tokens"
    (use,) = whole.content
    assert (use.type, use.name, use.input) == ("tool_use", "weather", {})
