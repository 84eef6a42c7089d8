"""A conversation as programs send it, made into what chat templates take."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flashmoe.checkpoint.json import strict_json
from flashmoe.checkpoint.template import ChatTemplate, Message, refuse_media, turns_of
from flashmoe.errors import ArgumentError


def prepare(messages: Iterable[Message], template: ChatTemplate) -> list[dict[str, Any]]:
    """The turns, as the template wants them.

    - "developer" is "system"; system turns at the beginning become one. A later one stays where it
      is if the template writes it there, else it becomes a turn of the user's.
    - Content in parts becomes one text; "reasoning" is another name of "reasoning_content".
    - Arguments of tool calls that are JSON text become objects. Text that is no object, as of a
      call that was cut short, becomes {"arguments": text}.

    Raises:
        ArgumentError: a turn is not one, or holds what is not text; the message says which.
    """
    messages = turns_of(messages)
    turns: list[dict[str, Any]] = []
    late = []
    for number, message in enumerate(messages):
        turn = _turn(message, f"messages[{number}]")
        if turn.get("role") == "system" and turns:
            if len(turns) == 1 and turns[0].get("role") == "system":
                texts = [turns[0].get("content"), turn.get("content")]
                turns[0] = turns[0] | {"content": "\n\n".join(text for text in texts if text)}
                continue
            late.append(turn)
        turns.append(turn)
    if late and not _takes_late_system(template):
        for turn in late:
            turn["role"] = "user"
    return turns


def _turn(message: Message, where: str) -> dict[str, Any]:
    refuse_media(message, where)
    turn = {key: value for key, value in message.items() if value is not None}
    if turn.get("role") == "developer":
        turn["role"] = "system"
    if "content" in turn:
        turn["content"] = _text(turn["content"], where)
    if "reasoning" in turn:
        turn.setdefault("reasoning_content", turn["reasoning"])
        del turn["reasoning"]
    if "tool_calls" in turn:
        calls = turn["tool_calls"]
        if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
            raise ArgumentError(f"{where}.tool_calls must be a list of objects; got {calls!r}")
        turn["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    return turn


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Iterator):
        content = list(content)
    if not isinstance(content, Sequence):
        raise ArgumentError(f"{where}.content must be text or a list of parts; got {content!r}")
    texts = []
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ArgumentError(
                f"{where}.content[{number}]: {kind!r} is not supported, only parts of text"
            )
        texts.append(text)
    return "".join(texts)


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ArgumentError(f"{where} must have a function with a name; got {call!r}")
    given = function.get("arguments")
    arguments: Any = {} if given is None or given == "" else given
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError):
            arguments = strict_json(arguments)
    if not isinstance(arguments, Mapping):
        arguments = {"arguments": given}
    return {**call, "type": "function", "function": {**function, "arguments": dict(arguments)}}


def _takes_late_system(template: ChatTemplate) -> bool:
    """Whether a template writes a system turn that is not the first; some raise, some skip it."""
    user = {"role": "user", "content": "a"}
    try:
        text = template.render([user, {"role": "system", "content": "late-system-turn"}, user])
    except ArgumentError:
        return False
    return "late-system-turn" in text
