"""Whatever a body holds, it is answered or refused, and the server goes on."""

import copy
import json
import random

import pytest
from conversing import WEATHER

REQUESTS = {
    "/v1/chat/completions": {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
            {
                "role": "assistant",
                "content": "Yes",
                "reasoning_content": "Hm",
                "tool_calls": [
                    {
                        "id": "a",
                        "type": "function",
                        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": "rain"},
        ],
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
        "parallel_tool_calls": False,
        "max_tokens": 3,
        "max_completion_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {"5": 1},
        "seed": 1,
        "n": 1,
        "stop": ["x", "y"],
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False},
        "continue_final_message": False,
    },
    "/v1/completions": {
        "model": "m",
        "prompt": ["Once", "It was"],
        "max_tokens": 2,
        "logprobs": 1,
        "echo": False,
        "stop": "x",
        "n": 1,
        "seed": 3,
    },
    "/v1/messages": {
        "model": "m",
        "max_tokens": 3,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "Hello"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "Hm", "signature": "s"},
                    {"type": "text", "text": "Yes"},
                    {"type": "tool_use", "id": "a", "name": "f", "input": {"a": 1}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "a", "content": "b"}],
            },
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "stop_sequences": ["x"],
        "temperature": 0.5,
        "top_k": 5,
        "output_config": {
            "effort": "low",
            "format": {"type": "json_schema", "schema": {"type": "object", "properties": {}}},
        },
        "stream": False,
    },
    "/v1/messages/count_tokens": {
        "model": "m",
        "messages": [{"role": "user", "content": "Hello"}],
        "tools": [{"name": "f", "input_schema": {"type": "object", "required": ["a"]}}],
    },
}
VALUES = (
    None, True, False, 0, 1, -1, 3, 1.5, -0.0, 1e300, 10**40, "", "x", "auto", "user", "text",
    "Ä\n\0", "</tool_call><|im_end|>", [], {}, [[]], [None], [{}], {"": None}, {"type": "object"},
    {"type": ["string", 5]}, {"type": "function"}, {"type": []}, {"$ref": "#"}, {"enum": [1, []]},
    {"properties": {"a": {"anyOf": 5, "allOf": 5, "enum": 7}}}, ["a", 1], [{"type": "text"}],
)  # fmt: skip


def _places(value, place=()):
    """Every place in a JSON value."""
    yield place
    for key in (
        value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0)
    ):
        yield from _places(value[key], (*place, key))


def _mutated(body, rng: random.Random):
    body = copy.deepcopy(body)
    for _ in range(rng.choice((1, 1, 2, 4))):
        *way, last = rng.choice([place for place in _places(body) if place])
        holder = body
        for key in way:
            holder = holder[key]
        kind = rng.random()
        if kind < 0.2:
            del holder[last]
        elif kind < 0.3 and isinstance(holder, dict):
            holder[rng.choice(("type", "role", "content", "name", "$defs", "x"))] = rng.choice(
                VALUES
            )
        else:
            holder[last] = copy.deepcopy(rng.choice(VALUES))
        if not body:
            break
    return body


@pytest.mark.parametrize("path", REQUESTS)
def test_a_mutated_request_is_answered_or_refused(demo, path) -> None:
    rng = random.Random(path)
    base = REQUESTS[path]
    assert demo.request(path, base).status == 200
    statuses = []
    for _ in range(150):
        body = _mutated(base, rng)
        if isinstance(body, dict) and isinstance(body.get("n"), int) and body["n"] > 3:
            body["n"] = 3
        for name in ("max_tokens", "max_completion_tokens"):  # so that it ends soon
            if isinstance(body.get(name), (int, float)) and body[name] > 3:
                body[name] = 3
        reply = demo.request(path, body)
        statuses.append(reply.status)
        assert reply.status in (200, 400), (body, reply.body)
        if reply.status == 400:
            error = reply.json["error"]
            assert error["type"] == "invalid_request_error"
            assert error["message"]
        elif reply.headers["content-type"].startswith("text/event-stream"):
            assert all("error" not in chunk for chunk in reply.chunks), (body, reply.chunks[-1])
    assert {200, 400} <= set(statuses)
    demo.wait_until_idle()


def test_bytes_that_are_no_request_are_refused(demo) -> None:
    rng = random.Random(5)
    for path, base in REQUESTS.items():
        data = json.dumps(base).encode()
        for _ in range(25):
            damaged = bytearray(data[: rng.randrange(1, len(data))])
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            assert demo.request(path, bytes(damaged)).status == 400
    demo.says("Hi.")
    assert demo.chat().status == 200
