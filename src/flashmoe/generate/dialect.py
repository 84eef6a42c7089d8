"""How a checkpoint writes reasoning and tool calls, as its chat template shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flashmoe.checkpoint.template import ChatTemplate

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
GAP = "\n\n"
"""What the family writes between the end of its reasoning and its answer."""


@dataclass(frozen=True)
class Dialect:
    """The markup of a checkpoint.

    Attributes:
        calls: "xml", <function=NAME> with a <parameter=NAME> each (Qwen3.5, Qwen3-Coder); "hermes",
            a JSON object (Qwen3, Qwen3-Next); None where the template knows no tools. Both stand
            inside <tool_call>.
        thinks: whether reasoning may stand in <think> before the answer.
    """

    calls: Literal["xml", "hermes"] | None = None
    thinks: bool = False

    @classmethod
    def of(cls, template: ChatTemplate | None) -> Dialect:
        """What a template shows; without one, none of it."""
        text = template.text if template is not None else ""
        thinks = END_THINK in text
        if CALL not in text:
            return cls(None, thinks)
        return cls("xml" if "<function=" in text else "hermes", thinks)

    def in_reasoning(self, prompt: str) -> bool:
        """Whether a rendered prompt ends inside of the reasoning that the answer goes on with."""
        turn = prompt.rpartition("<|im_start|>")[2]
        return self.thinks and turn.rfind(THINK) > turn.rfind(END_THINK)


class Line:
    """Where in a Markdown text the next character stands: markup quoted as code is no call."""

    def __init__(self) -> None:
        self._start = ""
        self._ticks = 0
        self._fenced = False

    @property
    def blank(self) -> bool:
        """Whether only spaces stand before it on its line."""
        return not self._start

    @property
    def code(self) -> bool:
        """Whether it is inside of a code block or a code span."""
        return self._fenced or self._ticks % 2 == 1 or self._start.startswith("~~~")

    def feed(self, text: str) -> None:
        """Goes past a piece of the text."""
        first, *others = text.split("\n")
        self._extend(first)
        for part in others:
            if self._start.startswith(("```", "~~~")):
                self._fenced, self._ticks = not self._fenced, 0
            elif not self._start:  # a code span ends with its paragraph
                self._ticks = 0
            self._start = ""
            self._extend(part)

    def _extend(self, part: str) -> None:
        if len(self._start) < 3:
            self._start = (self._start + part).lstrip()[:3]
        self._ticks += part.count("`")
