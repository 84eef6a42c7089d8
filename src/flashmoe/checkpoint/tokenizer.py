"""A checkpoint's tokenizer: the one place that touches the `tokenizers` library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Text to ids, and ids to the pieces they stand for.

    Attributes:
        library: the tokenizer as the `tokenizers` library has it.
        special: ids of the special tokens, which give no text.
    """

    def __init__(self, library: tokenizers.Tokenizer) -> None:
        self.library = library
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
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file; copy tokenizer.json from the model's page, or download it"
                " again"
            )
        try:
            library = Library.from_file(str(path))
        except Exception as error:  # the Rust library raises plain Exception
            raise CheckpointError(f"{path}: not a tokenizer: {error}; download it again") from error
        if not isinstance(library.decoder, decoders.ByteLevel):
            kind = type(library.decoder).__name__
            raise CheckpointError(
                f"{path}: its decoder is {kind}; flashmoe reads byte-level tokenizers (ByteLevel)"
                " only"
            )
        return cls(library)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The text's ids, with the tokens that the tokenizer puts around a text if `special`."""
        return self._encode(text, special).ids

    def encode_from(self, text: str) -> tuple[list[int], int]:
        """The text's ids, with nothing around it, and where in the text the second one begins."""
        encoding = self._encode(text, special=False)
        return encoding.ids, encoding.offsets[0][1] if encoding.ids else 0

    def _encode(self, text: str, special: bool) -> tokenizers.Encoding:
        try:
            return self.library.encode(text, add_special_tokens=special)
        except TypeError:
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if at is None:
                raise
            raise ArgumentError(
                f"the prompt is not valid Unicode: character {at} is {text[at]!r}, half of a "
                "surrogate pair; was it decoded from bytes that are not UTF-8?"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens as they are written."""
        return str(self.library.decode(list(ids), skip_special_tokens=False))

    def token(self, token: int) -> str:
        """How a token is written in a text, special ones too; "" for an id that is none."""
        return self.library.id_to_token(token) or ""

    def piece(self, token: int) -> str:
        """The vocabulary's entry for an id, in the byte alphabet; "" for special ones and none."""
        if token in self.special:
            return ""
        return self.library.id_to_token(token) or ""
