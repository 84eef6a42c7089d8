"""An answer while it is being given, piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from flashmoe.generate.answer import Answer, Delta
from flashmoe.generate.conversations import Conversations, Snapshot
from flashmoe.generate.engine import Engine
from flashmoe.generate.parse import AnswerParser
from flashmoe.generate.prompt import Prompt, Prompts
from flashmoe.generate.state import State
from flashmoe.generate.stats import Meter
from flashmoe.generate.steps import Tokens

if TYPE_CHECKING:
    from flashmoe import _native

_REASONS = {"eos": "stop", "complete": "stop", "context": "length", None: "cancelled"}


class Turn:
    """One answer to a conversation: where its state comes from, and what is kept of it.

    Args:
        given: a state that is to hold the conversation in the end, if any.
        new_meter: makes what counts a request.
    """

    def __init__(
        self,
        engine: Engine,
        conversations: Conversations,
        prompts: Prompts,
        prompt: Prompt,
        given: State | None,
        new_meter: Callable[[], Meter],
    ) -> None:
        self.prompt = prompt
        self._engine = engine
        self._conversations = conversations
        self._prompts = prompts
        self._given = given
        self._new_meter = new_meter
        self._found: Snapshot | None = None
        self._meter: Meter | None = None
        self._drawn: list[int] = []

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
        self._keep(state._native.fork(), self.prompt.ids)

    def end(self, state: State) -> None:
        """Keeps what was computed, however it ended."""
        self._drawn = state._tokens[len(self.prompt.ids) :]
        shared = state is self._given
        self._keep(state._native.fork() if shared else state._native, state._tokens)

    def answer(self, deltas: Iterable[Delta]) -> Answer:
        """The complete answer, which is remembered for later turns."""
        meter = self._meter
        reason = meter.finish_reason if meter else None
        answer = Answer.of(
            deltas,
            _REASONS.get(reason, reason or "cancelled"),
            prompt_tokens=len(self.prompt.ids),
            cached_tokens=meter.cached_tokens if meter else 0,
            generated_tokens=meter.generated_tokens if meter else 0,
        )
        if reason is not None:
            drawn = self._drawn[:-1] if reason == "eos" else self._drawn
            self._prompts.remember(self.prompt, drawn, answer)
        return answer

    def _begun(self) -> _native.State:
        return self._found.fork() if self._found else self._engine.native.new_state()

    def _keep(self, native: _native.State, ids: Sequence[int]) -> None:
        self._conversations.keep(native, ids, self.prompt.places)


class Chat(Iterator[Delta]):
    """The pieces of an answer, as they come. Each of its tokens is on exactly one of them.

    Leaving the loop stops the work, if nothing else holds the Chat; `close()` does so at once.
    """

    def __init__(self, turn: Turn, tokens: Tokens, parser: AnswerParser) -> None:
        self._turn = turn
        self._tokens = tokens
        self._parser = parser
        self._deltas: list[Delta] = []
        self._pieces = self._stream()
        self._answer: Answer | None = None

    def __iter__(self) -> Chat:
        return self

    def __next__(self) -> Delta:
        delta = next(self._pieces)
        self._deltas.append(delta)
        return delta

    @property
    def prompt_ids(self) -> list[int]:
        """The ids of the conversation that is being answered."""
        return list(self._turn.prompt.ids)

    @property
    def answer(self) -> Answer:
        """The complete answer; what is missing is computed first."""
        for _ in self:
            pass
        return self._whole()

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

    def _stream(self) -> Generator[Delta, None, None]:
        try:
            for token in self._tokens:
                deltas = self._parser.push(token.text) or [self._nothing()]
                yield dataclasses.replace(deltas[0], token=token)
                yield from deltas[1:]
            yield from self._parser.finish()
        finally:
            self._tokens.close()
            self._whole()

    def _nothing(self) -> Delta:
        """For a token with which nothing became final."""
        if self._deltas:
            return dataclasses.replace(self._deltas[-1], text="", id=None, name=None)
        return Delta("text", "")

    def _whole(self) -> Answer:
        if self._answer is None:
            self._answer = self._turn.answer(self._deltas)
        return self._answer
