"""What every API's reply is made of: the events of a stream, and the one object at its end."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from flashmoe.generate.answer import Answer, Delta
from flashmoe.serve.ask import Ask
from flashmoe.serve.fields import RequestError

if TYPE_CHECKING:
    from flashmoe.checkpoint.tokenizer import Tokenizer
    from flashmoe.generate.chat import Chat

Event = dict[str, Any]


@dataclass
class Used:
    """Tokens that all choices took together; a prompt counts once."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    reasoning: int = 0


class Reply(ABC):
    """The reply to one request, told of every piece of the answers in their order.

    Attributes:
        silence: what a stream says when there is nothing to say yet.
        end: what it ends with, when it ends well.
    """

    prefix: ClassVar[str]
    silence: ClassVar[bytes]
    end: ClassVar[bytes] = b""

    def __init__(self, ask: Ask, tokenizer: Tokenizer, fingerprint: str) -> None:
        self.ask = ask
        self.id = new_id(self.prefix)
        self.created = int(time.time())
        self.fingerprint = fingerprint
        self.used = Used()
        self._tokenizer = tokenizer

    @abstractmethod
    def begin(self, chats: Sequence[Chat]) -> Iterator[Event]:
        """What is known before the first token."""

    def choice(self, index: int) -> Iterator[Event]:
        """An answer begins."""
        yield from ()

    def piece(self, index: int, delta: Delta) -> Iterator[Event]:
        """A piece of an answer came."""
        if delta.token is not None and delta.kind == "reasoning":
            self.used.reasoning += 1
        yield from self._piece(index, delta)

    def ended(self, index: int, answer: Answer) -> Iterator[Event]:
        """An answer is complete."""
        if index % self.ask.choices == 0:
            self.used.prompt += answer.prompt_tokens
            self.used.cached += answer.cached_tokens
        self.used.generated += answer.generated_tokens
        yield from self._ended(index, answer)

    def finish(self) -> Iterator[Event]:
        """All answers are complete."""
        yield from ()

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The reply as one object, when all answers are complete."""

    @abstractmethod
    def failed(self, error: RequestError) -> Event:
        """An error in the middle of a stream."""

    @abstractmethod
    def _piece(self, index: int, delta: Delta) -> Iterator[Event]: ...

    @abstractmethod
    def _ended(self, index: int, answer: Answer) -> Iterator[Event]: ...

    def encoded(self, event: Event) -> bytes:
        """An event as it is sent."""
        return b"data: " + to_json(event) + b"\n\n"


def to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex[:24]}"
