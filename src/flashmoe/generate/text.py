"""Token ids to text, as they come: no split characters, and nothing that must be taken back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from flashmoe.checkpoint.tokenizer import Tokenizer
from flashmoe.errors import ArgumentError


def _byte_of() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_of()


class TextStream:
    """The text of a growing list of ids, in pieces that are final when they are given out.

    The pieces add up to `tokenizer.decode(ids)`, cut before the first stop string. Bytes of an
    unfinished UTF-8 character are held back, and so is text that may be the start of a stop string.

    Attributes:
        stop: the stop string that was met; None before that.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] | None = None) -> None:
        stop = () if stop is None else [stop] if isinstance(stop, str) else stop
        self._stop = list(stop) if isinstance(stop, Iterable) else [stop]
        if not all(isinstance(s, str) and s for s in self._stop):
            raise ArgumentError(f"stop must be strings that are not empty; got {self._stop!r}")
        self._tokenizer = tokenizer
        # Replaces invalid bytes as Rust's from_utf8_lossy does: one U+FFFD a maximal subpart.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stop: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met, behind which nothing is given."""
        return self.stop is not None

    def push(self, token: int) -> str:
        """The text that became final with this token; `stop` is set at a stop string."""
        return self._give(self._utf8.decode(piece_bytes(self._tokenizer.piece(token))))

    def finish(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        text = self._give(self._utf8.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _give(self, text: str) -> str:
        text = self._held + text
        found = [(i, -len(s), s) for s in self._stop if (i := text.find(s)) >= 0]
        if found:
            at, _, self.stop = min(found)
            self._held = ""
            return text[:at]
        keep = max((overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def piece_bytes(piece: str) -> bytes:
    """A vocabulary entry's bytes; one outside the byte alphabet (an added token) is its UTF-8."""
    try:
        return bytes(map(_BYTE_OF.__getitem__, piece))
    except KeyError:
        return piece.encode()


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of text that is a proper beginning of stop."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
