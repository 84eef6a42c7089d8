"""A conversation as a prompt: the checkpoint's own chat template, rendered as transformers does.

The one place that touches jinja2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.checkpoint.json import read_json
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
"""A turn: `role`, `content`, and what the template knows besides (`tool_calls`, …)."""


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
        if path.is_file():
            try:
                return cls(path.read_text(encoding="utf-8"), path, tokens)
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"{path}: cannot be read: {error}") from error
        path, text = directory / "tokenizer_config.json", config.get("chat_template")
        if text is None and (other := directory / "chat_template.json").is_file():
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
            CheckpointError: the template is not valid Jinja.
        """
        if isinstance(messages, (str, bytes, Mapping)) or not all(
            isinstance(m, Mapping) for m in messages
        ):
            raise ArgumentError(
                'messages must be a list of turns such as {"role": "user", "content": "Hello"}; '
                f"got {messages!r}"
            )
        template = self._compiled
        # A key whose value is None means the same as an absent one; templates know only the latter.
        turns = [{k: v for k, v in m.items() if v is not None} for m in messages]
        try:
            return template.render(
                messages=turns,
                tools=None if tools is None else list(tools),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{**self._tokens, **variables},
            )
        except Exception as error:  # a template may compute with what is no text
            raise ArgumentError(f"{self.path}: the chat template refuses this: {error}") from error

    @cached_property
    def _compiled(self) -> Template:
        import jinja2  # noqa: PLC0415
        import jinja2.ext  # noqa: PLC0415
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        try:
            return environment.from_string(self.text)
        except jinja2.TemplateError as error:
            raise CheckpointError(
                f"{self.path}: the chat template is not valid Jinja: {error}"
            ) from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a model never saw in training.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    import jinja2  # noqa: PLC0415

    raise jinja2.TemplateError(message)
