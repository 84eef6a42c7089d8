"""Requests in the words of OpenAI's API: chat completions, and completions of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashmoe.serve.ask import (
    MOST_CHOICES,
    Ask,
    call_turn,
    in_order,
    processors_of,
    sampling_of,
    tool_definition,
    variables_of,
)
from flashmoe.serve.fields import Fields, RequestError, TooLongError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_NO_THINKING = ("none", "minimal")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def chat_of(body: Fields, name: str, vocab_size: int) -> Ask:
    """What a chat completion asks for; RequestError for a field that is wrong.

    Args:
        name: the model's own, for a request that names none.
        vocab_size: ids that `logit_bias` may name are below it.
    """
    if not body.items("messages"):
        raise body.wrong("messages", "a list of at least one message")
    variables = variables_of(body)
    think = None
    if (effort := body.choice("reasoning_effort", EFFORTS)) is not None:
        think = effort not in _NO_THINKING
        variables = {"reasoning_effort": effort, **variables}
    if "enable_thinking" in variables:
        think = None  # the request says it in the template's own words
    options = {
        **_common(body),
        **_format(body),
        "tools": [_tool(tool) for tool in body.objects("tools")] or None,
        "tool_choice": _tool_choice(body),
        "parallel_tool_calls": body.flag("parallel_tool_calls") is not False,
        "think": think,
        "variables": variables,
        "continue_final": body.flag("continue_final_message") or False,
        "max_tokens": _max_tokens(body),
    }
    logprobs = body.flag("logprobs") or False
    top = body.whole("top_logprobs", 0, 20)
    if top and not logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", "top_logprobs")
    options["logprobs"] = top or 0
    return Ask(
        model=body.text("model") or name,
        options=options,
        messages=in_order(map(_turn, body.objects("messages"))),
        choices=body.whole("n", 1, MOST_CHOICES) or 1,
        stream=body.flag("stream") or False,
        usage=_usage(body),
        logprobs=logprobs,
        processors=processors_of(body, vocab_size),
        names={"schema": "response_format", "json_object": "response_format"},
    )


def completion_of(body: Fields, name: str, vocab_size: int) -> Ask:
    """What a completion asks for, its arguments being those of `chat_of`."""
    if body.text("suffix"):
        raise RequestError("suffix is not supported", "suffix")
    top = body.whole("logprobs", 0, 20)
    echo = body.flag("echo") or False
    if echo and top is not None:
        raise RequestError("echo and logprobs are not supported together", "echo")
    most = body.whole("max_tokens", 0)
    options = {**_common(body), "max_tokens": 16 if most is None else most, "logprobs": top or 0}
    return Ask(
        model=body.text("model") or name,
        options=options,
        prompts=_prompts(body),
        choices=body.whole("n", 1, MOST_CHOICES) or 1,
        stream=body.flag("stream") or False,
        usage=_usage(body),
        logprobs=top is not None,
        echo=echo,
        processors=processors_of(body, vocab_size),
    )


def error_body(error: RequestError) -> dict[str, Any]:
    """An error in the API's shape."""
    message, code, param = error.message, error.code, error.param
    if isinstance(error, TooLongError):
        message = (
            f"This model's maximum context length is {error.context} tokens. However, your "
            f"messages resulted in {error.tokens} tokens. Please reduce the length of the messages."
        )
        code, param = "context_length_exceeded", "messages"
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    if error.status == 429:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _common(body: Fields) -> dict[str, Any]:
    return {**sampling_of(body), "stop": body.texts("stop") or None}


def _usage(body: Fields) -> bool:
    options = body.object("stream_options")
    return options is not None and (options.flag("include_usage") or False)


def _max_tokens(body: Fields) -> int | None:
    most = body.whole("max_completion_tokens", 1)
    old = body.whole("max_tokens", 1)
    return old if most is None else most


def _format(body: Fields) -> dict[str, Any]:
    given = body.object("response_format")
    if given is None:
        return {}
    kind = given.choice("type", ("text", "json_object", "json_schema"))
    if kind is None:
        raise given.wrong("type", "text, json_object or json_schema")
    if kind == "json_object":
        return {"json_object": True}
    if kind == "json_schema":
        return {"schema": given.needed_object("json_schema").needed_object("schema").value}
    return {}


def _tool(given: Fields) -> dict[str, Any]:
    if given.text("type") not in (None, "function"):
        raise given.wrong("type", '"function"')
    return tool_definition(given.needed_object("function"), "parameters")


def _tool_choice(body: Fields) -> str | Mapping[str, Any]:
    choice = body.value.get("tool_choice")
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    given = Fields(choice, "tool_choice")
    if given.text("type") == "function":
        return {"name": given.needed_object("function").needed_text("name")}
    raise given.wrong("type", '"function"')


def _prompts(body: Fields) -> list[str | list[int]]:
    """A text, ids, or a list of either."""
    expected = "a text, ids, or a list of either, none of them empty"
    given = body.value.get("prompt")
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list) or not given:
        raise body.wrong("prompt", expected)
    if all(type(item) is int for item in given):
        given = [given]
    for prompt in given:
        ids = isinstance(prompt, list) and all(type(item) is int for item in prompt)
        if not prompt or not (isinstance(prompt, str) or ids):
            raise body.wrong("prompt", expected)
    if len(given) > MOST_CHOICES:
        raise body.wrong("prompt", f"at most {MOST_CHOICES} prompts")
    return given


def _turn(message: Fields) -> dict[str, Any]:
    role = message.choice("role", ROLES)
    if role is None:
        raise message.wrong("role", f"one of {', '.join(ROLES)}")
    turn: dict[str, Any] = {"role": "tool" if role == "function" else role}
    content = _content(message)
    if content is None and role != "assistant":
        raise message.wrong("content", "text, or a list of parts")
    turn["content"] = content or ""
    if role == "assistant":
        reasoning = message.text("reasoning_content") or message.text("reasoning")
        if reasoning:
            turn["reasoning_content"] = reasoning
        if calls := [_call(call) for call in message.objects("tool_calls")]:
            turn["tool_calls"] = calls
    elif role in ("tool", "function"):
        for key in ("tool_call_id", "name"):
            if (value := message.text(key)) is not None:
                turn[key] = value
    return turn


def _content(message: Fields) -> str | None:
    content = message.value.get("content")
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise message.wrong("content", "text, or a list of parts")
    texts = []
    for part in message.objects("content"):
        kind = part.text("type") or "text"
        if kind not in _TEXT_PARTS:
            raise RequestError(
                f"{part.where}: parts of type {kind[:80]!r} are not supported; this model reads "
                "text only",
                part.where,
            )
        texts.append(part.needed_text("refusal" if kind == "refusal" else "text"))
    return "".join(texts)


def _call(call: Fields) -> dict[str, Any]:
    if call.text("type") not in (None, "function"):
        raise call.wrong("type", '"function"')
    function = call.needed_object("function")
    arguments = function.value.get("arguments")
    if arguments is not None and not isinstance(arguments, (str, dict)):
        raise function.wrong("arguments", "JSON text")
    return call_turn(call.text("id"), function.needed_text("name"), arguments)
