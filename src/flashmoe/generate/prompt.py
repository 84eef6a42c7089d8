"""A conversation as the ids that a model reads, with what it answered before as it was written.

Clients send the whole conversation at every turn, without what they do not show: reasoning, and the
ids that the model drew. Both are remembered here, so that what the model reads at the next turn is
what it wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.template import ChatTemplate, Message
from flashmoe.errors import ArgumentError
from flashmoe.generate.answer import Answer
from flashmoe.generate.dialect import END_THINK, Dialect
from flashmoe.generate.messages import prepare
from flashmoe.generate.tools import ToolSpec
from flashmoe.machine.lock import Lock

_REMEMBERED_BYTES = 64 << 20
_NEAR = 8  # tokens: a mark so near behind another is not worth a pass of its own
_NOISE = re.compile(r"(?:\s*x-anthropic-billing-header:[^\n]*(?:\n|$))+")
"""What Claude Code writes in front of the system prompt, another text at every request."""

_Value = TypeVar("_Value", str, bytes)


@dataclass(frozen=True)
class Prompt:
    """What a model is to answer.

    Attributes:
        text: as the template renders it.
        ids: that the model reads.
        marks: positions within them at which a later prompt may part from this one.
        places: those of the marks that the conversation will come back to most likely.
        in_reasoning: whether the answer begins within reasoning.
        turns: of the conversation; none where the prompt is a text to be continued.
    """

    text: str
    ids: list[int]
    marks: tuple[int, ...] = ()
    places: frozenset[int] = frozenset()
    in_reasoning: bool = False
    turns: Sequence[dict[str, Any]] = ()
    tools: Sequence[ToolSpec] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    continues: bool = False


class Prompts:
    """Renders the conversations of a checkpoint, and remembers answers."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._reasoning: _Recent[str] = _Recent(_REMEMBERED_BYTES)
        """By the conversation up to and with an answer, as clients see it: its reasoning."""
        self._ids: _Recent[bytes] = _Recent(_REMEMBERED_BYTES)
        """By the text of a conversation up to and with an answer: the ids of that last turn."""

    def template(self, tools: Sequence[Any] | None) -> ChatTemplate:
        """The checkpoint's template; ArgumentError where it has none."""
        template = self._checkpoint.tools_template if tools else self._checkpoint.template
        if template is None:
            raise ArgumentError(
                f"{self._checkpoint.directory}: the checkpoint has no chat template "
                "(chat_template.jinja); use generate() with a plain prompt"
            )
        return template

    def make(
        self,
        messages: Iterable[Message],
        tools: Sequence[ToolSpec] = (),
        variables: Mapping[str, Any] | None = None,
        *,
        continues: bool = False,
        begun: Sequence[int] = (),
    ) -> Prompt:
        """The prompt for an answer to a conversation.

        Args:
            begun: ids that a state holds; they are those of their text, where the prompt begins
                with it.
            variables: of the template. Where it has `preserve_thinking` that is on unless given, so
                that earlier turns stay as they were computed.
            continues: whether the answer goes on with the last message, one of the assistant's.
        Raises:
            ArgumentError: messages are not turns, or the template refuses them.
        """
        template = self.template(tools)
        given = dict(variables or {})
        if template.reads("preserve_thinking"):
            given.setdefault("preserve_thinking", True)
        turns = self._recall(_without_noise(prepare(messages, template)))
        text = _render(template, turns, tools, given, add_generation_prompt=not continues)
        if continues:
            text = _cut_open(text, turns)
        ids = self._encode(text, begun)
        marks, places = self._marks(template, ids, turns, tools, given)
        in_reasoning = Dialect.of(template).in_reasoning(text)
        return Prompt(text, ids, marks, places, in_reasoning, turns, tools, given, continues)

    def remember(self, prompt: Prompt, ids: Sequence[int], answer: Answer) -> None:
        """Keeps what the model answered for the turns that follow.

        Args:
            ids: of the answer, without an end-of-sequence token.
        """
        turn = answer.message
        turns = list(prompt.turns)
        if prompt.continues:
            begun = turns.pop()
            turn = {**begun, **turn, "content": begun.get("content", "").rstrip() + answer.text}
        turns.append(turn)
        if answer.reasoning.strip():
            *_, seen = _as_seen(turns)
            self._reasoning[seen] = answer.reasoning
        self._remember_ids(prompt, ids, turns)

    def _remember_ids(
        self, prompt: Prompt, ids: Sequence[int], turns: Sequence[dict[str, Any]]
    ) -> None:
        """Keeps the ids of the last turn, if the template writes it as the model did."""
        template = self.template(prompt.tools)
        opener = self._opener(template)
        if opener is None:
            return
        try:
            text = _render(
                template, turns, prompt.tools, prompt.variables, add_generation_prompt=False
            )
        except ArgumentError:
            return
        end = self._end_of_turn(text, opener)
        text = text[:end] + re.split(re.escape(opener[1]), text[end:])[0]  # no generation prompt
        start = text.rfind(opener[1])
        first = max((i for i, token in enumerate(prompt.ids) if token == opener[0]), default=None)
        if first is None or not 0 <= start <= end:
            return
        own = [*prompt.ids[first:], *ids]
        written = self._checkpoint.tokenizer.decode(own)
        if _normal(written) != _normal(text[start:end]):
            return
        own += self._checkpoint.encode(text[end:], special=False)
        self._ids[_digest(text)] = np.array(own, np.int32).tobytes()

    def _end_of_turn(self, text: str, opener: tuple[int, str]) -> int:
        """Where the special token that ends the last turn stands; -1 if there is none."""
        tokenizer = self._checkpoint.tokenizer
        ends = (tokenizer.token(token) for token in tokenizer.special if token != opener[0])
        return max((text.rfind(end) for end in ends), default=-1)

    def _recall(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The turns with the reasoning that clients left out."""
        result = []
        for turn, seen in zip(turns, _as_seen(turns), strict=True):
            known = None
            if turn.get("role") == "assistant" and not turn.get("reasoning_content"):
                known = self._reasoning.get(seen)
            if known is not None and END_THINK not in turn.get("content", ""):
                turn = {**turn, "reasoning_content": known}  # noqa: PLW2901
            result.append(turn)
        return result

    def _encode(self, text: str, begun: Sequence[int]) -> list[int]:
        """Its ids: of turns that are remembered, or begun, those that were drawn."""
        if begun:
            tokenizer = self._checkpoint.tokenizer
            held = tokenizer.decode(begun)
            rest = text[len(held) :]
            next_one = self._checkpoint.encode(rest, special=False)
            # Nothing is merged across a special token.
            parted = {begun[-1], *next_one[:1]} & tokenizer.special
            if text.startswith(held) and parted:
                return [*begun, *next_one]
        opener = next((o for o in self._openers.values() if o is not None), None)
        if opener is None or not len(self._ids):
            return self._checkpoint.encode(text, special=False)
        ids: list[int] = []
        pending = ""
        digest = hashlib.sha256()
        # A special token is never merged with what is beside it, so that turns are encoded alone.
        for part in re.split(f"(?={re.escape(opener[1])})", text):
            digest.update(part.encode(errors="surrogatepass"))
            known = self._ids.get(digest.digest())
            if known is None:
                pending += part
                continue
            if pending:
                ids += self._checkpoint.encode(pending, special=False)
            ids += np.frombuffer(known, np.int32).tolist()
            pending = ""
        if pending:
            ids += self._checkpoint.encode(pending, special=False)
        return ids

    def _marks(
        self,
        template: ChatTemplate,
        ids: list[int],
        turns: Sequence[dict[str, Any]],
        tools: Sequence[ToolSpec],
        variables: Mapping[str, Any],
    ) -> tuple[tuple[int, ...], frozenset[int]]:
        """Positions to take snapshots at, and those among them to hold on to."""
        opener = self._opener(template)
        if opener is None:
            return (), frozenset()
        begins = [i for i, token in enumerate(ids) if token == opener[0]]
        places = set()
        if len(begins) > 1 and (tools or (turns and turns[0].get("role") == "system")):
            places.add(begins[1])  # behind the system prompt and the tools
        # Templates drop reasoning behind the last query once there is another one.
        query = max((i for i, turn in enumerate(turns) if _is_query(turn)), default=None)
        if query is not None and begins:
            until = len(begins) - 1
            if query + 1 < len(turns):
                with contextlib.suppress(ArgumentError):
                    text = _render(
                        template, turns[: query + 1], tools, variables, add_generation_prompt=False
                    )
                    ended = text[: self._end_of_turn(text, opener)]
                    until = min(until, ended.count(opener[1]))
            places.add(begins[until])
        marks = {*places, *begins[-1:]}
        for begin in begins[-2:-1]:  # before the last message
            if all(abs(begin - mark) > _NEAR for mark in marks):
                marks.add(begin)
        marks.discard(0)
        return tuple(sorted(marks)), frozenset(places)

    def _opener(self, template: ChatTemplate) -> tuple[int, str] | None:
        """The special token that turns begin with, and its text; None where they do not."""
        if template.text not in self._openers:
            self._openers[template.text] = self._find_opener(template)
        return self._openers[template.text]

    @cached_property
    def _openers(self) -> dict[str, tuple[int, str] | None]:
        return {}

    def _find_opener(self, template: ChatTemplate) -> tuple[int, str] | None:
        content = "where a turn begins"
        try:
            turn = [{"role": "user", "content": content}]
            text = _render(template, turn, (), {}, add_generation_prompt=False)
        except ArgumentError:
            return None
        tokenizer = self._checkpoint.tokenizer
        before = self._checkpoint.encode(text.partition(content)[0], special=False)
        special = [token for token in before if token in tokenizer.special]
        return (special[-1], tokenizer.token(special[-1])) if special else None


class _Recent(Generic[_Value]):
    """The most recently used values, within a limit of bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._bytes = 0
        self._values: OrderedDict[bytes, _Value] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: bytes) -> _Value | None:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def __setitem__(self, key: bytes, value: _Value) -> None:
        with self._lock:
            self._bytes += len(value) - len(self._values.pop(key, ""))
            self._values[key] = value
            while self._bytes > self._limit:
                self._bytes -= len(self._values.popitem(last=False)[1])


