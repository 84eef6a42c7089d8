"""The tokens of one request: its prompt in chunks, then a pass for each token."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

from flashmoe.errors import StoppedError
from flashmoe.generate.answer import Token
from flashmoe.generate.engine import Progress
from flashmoe.generate.processors import Floats
from flashmoe.generate.sampling import Sampler, likeliest
from flashmoe.generate.scheduler import Request
from flashmoe.generate.state import State
from flashmoe.generate.stats import Meter
from flashmoe.generate.text import TextStream


@dataclass
class Work:
    """What a request asks for.

    Attributes:
        state: gives the state to go on from.
        begin: makes it hold the tokens of the prompt, computed or not.
        meter: makes what counts the request.
        stream: makes text of tokens; None for a checkpoint without a tokenizer.
        max_tokens: to draw at most; None for as many as the context holds.
        context: tokens that a sequence may have.
        eos: ids that end the answer.
        logprobs: how many alternatives each token carries.
        marks: positions, in order, at which `mark` is to see the state; it also sees the end of the
            prompt.
        end: sees the state when the request ends, whatever ends it.
    """

    state: Callable[[], State]
    begin: Callable[[State], None]
    meter: Callable[[], Meter]
    sampler: Sampler
    stream: TextStream | None
    max_tokens: int | None
    context: int
    eos: frozenset[int]
    progress: Progress | None = None
    logprobs: int = 0
    marks: Sequence[int] = ()
    mark: Callable[[State], None] = field(default=lambda state: None)
    end: Callable[[State], None] = field(default=lambda state: None)


class Tokens(Iterator[Token]):
    """The tokens of an answer, each computed when it is asked for."""

    def __init__(self, request: Request, work: Work) -> None:
        self._request = request
        self._steps = _steps(request, work)

    def __iter__(self) -> Tokens:
        return self

    def __next__(self) -> Token:
        return next(self._steps)

    def cancel(self) -> None:
        """Ends the answer within a layer of the pass that runs. May be called by any thread."""
        self._request.cancel()

    def close(self) -> None:
        """Ends the answer where it is."""
        self._steps.close()


def _steps(request: Request, work: Work) -> Generator[Token, None, None]:
    with request:
        state = work.state()
        with state._held():
            meter = work.meter()
            work.begin(state)
            try:
                yield from _run(request, work, meter, state)
            except StoppedError:
                meter.finish_reason = "cancelled"
            finally:
                work.end(state)


def _run(request: Request, work: Work, meter: Meter, state: State) -> Generator[Token, None, None]:
    logits = _prefill(request, work, meter, state)
    if work.max_tokens == 0:
        meter.finish_reason = "length"
    elif state.position >= work.context:
        meter.finish_reason = "context"
    while meter.finish_reason is None:
        start = time.perf_counter()
        token, logprob = work.sampler.draw(logits, state._tokens)
        alternatives = likeliest(logits, work.logprobs) if work.logprobs else ()
        state._tokens.append(token)
        meter.token()
        text = ""
        if token in work.eos:
            meter.finish_reason = "eos"
        elif work.stream is not None:
            text = work.stream.push(token)
            if work.stream.stopped:
                meter.finish_reason = "stop"
        if meter.finish_reason is None and work.sampler.finished:
            meter.finish_reason = "complete"
        if meter.finish_reason is None and meter.generated_tokens == work.max_tokens:
            meter.finish_reason = "length"
        elif meter.finish_reason is None and state.position == work.context:
            meter.finish_reason = "context"
        if meter.finish_reason is not None and work.stream is not None:
            text += work.stream.finish()
        spent = time.perf_counter() - start
        yield Token(token, text, logprob, alternatives)
        if meter.finish_reason is None:
            start = time.perf_counter()
            logits = request.token(state._native, token)
            meter.decode_seconds += spent + time.perf_counter() - start


def _prefill(request: Request, work: Work, meter: Meter, state: State) -> Floats:
    """Computes the tokens that the state has but the native state has not; what follows them."""
    before = state._native.position
    todo = state.position - before
    meter.cached_tokens = before
    start = time.perf_counter()
    if todo and work.progress is not None:
        work.progress(0, todo)
    for mark in (*(m for m in work.marks if before < m < state.position), state.position):
        begin = state._native.position
        for done, _ in request.prompt(state._native, state._tokens[begin:mark]):
            meter.prompt_tokens = begin - before + done
            meter.prefill_seconds = time.perf_counter() - start
            if work.progress is not None:
                work.progress(meter.prompt_tokens, todo)
        if begin < mark:
            work.mark(state)
    logits = state._native.logits
    assert logits is not None, "a request with nothing to go on from"
    return logits
