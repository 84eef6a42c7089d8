"""The text of an answer, parted as it comes: text, reasoning, tool calls.

Markup is layout, and what stands inside is payload: a value begins and ends at exactly one newline,
spaces next to a call and newlines next to reasoning are left out, and nothing else is.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from flashmoe.checkpoint.json import strict_json
from flashmoe.generate.answer import Delta, Kind
from flashmoe.generate.arguments import kinds, property_of, typed
from flashmoe.generate.dialect import CALL, END_CALL, END_THINK, THINK, Dialect, Line
from flashmoe.generate.text import overlap
from flashmoe.generate.tools import ToolSpec


def _begins(*parts: str) -> str:
    """A regular expression of every beginning, but the empty one, of what the parts match in a row.

    A part is a literal, or "~" and an expression of which any beginning matches too.
    """
    units: list[str] = []
    for part in parts:
        units += [part[1:]] if part.startswith("~") else map(re.escape, part)
    pattern = ""
    for unit in reversed(units):
        pattern = f"{unit}(?:{pattern})?" if pattern else unit
    return pattern


_NAME = r"[^<>\n]{1,256}"
_SPACE = r"\s{0,16}"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"
_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_TAG = f"(?:{_PARAMETER}{_NAME}>|{_END_FUNCTION})"
_PART_OF_TAG = f"(?:{_begins(_PARAMETER, '~' + _NAME)}|{_begins(_END_FUNCTION)})"
_NAMED = (_FUNCTION, "~" + _NAME, ">", "~" + _SPACE, "~" + _PART_OF_TAG)
_OPEN = re.compile(f"(?:{CALL}{_SPACE})?{_FUNCTION}({_NAME})>{_SPACE}(?={_TAG})")
_MAY_OPEN = re.compile(f"{_begins(CALL, '~' + _SPACE, *_NAMED)}|{_begins(*_NAMED)}")
_KEY = re.compile(f"{_PARAMETER}({_NAME})>\n?")
_CLOSE = re.compile(f"\n{_END_PARAMETER}\n(?={_TAG})")
# What ends a value where the answer ends: the newlines may be missing there.
_LAST = re.compile(rf"\n?{_END_PARAMETER}(?:\s*({_END_FUNCTION})(?:\s*{END_CALL})?)?\s*\Z")
_LAST_PARTS = (_END_PARAMETER, r"~\s*", _END_FUNCTION, r"~\s*", END_CALL, r"~\s*")
_STRICT_PARTS = ("\n", _END_PARAMETER, "\n", "~" + _PART_OF_TAG)
_MAY_CLOSE = re.compile(rf"(?:{_begins(*_STRICT_PARTS)}|\n?{_begins(*_LAST_PARTS)})\Z")
_AFTER_CALL = re.compile(rf"\s*{END_CALL}")
_MAY_END_CALL = re.compile(rf"\s*(?:{_begins(END_CALL)})?\Z")
_HERMES = re.compile(
    rf'{CALL}\s*{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?={{)'
)
_HERMES_WHOLE = re.compile(rf"{CALL}\s*({{.*?}})\s*{END_CALL}", re.DOTALL)
_MAY_BE_HERMES = re.compile(rf"{_begins(CALL)}|{CALL}\s*(?:{{.*)?", re.DOTALL)


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class AnswerParser:
    """Parts an answer.

    The deltas' texts hold every character but the layout, whatever the answer and however it is
    cut into pieces. Markup that is not a complete opening of a call stays text, as does markup
    inside of reasoning or quoted as Markdown code.

    Args:
        dialect: of the checkpoint.
        tools: that were offered. Without any there are no calls.
        in_reasoning: whether the prompt ends inside of reasoning.
    """

    def __init__(
        self, dialect: Dialect, tools: Iterable[ToolSpec] = (), *, in_reasoning: bool = False
    ) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._calls = dialect.calls if self._tools else None
        self._buffer = ""
        self._deltas: list[Delta] = []
        self._line = Line()
        self._space = ""  # at the end of the text so far: layout if a call follows
        self._began = False  # whether there is text
        self._edge = in_reasoning  # whether the last thing was markup
        self._index = -1
        # A step takes what it can from the buffer, and says whether another is to be tried.
        self._step: Callable[[bool], bool] = self._text
        if in_reasoning:
            self._step = self._reasoning
        elif dialect.thinks:
            self._step = self._start

    def push(self, text: str) -> list[Delta]:
        """What became certain with more of the answer."""
        self._buffer += text
        return self._run(final=False)

    def finish(self) -> list[Delta]:
        """The rest, when nothing follows."""
        return self._run(final=True)

    def _run(self, final: bool) -> list[Delta]:
        while self._step(final):
            pass
        deltas, self._deltas = self._deltas, []
        return deltas

    def _give(self, kind: Kind, text: str) -> None:
        if text:
            self._deltas.append(
                Delta(kind, text, max(self._index, 0) if kind == "tool_call" else 0)
            )

    def _take(self, count: int) -> str:
        text, self._buffer = self._buffer[:count], self._buffer[count:]
        return text

    # Reasoning

    def _start(self, final: bool) -> bool:
        """A model may open its reasoning itself."""
        text = self._buffer.lstrip()
        if THINK.startswith(text) and text != THINK and not final:
            return False
        self._step = self._text
        if text.startswith(THINK):
            self._buffer = text[len(THINK) :]
            self._step, self._edge = self._reasoning, True
        return True

    def _reasoning(self, final: bool) -> bool:
        at = self._buffer.find(END_THINK)
        keep = 0 if final else overlap(self._buffer, END_THINK)
        text = self._take(at if at >= 0 else len(self._buffer) - keep)
        text, self._space = self._space + text, ""
        if self._edge:
            text = text.lstrip("\n")
            self._edge = not text
        if at >= 0 or not final:
            body = text.rstrip("\n")
            text, self._space = body, text[len(body) :]
        self._give("reasoning", text)
        if at < 0:
            return False
        self._take(len(END_THINK))
        self._step, self._edge, self._space = self._text, True, ""
        return True

    # Text

    def _text(self, final: bool) -> bool:
        if self._calls is None:
            self._say(self._take(len(self._buffer)), final)
            return False
        marks = [CALL, _FUNCTION] if self._calls == "xml" else [CALL]
        found = [at for mark in marks if (at := self._buffer.find(mark)) >= 0]
        if not found:
            keep = 0 if final else max(overlap(self._buffer, mark) for mark in marks)
            self._say(self._take(len(self._buffer) - keep), final)
            return False
        self._say(self._take(min(found)), False)
        opened = self._open(final)
        if opened is None:  # no call: the mark is text
            self._say(self._take(len(CALL if self._buffer.startswith(CALL) else marks[-1])), False)
        return opened is not False

    def _say(self, text: str, final: bool) -> None:
        self._line.feed(text)
        text, self._space = self._space + text, ""
        if self._edge:
            body = text.lstrip() if self._index >= 0 else text.lstrip("\n")
            if not body:
                self._space = "" if final else text
                return
            # Between a call and more text spaces part the one text from the other.
            text = text if self._began else body
            self._edge = False
        if self._calls is not None and not final:
            body = text.rstrip()
            text, self._space = body, text[len(body) :]
        self._began = self._began or bool(text)
        self._give("text", text)

    def _open(self, final: bool) -> bool | None:
        """Whether a call opens here: True, False if more of it must be seen, None if none does."""
        if self._line.code:
            return None
        return self._open_xml(final) if self._calls == "xml" else self._open_hermes(final)

    def _call(self, name: str) -> None:
        self._index += 1
        self._deltas.append(Delta("tool_call", "", self._index, _new_id(), name))
        self._tool = self._tools.get(name)
        self._space, self._edge = "", True

    def _after_call(self, final: bool) -> bool:
        if match := _AFTER_CALL.match(self._buffer):
            self._take(match.end())
        elif not final and _MAY_END_CALL.match(self._buffer):
            return False
        self._line = Line()
        self._step = self._text
        return True

    # <function=NAME> <parameter=NAME> VALUE </parameter> … </function>

    def _open_xml(self, final: bool) -> bool | None:
        if match := _OPEN.match(self._buffer):
            name = match[1]
            wrapped = self._buffer.startswith(CALL)
            # In the middle of a line, or unwrapped, only what can be nothing else is a call.
            sure = self._buffer.startswith(CALL + "\n") and name in self._tools
            if not (sure or (self._line.blank and (wrapped or name in self._tools))):
                return None
            self._take(match.end())
            self._call(name)
            self._first = True
            self._step = self._tag
            return True
        return None if final or not _MAY_OPEN.fullmatch(self._buffer) else False

    def _tag(self, final: bool) -> bool:
        """At a tag that was seen to be whole."""
        if self._buffer.startswith(_END_FUNCTION):
            self._take(len(_END_FUNCTION))
            self._give("tool_call", "{}" if self._first else "}")
            self._step = self._after_call
            return True
        match = _KEY.match(self._buffer)
        assert match is not None
        if not final and match.end() == len(self._buffer) and match[0][-1] != "\n":
            return False  # a newline may follow
        self._take(match.end())
        key = json.dumps(match[1], ensure_ascii=False)
        self._give("tool_call", f"{'{' if self._first else ', '}{key}: ")
        self._first = False
        root = self._tool.parameters if self._tool else {}
        self._schema = property_of(root, match[1])
        # Other values are known only when they are whole.
        self._streams = kinds(self._schema, root) == {"string"}
        self._value_begins = True
        if self._streams:
            self._give("tool_call", '"')
        self._step = self._value
        return True

    def _value(self, final: bool) -> bool:
        # The newline after <parameter=NAME> is also the one before </parameter> of a value that
        # is nothing at all.
        before = "\n" if self._value_begins else ""
        text = before + self._buffer
        match = _CLOSE.search(text)
        last = _LAST.search(text) if final and not match else None
        ends = match or last
        if ends is not None:
            value = text[len(before) : ends.start()]
            self._take(max(ends.end() - len(before), 0))
            self._end_value(value)
            self._step = self._tag if match else self._text
            if last is not None and last[1]:
                self._give("tool_call", "}")
            return match is not None
        if not final and not self._streams:
            return False
        held = None if final else _MAY_CLOSE.search(text)
        value = text[len(before) : held.start() if held else len(text)]
        self._take(len(value))
        self._value_begins = self._value_begins and not value and not final
        self._give("tool_call", _escaped(value) if self._streams else value)
        return False

    def _end_value(self, value: str) -> None:
        if self._streams:
            self._give("tool_call", _escaped(value) + '"')
            return
        root = self._tool.parameters if self._tool else {}
        self._give("tool_call", json.dumps(typed(value, self._schema, root), ensure_ascii=False))

    # {"name": NAME, "arguments": {…}}

    def _open_hermes(self, final: bool) -> bool | None:
        if match := _HERMES.match(self._buffer):
            try:
                name = str(strict_json(match[1]))
            except ValueError:
                return None
            if not self._line.blank and name not in self._tools:
                return None
            self._take(match.end())
            self._call(name)
            self._depth, self._quoted, self._escape = 0, False, False
            self._step = self._json
            return True
        # Another order of the keys, or arguments as a string: known only when it is whole.
        if match := _HERMES_WHOLE.match(self._buffer):
            call = _hermes_call(match[1])
            if call is None:
                return None
            self._take(match.end())
            self._call(call[0])
            self._give("tool_call", call[1])
            self._step = self._after_call
            return True
        if final or END_CALL in self._buffer or not _MAY_BE_HERMES.fullmatch(self._buffer):
            return None
        return False

    def _json(self, final: bool) -> bool:
        """Inside of the arguments' object."""
        for at, char in enumerate(self._buffer):
            if self._quoted:
                if self._escape:
                    self._escape = False
                elif char == "\\":
                    self._escape = True
                elif char == '"':
                    self._quoted = False
            elif char == '"':
                self._quoted = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._give("tool_call", self._take(at + 1))
                    self._step = self._after_json
                    return True
        self._give("tool_call", self._take(len(self._buffer)))
        return False

    def _after_json(self, final: bool) -> bool:
        """Before the brace that closes the call's object."""
        rest = self._buffer.lstrip()
        if not rest and not final:
            return False
        if rest.startswith("}"):
            self._buffer = rest[1:]
        self._step = self._after_call
        return True


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _hermes_call(text: str) -> tuple[str, str] | None:
    """Name and arguments' JSON text of a call in Hermes' form."""
    try:
        call: Any = strict_json(text)
        arguments = call["arguments"] if "arguments" in call else call["parameters"]
        if isinstance(arguments, str):
            arguments = strict_json(arguments)
        if not isinstance(arguments, dict) or not isinstance(call["name"], str):
            return None
        return call["name"], json.dumps(arguments, ensure_ascii=False)
    except (ValueError, KeyError, TypeError):
        return None
