"""A conversation as a prompt: the checkpoint's own chat template, rendered as transformers does."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.checkpoint.json import read_json
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.errors import ArgumentError, CheckpointError, printable
from flashmoe.machine.files import is_there, read_file

if TYPE_CHECKING:
    from flashmoe.checkpoint.jinja import Template

log = logging.getLogger("flashmoe")

Message = Mapping[str, Any]
"""A turn: `role`, `content`, and what the template knows besides (`tool_calls`, …)."""


TEMPLATES = "additional_chat_templates"
"""A folder of templates that are named by their files."""

_LARGEST = 4 << 20  # bytes of a chat_template.jinja
_MEDIA = frozenset(
    f"{prefix}{kind}{suffix}"
    for kind in ("image", "video", "audio", "file")
    for prefix in ("", "input_")
    for suffix in ("", "s", "_url")
)


def turns_of(messages: Iterable[Message]) -> list[Message]:
    """The turns of a conversation, of which an iterator gives each only once.

    Raises ArgumentError where they are none.
    """
    turns = None
    if isinstance(messages, Iterable) and not isinstance(messages, (str, bytes, Mapping)):
        turns = list(messages)
    if turns is None or not all(isinstance(turn, Mapping) for turn in turns):
        raise ArgumentError(
            'messages must be a list of turns such as {"role": "user", "content": "Hello"}; '
            f"got {messages if turns is None else turns!r}"
        )
    return turns


def refuse_media(message: Message, where: str) -> None:
    """Raises ArgumentError for an image, a video or a sound: templates write a mark in its place,
    and the model, which reads only text, would answer as if it had seen it."""
    content = message.get("content")
    parts = content if isinstance(content, (list, tuple)) else ()
    looked = [(where, message)]
    looked += [
        (f"{where}.content[{number}]", part)
        for number, part in enumerate(parts)
        if isinstance(part, Mapping)
    ]
    for place, part in looked:
        held = [key for key in part.keys() & _MEDIA if part[key]]
        if part is not message and str(part.get("type")) in _MEDIA:
            held = [part["type"]]
        if held:
            raise ArgumentError(
                f"{place}: {held[0]!r} is not supported, only parts of text: this engine computes"
                " text, and would not see it"
            )


class ChatTemplate:
    """A checkpoint's chat template and the special tokens it may name."""

    def __init__(self, text: str, path: Path, tokens: Mapping[str, str] | None = None) -> None:
        self.text = text
        self.path = path
        self._tokens = dict(tokens or {})
        self._known: set[str] = set()  # variables that it has, or was said not to have

    @classmethod
    def load(cls, metadata: Metadata, *, tools: bool = False) -> ChatTemplate | None:
        """From `chat_template.jinja`, `tokenizer_config.json` or `chat_template.json`, else None.

        Where several are named, as those in `additional_chat_templates` are by their files,
        "tool_use" is taken for a conversation with tools, else "default".

        Raises:
            CheckpointError: a file cannot be read, or holds something else.
        """
        directory, config = metadata.directory, metadata.tokenizer
        tokens: dict[str, str] = {}
        for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token"):
            if (value := metadata.token(name)) is not None:
                tokens[name] = value
        paths = [directory / "chat_template.jinja"]
        if tools:
            paths.insert(0, directory / TEMPLATES / "tool_use.jinja")
        for path in paths:
            if is_there(path):
                try:
                    return cls(read_file(path, _LARGEST).decode("utf-8"), path, tokens)
                except UnicodeDecodeError as error:
                    raise CheckpointError(f"{path}: not UTF-8: {error}") from error
        path, text = directory / "tokenizer_config.json", config.get("chat_template")
        if text is None and is_there(other := directory / "chat_template.json"):
            path, text = other, read_json(other).get("chat_template")
        if isinstance(text, list):
            try:
                named = {t["name"]: t["template"] for t in text}
            except (KeyError, TypeError):
                raise CheckpointError(
                    f"{path}: chat_template is a list, expected objects of name and template in it"
                ) from None
            text = (named.get("tool_use") if tools else None) or named.get("default")
        return cls(text, path, tokens) if isinstance(text, str) else None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt's text.

        Args:
            messages: the turns so far, the oldest first.
            tools: functions that the model may call, as JSON schemas.
            add_generation_prompt: end with the beginning of the assistant's turn.
            variables: the template's own, such as `enable_thinking=False`.
        Raises:
            ArgumentError: messages are not turns, or the template refuses them.
            CheckpointError: the template is not valid Jinja, or computes without end.
        """
        messages = turns_of(messages)
        for number, message in enumerate(messages):
            refuse_media(message, f"messages[{number}]")
        from flashmoe.checkpoint.jinja import TemplateError  # noqa: PLC0415

        template = self._compiled
        self._say_what_has_no_effect(variables)
        # A key whose value is None means the same as an absent one; templates know only the latter.
        turns = [{k: v for k, v in m.items() if v is not None} for m in messages]
        try:
            return template.render(
                {
                    **self._tokens,
                    **variables,
                    "messages": turns,
                    "tools": None if tools is None else list(tools),
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except TemplateError as failure:
            if failure.too_much:
                raise CheckpointError(
                    f"{self.path}: the chat template does too much: {failure}"
                ) from failure
            raise ArgumentError(
                f"{self.path}: the chat template refuses this: {failure}"
            ) from failure

    def reads(self, name: str) -> bool:
        """Whether it has a variable of that name."""
        return name in self._compiled.variables

    def _say_what_has_no_effect(self, variables: Mapping[str, Any]) -> None:
        for name in variables.keys() - self._known:
            self._known.add(name)  # said once
            if self.reads(name):
                continue
            what = "; a model that reasons does so all the same" if "think" in name else ""
            log.warning(
                "%s: the chat template has no variable %s: it has no effect%s",
                self.path,
                printable(name, 80),
                what,
            )

    @cached_property
    def _compiled(self) -> Template:
        from flashmoe.checkpoint.jinja import Template, TemplateError  # noqa: PLC0415

        try:
            return Template(self.text)
        except TemplateError as failure:
            what = "does too much" if failure.too_much else "is not valid Jinja"
            raise CheckpointError(f"{self.path}: the chat template {what}: {failure}") from failure
