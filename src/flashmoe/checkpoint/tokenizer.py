"""A checkpoint's tokenizer: the one place that touches the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe.errors import ArgumentError, CheckpointError, FlashMoeError
from flashmoe.machine.files import is_there, read_file

if TYPE_CHECKING:
    import tokenizers

_LARGEST = 512 << 20
"""Bytes of a tokenizer.json; that of Qwen3.5 has 20 million."""
_GROWTH = 1000
"""Times that a tokenizer's own replacements may lengthen a text."""


class Tokenizer:
    """Text to ids, and ids to the pieces they stand for.

    Attributes:
        library: the tokenizer as the `tokenizers` library has it.
        special: ids of the special tokens, which give no text.
    """

    def __init__(self, library: tokenizers.Tokenizer, path: Path | None = None) -> None:
        self.library = library
        self._path = path or Path("tokenizer.json")
        with _explained(self._path):
            # A prompt is neither cut nor filled up, whatever the file was last used for.
            library.no_truncation()
            library.no_padding()
            _check_growth(library, self._path)
            added = library.get_added_tokens_decoder()
            self.special = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer:
        """From `tokenizer.json`.

        Raises:
            CheckpointError: there is none, it is damaged, or it is not a byte-level tokenizer.
        """
        from tokenizers import Tokenizer as Library  # noqa: PLC0415
        from tokenizers import decoders  # noqa: PLC0415

        path = directory / "tokenizer.json"
        if not is_there(path):
            raise CheckpointError(
                f"{path}: no such file; copy tokenizer.json from the model's page, or download it"
                " again"
            )
        data = read_file(path, _LARGEST)
        with _explained(path):
            library = Library.from_buffer(data)
            decoder = library.decoder
        if not isinstance(decoder, decoders.ByteLevel):
            raise CheckpointError(
                f"{path}: its decoder is {type(decoder).__name__}; flashmoe reads byte-level"
                " tokenizers (ByteLevel) only"
            )
        return cls(library, path)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The text's ids, with the tokens that the tokenizer puts around a text if `special`."""
        return self._encode(text, special).ids

    def encode_from(self, text: str) -> tuple[list[int], int]:
        """The text's ids, with nothing around it, and where in the text the second one begins."""
        encoding = self._encode(text, special=False)
        return encoding.ids, encoding.offsets[0][1] if encoding.ids else 0

    def _encode(self, text: str, special: bool) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"the prompt is not valid Unicode: character {error.start} is "
                f"{text[error.start]!r}, half of a surrogate pair; was it decoded from bytes that "
                "are not UTF-8?"
            ) from None
        with _explained(self._path):
            return self.library.encode(text, add_special_tokens=special)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens as they are written."""
        return str(self.library.decode(list(ids), skip_special_tokens=False))

    def token(self, token: int) -> str:
        """How a token is written in a text, special ones too; "" for an id that is none."""
        return self.library.id_to_token(token) or ""

    def id_of(self, text: str) -> int | None:
        """The token that is written so; None where none is."""
        with _explained(self._path):
            return self.library.token_to_id(text)

    def piece(self, token: int) -> str:
        """The vocabulary's entry for an id, in the byte alphabet; "" for special ones and none."""
        if token in self.special:
            return ""
        with _explained(self._path):
            return self.library.id_to_token(token) or ""


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turns whatever the library raises into a CheckpointError that names the file.

    Where its Rust panics that is a PanicException, which is a BaseException only.
    """
    try:
        yield
    except (FlashMoeError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise CheckpointError(
            f"{path}: the tokenizer is damaged, or not one that can be used here:"
            f" {type(error).__name__}: {error}; download it again"
        ) from error


def _check_growth(library: tokenizers.Tokenizer, path: Path) -> None:
    """Refuses normalizers that make a text so much longer that memory ends."""
    if library.normalizer is not None:
        growth = _growth(json.loads(library.normalizer.__getstate__()))
        if growth > _GROWTH:
            raise CheckpointError(
                f"{path}: its normalizer may lengthen a text {growth:.0e} times; at most {_GROWTH}"
                " are believable"
            )


def _growth(normalizer: Any) -> float:
    """Times that a normalizer may lengthen a text of one character, at most."""
    if not isinstance(normalizer, dict):
        return 1
    if normalizer.get("type") == "Sequence":
        total = 1.0
        for part in normalizer.get("normalizers", ()):
            total *= _growth(part)
        return total
    if normalizer.get("type") == "Replace":
        # A pattern may match every character, and the gaps between them.
        return 1 + len(normalizer.get("content", ""))
    if normalizer.get("type") == "Prepend":
        return 1 + len(normalizer.get("prepend", ""))
    return 1
