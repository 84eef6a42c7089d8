"""Requests and replies in the words of Anthropic's API."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flashmoe.checkpoint.json import strict_json
from flashmoe.generate.answer import Answer, Delta
from flashmoe.serve.ask import Ask, call_turn, in_order, sampling_of, tool_definition
from flashmoe.serve.fields import Fields, RequestError, TooLongError
from flashmoe.serve.reply import Event, Reply

if TYPE_CHECKING:
    from flashmoe.generate.chat import Chat

ROLES = ("user", "assistant", "system")
EFFORTS = ("low", "medium", "high", "xhigh", "max")
_THINK = {"enabled": True, "adaptive": None, "between_tools": None, "disabled": False}
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def message_of(body: Fields, name: str, *, count: bool = False) -> Ask:
    """What a message asks for; RequestError for a field that is wrong.

    Args:
        name: the model's own, for a request that names none.
        count: whether only its tokens are to be counted.
    """
    most = body.whole("max_tokens", 0)
    if most is None and not count:
        raise body.wrong("max_tokens", "a whole number, 0 or more")
    if not body.items("messages"):
        raise body.wrong("messages", "a list of at least one message")
    turns = in_order(turn for message in body.objects("messages") for turn in _turns(message))
    if turns[-1].get("tool_calls"):
        raise RequestError(
            "messages: the last one has a tool_use block, and a tool_result must follow it",
            "messages",
        )
    system = _joined(body, "system")
    if system:
        turns.insert(0, {"role": "system", "content": system})
    output = body.object("output_config")
    effort = output.choice("effort", EFFORTS) if output is not None else None
    options = {
        **sampling_of(body),
        **_format(body, output),
        **_tool_choice(body),
        "stop": body.texts("stop_sequences") or None,
        "tools": [_tool(tool) for tool in body.objects("tools")] or None,
        "think": _think(body),
        "variables": {} if effort is None else {"reasoning_effort": effort},
        "continue_final": turns[-1]["role"] == "assistant",
        "max_tokens": most,
    }
    return Ask(
        model=body.text("model") or name,
        options=options,
        messages=turns,
        stream=body.flag("stream") or False,
        names={"schema": "output_config.format", "stop": "stop_sequences"},
    )


def error_body(error: RequestError) -> dict[str, Any]:
    """An error in the API's shape."""
    message = error.message
    if isinstance(error, TooLongError):
        message = f"prompt is too long: {error.tokens} tokens > {error.context} maximum"
    kind = _ERRORS.get(error.status, "api_error")
    if error.status < 500:
        kind = _ERRORS.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def _think(body: Fields) -> bool | None:
    thinking = body.object("thinking")
    if thinking is None:
        return False  # without it the API does not reason, and clients do not expect it to
    kind = thinking.choice("type", _THINK)
    if kind is None:
        raise thinking.wrong("type", f"one of {', '.join(_THINK)}")
    thinking.whole("budget_tokens", 0)
    return _THINK[kind]


def _format(body: Fields, output: Fields | None) -> dict[str, Any]:
    given = output.object("format") if output is not None else None
    given = given or body.object("output_format")
    if given is None:
        return {}
    if given.choice("type", ("json_schema",)) is None:
        raise given.wrong("type", '"json_schema"')
    return {"schema": given.needed_object("schema").value}


def _tool(given: Fields) -> dict[str, Any]:
    kind = given.text("type")
    if kind not in (None, "custom"):
        raise RequestError(
            f"{given.where}: tools of type {kind[:80]!r} are Anthropic's own and not supported; "
            "give its input_schema in a tool of your own",
            given.name("type"),
        )
    return tool_definition(given, "input_schema")


def _tool_choice(body: Fields) -> dict[str, Any]:
    choice = body.object("tool_choice")
    if choice is None:
        return {}
    kind = choice.choice("type", ("auto", "any", "tool", "none"))
    if kind is None:
        raise choice.wrong("type", "one of auto, any, tool, none")
    chosen = {"name": choice.needed_text("name")} if kind == "tool" else {"type": kind}
    return {
        "tool_choice": chosen,
        "parallel_tool_calls": not choice.flag("disable_parallel_tool_use"),
    }


def _joined(fields: Fields, key: str) -> str:
    """Content that must be text, or blocks of it."""
    content = fields.value.get(key)
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise fields.wrong(key, "text, or a list of blocks")
    return "\n".join(_text(block) for block in fields.objects(key))


def _text(block: Fields) -> str:
    kind = block.text("type")
    if kind != "text":
        raise _unsupported(block, kind)
    return block.needed_text("text")


def _unsupported(block: Fields, kind: str | None) -> RequestError:
    if kind is None:
        return block.wrong("type", "the type of a block, as text")
    return RequestError(
        f"{block.where}: blocks of type {kind[:80]!r} are not supported here; this model reads "
        "text only",
        block.where,
    )


def _turns(message: Fields) -> list[dict[str, Any]]:
    """The turns of a message: each result of a tool is one of its own."""
    role = message.choice("role", ROLES)
    if role is None:
        raise message.wrong("role", f"one of {', '.join(ROLES)}")
    content = message.value.get("content")
    if content is None:
        raise message.wrong("content", "text, or a list of blocks")
    if isinstance(content, str) or role == "system":
        return [{"role": role, "content": _joined(message, "content")}]
    if not isinstance(content, list):
        raise message.wrong("content", "text, or a list of blocks")
    return [_assistant(message)] if role == "assistant" else _user(message)


