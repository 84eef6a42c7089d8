"""Whose pass comes next, and how long it may be: the one user of the native engine.

Requests run in the threads that want their tokens; the engine serves them in the order in which
they ask, a pass each: a token, or a chunk of a prompt.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flashmoe import _native
from flashmoe.machine.lock import Lock

WAIT = 2.0
"""Seconds that a request waits at most between two tokens because of others' prompts."""
_AIM = 0.8  # of what is allowed: a pass may take longer than the last one of its length
Output = npt.NDArray[Any]


class PassTimes:
    """What passes took of late by their number of rows, and what that says of the next one.

    A longer pass takes less time a row, for it shares weights and experts. So a time a row that was
    measured bounds that of longer passes; up to twice as long ones, for rows cost more as the
    sequence grows, and what else the machine does changes.
    """

    def __init__(self) -> None:
        self._latest: dict[int, tuple[int, float]] = {}  # by powers of two

    def add(self, rows: int, seconds: float) -> None:
        self._latest[rows.bit_length()] = rows, seconds

    def of_a_token(self) -> float:
        """Seconds of a pass of one row; 0 before there was one."""
        return self._latest.get(1, (1, 0.0))[1]

    def rows_within(self, seconds: float) -> int:
        """How many rows a pass of so many seconds may have, at least 1."""
        most = 1
        for rows, took in sorted(self._latest.values()):
            if took > seconds:
                return min(most, rows)
            most = max(most, min(2 * rows, int(rows * seconds / max(took, 1e-9))))
        return most


class Request:
    """A sequence that wants passes, one after another; made by `Scheduler.request`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._native = _native.Request()
        self.decoding = False
        """Whether the latest pass was of a token, not of a prompt."""
        self.passing = False
        """Whether it has or waits for its turn."""
        self.ended = 0.0
        """When its latest pass ended, in seconds of the monotonic clock."""

    def __enter__(self) -> Request:
        self._scheduler.join(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._scheduler.leave(self)

    def cancel(self) -> None:
        """Makes the pass that runs, or the next one, raise StoppedError. From any thread."""
        self._native.cancel()

    def prompt(
        self, state: _native.State, ids: Sequence[int], *, all_logits: bool = False
    ) -> Iterator[tuple[int, Output]]:
        """Passes ids in chunks; after each, how many are done and their logits.

        float32 [vocab] of the last one, or with `all_logits` [rows of the chunk, vocab].
        """
        done = 0
        while done < len(ids):
            rows = self._scheduler.rows(self, len(ids) - done)
            out = self._pass(state, ids[done : done + rows], all_logits=all_logits)
            done += rows
            yield done, out

    def token(self, state: _native.State, token: int) -> Output:
        """Passes a token that was drawn; the logits that follow."""
        return self._pass(state, [token], decoding=True)

    def _pass(
        self,
        state: _native.State,
        ids: Sequence[int],
        *,
        decoding: bool = False,
        all_logits: bool = False,
    ) -> Output:
        self.decoding, self.passing = decoding, True
        try:
            out = self._scheduler.native.forward(
                state, np.array(ids, np.int32), all_logits, request=self._native
            )
        finally:
            self.passing, self.ended = False, time.monotonic()
        self._scheduler.measured(len(ids), self._native.seconds)
        return out


class Scheduler:
    """Lets requests take turns, and cuts prompts while others decode.

    Attributes:
        native: the engine.
        chunk: rows of a pass at most.
    """

    def __init__(self, native: _native.Engine, chunk: int) -> None:
        self.native = native
        self.chunk = chunk
        self._lock = Lock()
        self._requests: set[Request] = set()
        self._times = PassTimes()

    def request(self) -> Request:
        """A request; it counts among those that want passes while it is entered."""
        return Request(self)

    def join(self, request: Request) -> None:
        with self._lock:
            self._requests.add(request)

    def leave(self, request: Request) -> None:
        with self._lock:
            self._requests.discard(request)

    def rows(self, request: Request, wanted: int) -> int:
        """How many of the `wanted` rows of a prompt the next pass may have.

        While others decode, each of them waits for one pass of every other request. What time the
        tokens among these leave is the prompts' to share.
        """
        now = time.monotonic()
        with self._lock:
            lively = [r for r in tuple(self._requests) if r.passing or now - r.ended < WAIT]
            others = [r for r in lively if r is not request]
            decoding = sum(r.decoding for r in others)
            if decoding == 0:
                return min(wanted, self.chunk)
            tokens = (decoding - 1) * self._times.of_a_token()
            prompts = 1 + len(others) - decoding
            within = self._times.rows_within(_AIM * (WAIT - tokens) / prompts)
        return min(wanted, self.chunk, within)

    def measured(self, rows: int, seconds: float) -> None:
        """A pass of so many rows took so long."""
        with self._lock:
            self._times.add(rows, seconds)
