"""An answer while it is being given, piece by piece."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TYPE_CHECKING

from flashmoe.errors import OutOfMemoryError
from flashmoe.generate.answer import Answer, Delta
from flashmoe.generate.constraint import Constraint
from flashmoe.generate.conversations import Conversations, Snapshot
from flashmoe.generate.engine import Engine
from flashmoe.generate.parse import AnswerParser
from flashmoe.generate.prompt import Prompt, Prompts
from flashmoe.generate.state import State
from flashmoe.generate.stats import Meter
from flashmoe.generate.steps import Tokens
from flashmoe.generate.text import TextStream

if TYPE_CHECKING:
    from flashmoe import _native

_REASONS = {"eos": "stop", "complete": "stop", "context": "length", None: "cancelled"}


class Turn:
    """One answer to a conversation: where its state comes from, and what is kept of it.

    Args:
        constraint: what the answer is held to, if anything.
        stream: makes its text; None for a checkpoint without a tokenizer.
        given: a state that is to hold the conversation in the end, if any.
        new_meter: makes what counts a request.
    """

    def __init__(
        self,
        engine: Engine,
        conversations: Conversations,
        prompts: Prompts,
        prompt: Prompt,
        constraint: Constraint | None,
        stream: TextStream | None,
        given: State | None,
        new_meter: Callable[[], Meter],
    ) -> None:
        self.prompt = prompt
        self._engine = engine
        self._conversations = conversations
        self._prompts = prompts
        self._constraint = constraint
        self._stream = stream
        self._given = given
        self._new_meter = new_meter
        self._found: Snapshot | None = None
        self._meter: Meter | None = None
        self._drawn: list[int] = []
        self._answer: Answer | None = None

    def cached_tokens(self) -> int:
        """How many tokens of the prompt are computed already, as it looks now."""
        found = self._conversations.longest(self.prompt.ids)
        return found.position if found else 0

    def state(self) -> State:
        """The state to compute with: the caller's, or one that begins where a snapshot is."""
        self._found = self._conversations.longest(self.prompt.ids)
        return self._given or State(self._engine, self._begun(), [])

    def begin(self, state: State) -> None:
        """Makes the state hold the prompt."""
        ids, found = self.prompt.ids, self._found
        if state is self._given:
            held = state._native.position
            of_this = held <= len(ids) and state._tokens[:held] == ids[:held]
            if not of_this or held < (found.position if found else 0):
                state._native = self._begun()
        state._tokens = list(ids)

    def meter(self) -> Meter:
        self._meter = self._new_meter()
        return self._meter

    def mark(self, state: State) -> None:
        """Keeps a snapshot of the prompt so far."""
        self._keep(state, shared=True)

    def end(self, state: State) -> None:
        """Keeps what was computed, however it ended."""
        self._drawn = state._tokens[len(self.prompt.ids) :]
        self._keep(state, shared=state is self._given)

    def _keep(self, state: State, *, shared: bool) -> None:
        with contextlib.suppress(OutOfMemoryError):  # the answer needs no snapshot
            native = state._native.fork() if shared else state._native
            self._conversations.keep(native, state._tokens, self.prompt.places)

    def answer(self, deltas: Iterable[Delta]) -> Answer:
        """The answer when it has ended, which is remembered for later turns."""
        if self._answer is not None:
            return self._answer
        meter = self._meter
        reason = meter.finish_reason if meter else None
        answer = Answer.of(
            deltas,
            _REASONS.get(reason, reason or "cancelled"),
            hurried=self._constraint is not None and self._constraint.hurried,
            stop=self._stream.stop if self._stream is not None else None,
            prompt_tokens=len(self.prompt.ids),
            cached_tokens=meter.cached_tokens if meter else 0,
            generated_tokens=meter.generated_tokens if meter else 0,
        )
        if reason is not None and self.prompt.turns:
            drawn = self._drawn[:-1] if reason == "eos" else self._drawn
            self._prompts.remember(self.prompt, drawn, answer)
        self._answer = answer
        return answer

    def _begun(self) -> _native.State:
        return self._found.fork() if self._found else self._engine.native.new_state()


class Chat(Iterator[Delta]):
    """The pieces of an answer, as they come. Each of its tokens is on exactly one of them.

    Leaving the loop stops the work, if nothing else holds the Chat; `close()` does so at once.
    """

    def __init__(self, turn: Turn, tokens: Tokens, parser: AnswerParser) -> None:
        self._turn = turn
        self._tokens = tokens
        self._deltas: list[Delta] = []
        # Which knows nothing of this object: it ends with the last reference to it.
        self._pieces = _pieces(turn, tokens, parser, self._deltas)

    def __iter__(self) -> Chat:
        return self

    def __next__(self) -> Delta:
        return next(self._pieces)

    @property
    def prompt_ids(self) -> list[int]:
        """The ids of the conversation that is being answered."""
        return list(self._turn.prompt.ids)

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompt are computed already, as it looks before the first piece.

        What it came to is the answer's `cached_tokens`.
        """
        return self._turn.cached_tokens()

    @property
    def answer(self) -> Answer:
        """The complete answer; what is missing is computed first."""
        for _ in self:
            pass
        return self._turn.answer(self._deltas)

    def cancel(self) -> None:
        """Ends the answer within a layer of the pass that runs. May be called by any thread."""
        self._tokens.cancel()

    def close(self) -> None:
        """Ends the answer where it is. What was computed of the conversation stays cached."""
        self._pieces.close()

    def __enter__(self) -> Chat:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pieces(
    turn: Turn, tokens: Tokens, parser: AnswerParser, deltas: list[Delta]
) -> Generator[Delta, None, None]:
    """The pieces of an answer, which are also put into `deltas`."""
    try:
        for token in tokens:
            found = parser.push(token.text) or [_nothing(deltas)]
            found[0] = dataclasses.replace(found[0], token=token)
            for delta in found:
                deltas.append(delta)
                yield delta
        for delta in parser.finish():
            deltas.append(delta)
            yield delta
    finally:
        tokens.close()
        turn.answer(deltas)


def _nothing(deltas: list[Delta]) -> Delta:
    """For a token with which nothing became final."""
    if deltas:
        return dataclasses.replace(deltas[-1], text="", id=None, name=None)
    return Delta("text", "")
