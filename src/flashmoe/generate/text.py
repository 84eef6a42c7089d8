"""Token ids to text, as they come: no split characters, and nothing that must be taken back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

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

    def __init__(self, tokenizer: Tokenizer, stop: str | Iterable[str] | None = None) -> None:
        stop = () if stop is None else [stop] if isinstance(stop, str) else stop
        self._stop = list(stop) if isinstance(stop, Iterable) else [stop]
        if not all(isinstance(s, str) and s for s in self._stop):
            raise ArgumentError(f"stop must be strings that are not empty; got {self._stop!r}")
        self._tokenizer = tokenizer
        special = {tokenizer.token(token) for token in tokenizer.special} if self._stop else set()
        self._written = {s for s in self._stop if any(text and text in s for text in special)}
        """Stop strings with special tokens in them: looked for in what the model writes, not in
        the text that is given out."""
        # Replaces invalid bytes as Rust's from_utf8_lossy does: one U+FFFD a maximal subpart.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._shown: list[bool] = []
        """Of each character that is held whether it is text, and not of a special token."""
        self.stop: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was met, behind which nothing is given."""
        return self.stop is not None

    def push(self, token: int) -> str:
        """The text that became final with this token; `stop` is set at a stop string."""
        text = self._utf8.decode(piece_bytes(self._tokenizer.piece(token)))
        special = self._written and token in self._tokenizer.special
        return self._give(text, self._tokenizer.token(token) if special else "")

    def finish(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        text = self._give(self._utf8.decode(b"", final=True))
        text += self._take(len(self._held))
        return text

    def _give(self, text: str, special: str = "") -> str:
        self._held += text + special
        self._shown += [True] * len(text) + [False] * len(special)
        places = [i for i, shown in enumerate(self._shown) if shown]
        plain = self._held if len(places) == len(self._held) else self._texts(len(self._held))

        def begin(stop: str, at: int) -> int:
            """Where in what is held a stop string begins that is at `at` of what it is found in."""
            return at if stop in self._written else places[at]

        found = [
            (begin(stop, at), -len(stop), stop)
            for stop in self._stop
            if (at := (self._held if stop in self._written else plain).find(stop)) >= 0
        ]
        if found:
            at, _, self.stop = min(found)
            return self._take(at)
        keep = len(self._held)
        for stop in self._stop:
            looked = self._held if stop in self._written else plain
            if n := overlap(looked, stop):
                keep = min(keep, begin(stop, len(looked) - n))
        return self._take(keep)

    def _texts(self, end: int) -> str:
        return "".join(c for c, shown in zip(self._held[:end], self._shown, strict=False) if shown)

    def _take(self, end: int) -> str:
        """The text before `end` of what is held, which is held no more."""
        text = self._texts(end)
        self._held, self._shown = self._held[end:], self._shown[end:]
        return text


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
