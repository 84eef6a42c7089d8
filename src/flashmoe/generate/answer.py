"""What an answer is, as values: tokens, the pieces that stream, and the whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from flashmoe.checkpoint.json import strict_json

Kind = Literal["text", "reasoning", "tool_call"]


@dataclass(frozen=True)
class Token:
    """One step of a generation.

    Attributes:
        id: in the model's vocabulary.
        text: what became final with it. Often "", where a character or what may be a stop string is
            not complete yet, and for special tokens; all texts together are the answer.
        logprob: natural logarithm of its probability under the model, before penalties,
            temperature and filters.
        alternatives: the most probable ids with their logprobs, as many as were asked for.
    """

    id: int
    text: str
    logprob: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model wants called.

    Attributes:
        id: by which the tool's result refers to it.
        name: of the tool; a model may name one that was not offered.
        arguments: by parameter, typed by the tool's schema. They are not validated against it.
        raw: the arguments' JSON text.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    raw: str


@dataclass(frozen=True)
class Delta:
    """One streamed piece of an answer.

    Attributes:
        kind: what it is a piece of.
        text: the piece; of a tool call, of its arguments' JSON text.
        index: which tool call of the answer, counted from 0.
        id, name: of a tool call, on its first delta and on no other.
        token: that it came with, where the piece is of one token.
    """

    kind: Kind
    text: str
    index: int = 0
    id: str | None = None
    name: str | None = None
    token: Token | None = None


@dataclass(frozen=True)
class Answer:
    """A complete answer.

    Attributes:
        text: what is meant for the reader.
        reasoning: what the model thought before.
        tool_calls: complete ones, in order.
        invalid_tool_calls: calls whose arguments are not a JSON object, as of an answer that was
            cut short within one: `arguments` is empty, `raw` is what there is. Do not run them.
        hurried: whether it follows a structure that was brought to its end because few tokens were
            left: strings and lists may be shorter than the model would have made them.
        finish_reason: "stop", "length" (max_tokens or the context), "tool_calls" or "cancelled".
        stop: the stop string that ended it, if one did.
        prompt_tokens: of the rendered conversation.
        cached_tokens: of these, those that were not computed again.
        generated_tokens: of the answer, its end-of-sequence token too.
    """

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    hurried: bool = False
    stop: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0

    @property
    def message(self) -> dict[str, Any]:
        """The answer as a turn, to go on with the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message

    @classmethod
    def of(
        cls,
        deltas: Iterable[Delta],
        finish_reason: str = "stop",
        *,
        hurried: bool = False,
        stop: str | None = None,
        **counts: int,
    ) -> Answer:
        """All deltas of an answer, in their order, added up.

        Args:
            finish_reason: "stop" becomes "tool_calls" where there is a complete call.
            counts: prompt_tokens, cached_tokens and generated_tokens.
        """
        texts: dict[Kind, list[str]] = {"text": [], "reasoning": []}
        heads: dict[int, tuple[str, str]] = {}
        raws: dict[int, list[str]] = {}
        for delta in deltas:
            if delta.kind != "tool_call":
                texts[delta.kind].append(delta.text)
                continue
            if delta.id is not None and delta.name is not None:
                heads[delta.index] = delta.id, delta.name
            raws.setdefault(delta.index, []).append(delta.text)
        calls, invalid = [], []
        for index, (id, name) in sorted(heads.items()):
            raw = "".join(raws[index])
            try:
                arguments = strict_json(raw)
            except ValueError:
                arguments = None
            if isinstance(arguments, dict):
                calls.append(ToolCall(id, name, arguments, raw))
            else:
                invalid.append(ToolCall(id, name, {}, raw))
        if calls and finish_reason == "stop":
            finish_reason = "tool_calls"
        return cls(
            "".join(texts["text"]),
            "".join(texts["reasoning"]),
            tuple(calls),
            tuple(invalid),
            finish_reason,
            hurried,
            stop,
            **counts,
        )
