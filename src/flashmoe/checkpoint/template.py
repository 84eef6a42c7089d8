"""A conversation as a prompt: the checkpoint's own chat template, rendered as transformers does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.checkpoint.json import read_json
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.errors import ArgumentError, CheckpointError
from flashmoe.machine.files import is_there, read_file

if TYPE_CHECKING:
    from flashmoe.checkpoint.jinja import Template

Message = Mapping[str, Any]
"""A turn: `role`, `content`, and what the template knows besides (`tool_calls`, …)."""


_LARGEST = 4 << 20  # bytes of a chat_template.jinja
_NOT_TURNS = (
    'messages must be a list of turns such as {{"role": "user", "content": "Hello"}}; got {!r}'
)


class ChatTemplate:
    """A checkpoint's chat template and the special tokens it may name."""

    def __init__(self, text: str, path: Path, tokens: Mapping[str, str] | None = None) -> None:
        self.text = text
        self.path = path
        self._tokens = dict(tokens or {})

    @classmethod
    def load(cls, metadata: Metadata, *, tools: bool = False) -> ChatTemplate | None:
        """From `chat_template.jinja`, `tokenizer_config.json` or `chat_template.json`, else None.

        Where several are named, "tool_use" is taken for a conversation with tools, else "default".

        Raises:
            CheckpointError: a file cannot be read, or holds something else.
        """
        directory, config = metadata.directory, metadata.tokenizer
        tokens: dict[str, str] = {}
        for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token"):
            value = config.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[name] = value
        path = directory / "chat_template.jinja"
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
        if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
            raise ArgumentError(_NOT_TURNS.format(messages))
        messages = list(messages)
        if not all(isinstance(message, Mapping) for message in messages):
            raise ArgumentError(_NOT_TURNS.format(messages))
        from flashmoe.checkpoint.jinja import TemplateError  # noqa: PLC0415

        template = self._compiled
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

    @cached_property
    def _compiled(self) -> Template:
        from flashmoe.checkpoint.jinja import Template, TemplateError  # noqa: PLC0415

        try:
            return Template(self.text)
        except TemplateError as failure:
            what = "does too much" if failure.too_much else "is not valid Jinja"
            raise CheckpointError(f"{self.path}: the chat template {what}: {failure}") from failure
