"""Grammars of answers, as text in llguidance's dialect of Lark (its docs/syntax.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flashmoe.generate.arguments import kinds, resolve
from flashmoe.generate.dialect import CALL, END_CALL, Dialect
from flashmoe.generate.tools import ToolSpec

WHITESPACE = r"\n {0,24}| {1,2}"
"""What may stand between the tokens of JSON. Without a bound a weak model writes spaces for ever;
with none at all it is kept from the form that it learnt, and loops too."""

COUNTED = 10_000
"""Characters that a text may be asked to have at least; each costs the library a state."""

Writable = Callable[[Mapping[str, Any]], bool]
"""Whether the library can enforce a JSON schema."""


def json_rule(schema: Mapping[str, Any], *, lenient: bool = False) -> str:
    """The expression for JSON that follows a schema."""
    options = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
    return "%json " + json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def literal(text: str) -> str:
    """The expression for a text."""
    return json.dumps(text, ensure_ascii=False)


def _no_closing(word: str) -> str:
    """A regular expression of what may follow a newline, up to where it is not `word`."""
    pattern = ""
    for char in reversed(word.replace("/", "\0")):
        pattern = f"(?:[^\\n{char}]|{char}{pattern})" if pattern else f"[^\\n{char}]"
    return pattern.replace("\0", r"\/")


_FREE = rf"(?:[^\n]|\n{_no_closing('</parameter>')})*"
"""Text of which no line but the first begins with what closes a value."""


class ToolGrammar:
    """The rules by which tools are called in a checkpoint's own form.

    Args:
        tokens: ids of the markup that is a token of its own: the library takes such a token only
            by its id.
        writable: what cannot be written is loosened to its JSON types: tools are taken leniently.
    """

    def __init__(
        self,
        tools: Sequence[ToolSpec],
        dialect: Dialect,
        tokens: Mapping[str, int],
        writable: Writable,
    ) -> None:
        self._tokens = tokens
        self._writable = writable
        self._rules: list[str] = []
        self.texts: dict[tuple[str, str], str] = {}
        """By tool and parameter, of values that are any text: what follows depends on it alone."""
        if dialect.calls == "hermes":
            bodies = [self._hermes(tool) for tool in tools]
            whole = f'"\\n" ({" | ".join(bodies)}) "\\n"'
        else:
            bodies = [self._xml(tool) for tool in tools]
            whole = f'"\\n<function=" ({" | ".join(bodies)}) "</function>\\n"'
        self._rules.append(f"call: {self._mark(CALL)} {whole} {self._mark(END_CALL)}")

    def text(self, start: str) -> str:
        """The whole grammar, given what `start` is in terms of `call`."""
        free = rf"/{_FREE}\n<\/parameter>\n/"
        return "\n".join([f"start: {start}", *self._rules, f"TEXT: {free}"])

    def _mark(self, mark: str) -> str:
        return f"<[{self._tokens[mark]}]>" if mark in self._tokens else literal(mark)

    def _rule(self, prefix: str, body: str) -> str:
        name = f"{prefix}{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _json(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
        whole = {**shared, **schema}
        if not self._writable(whole):
            whole = {"type": sorted(kinds(schema, root))}
        return json_rule(whole, lenient=True)

    def _hermes(self, tool: ToolSpec) -> str:
        head = f'{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
        schema = {"type": "object", **tool.parameters}
        return self._rule("f", f'{literal(head)} {self._json(schema, tool.parameters)} "}}"')

    def _xml(self, tool: ToolSpec) -> str:
        root = resolve(tool.parameters, tool.parameters)
        properties, required = root.get("properties"), root.get("required")
        parts = [literal(f"{tool.name}>\n")]
        for name, given in (properties if isinstance(properties, Mapping) else {}).items():
            if not name or len(name) > 256 or set(name) & set("<>\n"):
                continue  # cannot be written
            head = literal(f"<parameter={name}>\n")
            schema = given if isinstance(given, Mapping) else {}
            value = self._value(schema, tool.parameters)
            if value == "TEXT":
                self.texts[tool.name, name] = json.dumps([name, tool.parameters])
            rule = self._rule("p", f"{head} {value}")
            needed = isinstance(required, Sequence) and name in required
            parts.append(rule if needed else f"{rule}?")
        return self._rule("f", " ".join(parts))

    def _value(self, schema: Mapping[str, Any], root: Mapping[str, Any]) -> str:
        """The expression for a parameter's value and what closes it."""
        end = literal("\n</parameter>\n")
        allowed = kinds(schema, root)
        if "string" not in allowed:
            return f"{self._json(schema, root)} {end}"
        found = resolve(schema, root)
        values = [found["const"]] if "const" in found else found.get("enum")
        if isinstance(values, list):
            texts = [v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
            return f"({' | '.join(map(literal, texts))}) {end}"
        return self._text(found)

    def _text(self, schema: Mapping[str, Any]) -> str:
        """A string as it is; no line of it is what closes it."""
        least, most = schema.get("minLength"), schema.get("maxLength")
        if not isinstance(least, int) and not isinstance(most, int):
            return "TEXT"
        least = min(max(least, 0), COUNTED) if isinstance(least, int) else 0
        most = most if isinstance(most, int) else ""
        body = f'(/{_FREE}/ & /(?s:.){{{least},{most}}}/) "\\n</parameter>\\n"'
        return self._rule("TEXT", body)