def _render(
    template: ChatTemplate,
    turns: Sequence[Message],
    tools: Sequence[ToolSpec],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
) -> str:
    definitions = [tool.definition for tool in tools] or None
    return template.render(
        turns, tools=definitions, **{**variables, "add_generation_prompt": add_generation_prompt}
    )


def _without_noise(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns, less what a client writes in front that differs with every request."""
    if not turns or turns[0].get("role") != "system":
        return turns
    content = turns[0].get("content", "")
    rest = content[match.end() :] if (match := _NOISE.match(content)) else content
    first = [{**turns[0], "content": rest}] if rest or not match else []
    return [*first, *turns[1:]]


def _cut_open(text: str, turns: Sequence[dict[str, Any]]) -> str:
    """A rendered conversation up to the end of the last message's content."""
    content = turns[-1].get("content", "").rstrip() if turns else ""
    at = text.rfind(content)
    if not content or turns[-1].get("role") != "assistant" or at < 0:
        raise ArgumentError(
            "to continue a message the last one must be the assistant's, with content, and the "
            "template must write it as it is"
        )
    return text[: at + len(content)]


def _is_query(turn: Mapping[str, Any]) -> bool:
    """Whether the user asks something, and does not hand in results of tools."""
    content = str(turn.get("content", "")).strip()
    wrapped = content.startswith("<tool_response>") and content.endswith("</tool_response>")
    return turn.get("role") == "user" and not wrapped


def _as_seen(turns: Iterable[Mapping[str, Any]]) -> Iterable[bytes]:
    """For each turn what tells the conversation up to it from others, as every client sees it."""
    digest = b""
    for turn in turns:
        content = str(turn.get("content", ""))
        if turn.get("role") == "assistant":
            content = content.rpartition(END_THINK)[2]
        calls = [
            (call["function"]["name"], call["function"]["arguments"])
            for call in turn.get("tool_calls", ())
        ]
        seen = json.dumps([turn.get("role"), content.strip(), calls], sort_keys=True, default=str)
        digest = hashlib.sha256(digest + seen.encode()).digest()
        yield digest


def _normal(text: str) -> tuple[str, int]:
    """A turn without the spaces that templates trim, and its calls, whose values they may write in
    another way, only counted."""
    said, *calls = re.split(r"<tool_call>|(?<!<tool_call>\n)<function=", text)
    return re.sub(r"\s*(</?think>|$)\s*", r"\1", said), len(calls)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()
