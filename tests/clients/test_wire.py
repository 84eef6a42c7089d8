"""What clients hide: headers, events, silence, clients that leave, errors on the way."""

import contextlib
import http.client
import json
import shutil
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conversing import DEMO, WEATHER
from serving import Served, served

import flashmoe

QUESTION = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "m", "messages": QUESTION, "max_tokens": 5, "temperature": 0}
PATHS = ["/v1/chat/completions", "/v1/messages"]


@contextlib.contextmanager
def _sent(server: Served, path: str, body) -> socket.socket:
    """A connection over which a request went, for others to read or to close."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
        connection.sendall(head.encode() + data)
        yield connection


def _until_busy(server: Served) -> None:
    while not server.health()["busy"]:
        time.sleep(0.005)


def test_a_stream_is_the_bytes_that_the_api_documents(demo) -> None:
    demo.says("I am.")
    reply = demo.chat(stream=True, stream_options={"include_usage": True})
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    assert reply.events[-1] == (None, "[DONE]")
    *chunks, usage = reply.chunks
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "I"},
        {"content": " am"},
        {"content": "."},
        {},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 4
    keys = {"id", "object", "created", "model", "system_fingerprint", "choices", "usage"}
    assert all(chunk.keys() == keys for chunk in reply.chunks)
    without = demo.chat(stream=True)
    assert all("usage" not in chunk for chunk in without.chunks)


def test_events_of_a_message_are_named_as_they_are_typed(demo) -> None:
    demo.says("I am")
    reply = demo.message(stream=True)
    assert [name for name, _ in reply.events] == [chunk["type"] for chunk in reply.chunks]
    assert [name for name, _ in reply.events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize("path", PATHS)
def test_headers_leave_at_once_and_silence_is_filled_every_second(demo, path) -> None:
    slept = []

    def sleep() -> None:
        if not slept:
            slept.append(time.sleep(2.6))

    demo.says("Hi.")
    demo.before_token = sleep
    connection = http.client.HTTPConnection("127.0.0.1", demo.port, timeout=30)
    with contextlib.closing(connection):
        start = time.monotonic()
        connection.request("POST", path, json.dumps({**CHAT, "stream": True}))
        response = connection.getresponse()
        assert response.status == 200
        assert not slept, "headers came after the first token"
        assert time.monotonic() - start < 2
        text = response.read().decode()
    silence = "\n: still at work\n" if path == PATHS[0] else 'event: ping\ndata: {"type":"ping"}\n'
    assert text.count(silence) in (2, 3)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_leaves_stops_the_work_and_what_was_computed_stays(
    demo, path, stream
) -> None:
    demo.says("word " * 3000)
    start = demo.rows()
    drawn = threading.Event()
    demo.before_token = drawn.set
    body = {**CHAT, "max_tokens": 3000, "stream": stream}
    with _sent(demo, path, body):
        assert drawn.wait(10)
    demo.wait_until_idle()
    rows = demo.rows()
    assert rows - start < 2500
    assert demo.rows() == rows
    demo.before_token = lambda: None
    usage = demo.chat(max_tokens=1).json["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


def test_a_client_that_leaves_during_its_prompt_stops_that_too(demo) -> None:
    words = {"role": "user", "content": "some words " * 900}
    turns = [words, {"role": "assistant", "content": "Yes"}, words]  # of two passes
    start = demo.rows()
    with _sent(demo, PATHS[0], {**CHAT, "messages": turns, "stream": True}) as connection:
        connection.recv(1000)
        while demo.rows() == start:
            time.sleep(0.005)
    demo.wait_until_idle()
    usage = demo.chat(messages=turns, max_tokens=1).json["usage"]
    # The first pass stays, the second was stopped.
    assert 1500 < usage["prompt_tokens_details"]["cached_tokens"] < 2000


def test_health_answers_while_the_model_is_at_work(demo) -> None:
    go_on = threading.Event()
    demo.before_token = lambda: go_on.wait(20)
    try:
        with _sent(demo, PATHS[0], CHAT):
            _until_busy(demo)
            health = demo.health()
            assert (health["status"], health["model"], health["busy"]) == ("ok", "demo", 1)
            assert health["context"] == 4096
            assert demo.request("/v1/models").status == 200
            assert demo.message(max_tokens="x").status == 400
    finally:
        go_on.set()


@pytest.mark.parametrize("path", PATHS)
def test_an_error_on_the_way_is_said_in_the_apis_shape(demo, path) -> None:
    def fail() -> None:
        raise flashmoe.ReadError("/secret/place/model.safetensors: short read")

    demo.before_token = fail
    whole = demo.request(path, CHAT)
    assert whole.status == 500
    assert "secret" not in whole.body.decode()
    streamed = demo.request(path, {**CHAT, "stream": True})
    assert streamed.status == 200
    last = streamed.chunks[-1]
    if path == PATHS[0]:
        assert last == whole.json
        assert last["error"]["type"] == "server_error"
        assert "[DONE]" not in streamed.body.decode()
    else:
        assert streamed.events[-1][0] == "error"
        assert last == whole.json
        assert last["error"]["type"] == "api_error"
    demo.before_token = lambda: None
    assert demo.request(path, CHAT).status == 200


def test_an_address_that_is_none_is_said_in_the_apis_shape(demo) -> None:
    reply = demo.request("/v1/responses", {})
    assert (reply.status, reply.json["error"]["code"]) == (404, "unknown_url")
    reply = demo.request("/v1/messages/batches", {})
    assert (reply.status, reply.json["error"]["type"]) == (404, "not_found_error")
    reply = demo.request("/v1/chat/completions")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert demo.request("/v1/models", headers={"anthropic-version": "2023-06-01"}).status == 200


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "valid JSON"),
        (b"{", "valid JSON"),
        (b"\xff\xfe", "valid JSON"),
        (b'{"temperature": NaN}', "valid JSON"),
        (b'{"model": "\\ud800"}', "valid JSON"),
        (b"[]", "must be an object"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_is_no_json_object_is_refused(demo, path, body, what) -> None:
    reply = demo.request(path, body)
    assert reply.status == 400
    assert what in reply.json["error"]["message"]


def test_what_the_template_will_not_render_is_refused_and_no_path_is_told(demo) -> None:
    use = {"type": "tool_use", "id": "a", "name": "f", "input": {"a": 10**40}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": "b"}
    turns = [
        *QUESTION,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    reply = demo.message(messages=turns)
    assert reply.status == 400
    assert reply.json["error"]["message"].startswith("chat_template.jinja: ")


def test_a_model_without_a_template_completes_texts_only(tmp_path) -> None:
    directory = shutil.copytree(DEMO, tmp_path / "bare")
    (directory / "chat_template.jinja").unlink()
    with flashmoe.Model(directory) as model, served(model) as server:
        for path in (*PATHS, "/v1/messages/count_tokens"):
            reply = server.request(path, CHAT)
            assert reply.status == 400
            assert reply.json["error"]["message"].startswith("the checkpoint has no chat template")
        body = {"prompt": "It was", "max_tokens": 3}
        assert server.request("/v1/completions", body).json["usage"]["completion_tokens"] == 3
        assert server.health()["model"] == server.request("/v1/models/bare").json["id"] == "bare"


def test_too_large_a_body_is_refused(demo, monkeypatch) -> None:
    monkeypatch.setattr("flashmoe.serve.app.MOST_BYTES", 1000)
    reply = demo.chat("x" * 2000)
    assert reply.status == 413
    assert demo.chat("x" * 20, max_tokens=1).status == 200


def test_too_many_at_once_are_asked_to_wait(demo, monkeypatch) -> None:
    monkeypatch.setattr("flashmoe.serve.app.MOST_AT_ONCE", 0)
    reply = demo.chat()
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert demo.message().json["error"]["type"] == "overloaded_error"


def test_what_is_null_or_unknown_is_ignored(demo) -> None:
    demo.says("Hi.")
    nothing = dict.fromkeys(
        ("temperature", "top_p", "n", "stop", "seed", "tools", "tool_choice", "logprobs", "user",
         "response_format", "stream", "stream_options", "max_completion_tokens", "logit_bias",
         "reasoning_effort", "chat_template_kwargs", "thinking", "system", "stop_sequences")
    )  # fmt: skip
    for path in PATHS:
        body = {**CHAT, **nothing, "no_such_field": {"a": 1}, "store": True, "metadata": {}}
        assert demo.request(path, body).status == 200


def test_content_in_parts_is_one_text(demo) -> None:
    demo.says("Hi.")
    parts = [{"type": "text", "text": "One "}, {"type": "text", "text": "two", "x": None}]
    demo.chat(
        messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    )
    assert "<|im_start|>system\nBe brief.<|im_end|>" in demo.prompts[-1]
    assert "<|im_start|>user\nOne two<|im_end|>" in demo.prompts[-1]


def test_both_apis_make_the_same_prompt(demo) -> None:
    demo.says("Hi.")
    parameters = {"type": "object", "properties": {"a": {"type": "string"}}}
    demo.chat(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Go"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"a": "b"}'},
                    }
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "done"},
        ],
        tools=[
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "description": "d",
                    "parameters": parameters,
                    "strict": True,
                },
            }
        ],
    )
    demo.message(
        system=[{"type": "text", "text": "Be brief."}],
        messages=[
            {"role": "user", "content": "Go"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": "b"}}],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "1", "content": "done"}],
            },
        ],
        tools=[
            {
                "name": "f",
                "description": "d",
                "input_schema": parameters,
                "cache_control": {"type": "ephemeral"},
            }
        ],
    )
    assert demo.prompts[-1] == demo.prompts[-2]


def test_eight_of_every_kind_at_once_get_what_each_gets_alone(demo) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    chat = {"messages": QUESTION, "max_tokens": 40, "temperature": 0.9}
    tools = [{"name": "f", "input_schema": schema}]
    format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    output = {"type": "json_schema", "schema": schema}
    asks = [
        (PATHS[0], {**chat, "seed": 1}),
        (PATHS[0], {**chat, "seed": 2, "n": 2}),
        (PATHS[0], {**chat, "seed": 3, "response_format": format}),
        (PATHS[0], {**chat, "seed": 4, "tools": [WEATHER], "tool_choice": "required"}),
        (PATHS[1], {**chat, "seed": 5, "tools": tools, "tool_choice": {"type": "any"}}),
        (PATHS[1], {**chat, "seed": 6, "thinking": {"type": "adaptive"}}),
        ("/v1/completions", {"prompt": "It was", "max_tokens": 40, "seed": 7}),
        (PATHS[1], {**chat, "seed": 8, "output_config": {"format": output}}),
    ]

    def content(ask):
        whole = json.loads(demo.request(*ask).body)
        if "choices" not in whole:
            return [block.get("text") or block.get("input") for block in whole["content"]]
        texts = []
        for choice in whole["choices"]:
            message = choice.get("message", {"content": choice.get("text")})
            calls = message.get("tool_calls", ())
            texts.append((message["content"], [call["function"] for call in calls]))
        return texts

    alone = [content(ask) for ask in asks]
    assert all(alone)
    demo.model.conversations.clear()
    with ThreadPoolExecutor(len(asks)) as threads:
        assert list(threads.map(content, asks)) == alone