def _user(message: Fields) -> list[dict[str, Any]]:
    results, texts = [], []
    for block in message.objects("content"):
        if block.text("type") == "tool_result":
            results.append(
                {
                    "role": "tool",
                    "tool_call_id": block.needed_text("tool_use_id"),
                    "content": _joined(block, "content"),
                }
            )
        else:
            texts.append(_text(block))
    if texts or not results:
        results.append({"role": "user", "content": "\n".join(texts)})
    return results


def _assistant(message: Fields) -> dict[str, Any]:
    texts, reasoning, calls = [], [], []
    for block in message.objects("content"):
        kind = block.text("type")
        if kind == "thinking":
            reasoning.append(block.needed_text("thinking"))
        elif kind == "tool_use":
            name = block.needed_text("name")
            arguments = dict(block.needed_object("input").value)
            calls.append(call_turn(block.text("id"), name, arguments))
        elif kind != "redacted_thinking":
            texts.append(_text(block))
    turn: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if any(reasoning):
        turn["reasoning_content"] = "\n".join(reasoning)
    if calls:
        turn["tool_calls"] = calls
    return turn


class MessageReply(Reply):
    """A message."""

    prefix = "msg_"
    silence = b'event: ping\ndata: {"type":"ping"}\n\n'

    def begin(self, chats: Sequence[Chat]) -> Iterator[Event]:
        (chat,) = chats
        self.used.prompt, self.used.cached = len(chat.prompt_ids), chat.cached_tokens
        self._blocks: list[dict[str, Any]] = []
        self._pieces: list[str] = []
        self._kind: tuple[str, int] | None = None
        self._reason: str | None = None
        self._stop: str | None = None
        yield {"type": "message_start", "message": self.whole()}
        self.used.prompt = self.used.cached = 0  # the answer says what they came to

    def _piece(self, index: int, delta: Delta) -> Iterator[Event]:
        if not delta.text and delta.id is None:
            return
        kind = delta.kind, delta.index
        if kind != self._kind:
            yield from self._close()
            self._kind = kind
            yield self._block("start", content_block=self._open(delta))
        if delta.text:
            self._pieces.append(delta.text)
            names = {
                "text": ("text_delta", "text"),
                "reasoning": ("thinking_delta", "thinking"),
                "tool_call": ("input_json_delta", "partial_json"),
            }
            name, key = names[delta.kind]
            yield self._block("delta", delta={"type": name, key: delta.text})

    def _ended(self, index: int, answer: Answer) -> Iterator[Event]:
        yield from self._close()
        self._stop = answer.stop if answer.finish_reason == "stop" else None
        reason = "end_turn" if self._stop is None else "stop_sequence"
        self._reason = _STOP_REASONS.get(answer.finish_reason, reason)

    def finish(self) -> Iterator[Event]:
        yield {
            "type": "message_delta",
            "delta": {"stop_reason": self._reason, "stop_sequence": self._stop},
            "usage": self._usage(),
        }
        yield {"type": "message_stop"}

    def whole(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.ask.model,
            "content": list(self._blocks),
            "stop_reason": self._reason,
            "stop_sequence": self._stop,
            "usage": self._usage(),
        }

    def failed(self, error: RequestError) -> Event:
        return error_body(error)

    def encoded(self, event: Event) -> bytes:
        return b"event: %b\n" % str(event["type"]).encode() + super().encoded(event)

    def _open(self, delta: Delta) -> dict[str, Any]:
        """The block that a piece begins, as it is before the piece."""
        block: dict[str, Any]
        if delta.kind == "tool_call":
            id = f"toolu_{(delta.id or '').removeprefix('call_')}"
            block = {"type": "tool_use", "id": id, "name": delta.name, "input": {}}
        elif delta.kind == "reasoning":
            block = {"type": "thinking", "thinking": "", "signature": ""}
        else:
            block = {"type": "text", "text": ""}
        self._blocks.append(block)
        self._pieces = []
        return dict(block)

    def _close(self) -> Iterator[Event]:
        """Ends the block that is open, if one is."""
        if self._kind is None:
            return
        block, text = self._blocks[-1], "".join(self._pieces)
        if block["type"] == "tool_use":
            block["input"] = _object(text)
        elif block["type"] == "text":
            block["text"] = text
        else:
            block["thinking"] = text
            # Clients send it back as they got it. It proves nothing here.
            block["signature"] = hashlib.sha256(text.encode()).hexdigest()
            signature = {"type": "signature_delta", "signature": block["signature"]}
            yield self._block("delta", delta=signature)
        self._kind = None
        yield self._block("stop")

    def _block(self, what: str, **more: Any) -> Event:
        return {"type": f"content_block_{what}", "index": len(self._blocks) - 1, **more}

    def _usage(self) -> dict[str, Any]:
        used = self.used
        return {
            "input_tokens": used.prompt - used.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": used.cached,
            "output_tokens": used.generated,
            "output_tokens_details": {"thinking_tokens": used.reasoning},
        }


def _object(text: str) -> dict[str, Any]:
    """Arguments of a call; {} of one that was cut short."""
    try:
        value = strict_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
