"""What may change logits before a token is drawn from them: constraints, and the caller's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashmoe.errors import ArgumentError

Floats = npt.NDArray[np.float32]

LogitsProcessor = Callable[[Sequence[int], Floats], Floats]
"""Called before each token with all ids so far, the prompt's too, and the logits, float32 [vocab],
which are its to change; it gives the logits to use. -inf forbids a token."""


class Constraint(Protocol):
    """What answers a structure allows. It sees every token drawn, those of the reasoning too."""

    @property
    def finished(self) -> bool:
        """Whether the answer is complete, so that nothing may follow."""

    def mask(self, logits: Floats, left: int | None = None) -> Floats:
        """A copy of the logits [vocab] with -inf for every token that may not come next.

        Args:
            left: how many tokens may still come, this one too.
        """

    def advance(self, token: int) -> None:
        """This token was drawn."""


def process(processors: Sequence[LogitsProcessor], ids: Sequence[int], logits: Floats) -> Floats:
    """The logits that processors make of a model's, one after another.

    Raises:
        ArgumentError: a processor gives something else than logits, or leaves no token.
    """
    for processor in processors:
        made = processor(ids, logits)
        if not isinstance(made, np.ndarray) or made.shape != logits.shape:
            found = made.shape if isinstance(made, np.ndarray) else type(made).__name__
            raise ArgumentError(
                f"the logits processor {processor!r} gave {found}, expected an array "
                f"{list(logits.shape)}"
            )
        logits = made.astype(np.float32, copy=False)
        if not np.isfinite(top := logits.max()):
            raise ArgumentError(
                f"the logits processor {processor!r} gave logits whose largest is {top}; leave "
                "at least one token that is not -inf, and no NaN"
            )
    return logits


class FrequencyPenalty:
    """Subtracts `penalty` from a token's logit for each time that it was generated."""

    def __init__(self, penalty: float) -> None:
        self._penalty = penalty
        self._counts: dict[int, int] = {}
        self._seen: int | None = None

    def __call__(self, ids: Sequence[int], logits: Floats) -> Floats:
        seen = len(ids) if self._seen is None else self._seen  # at first, of the prompt
        for token in ids[seen:]:
            self._counts[token] = self._counts.get(token, 0) + 1
        self._seen = len(ids)
        if self._counts:
            counts = np.fromiter(self._counts.values(), np.float32, len(self._counts))
            logits[list(self._counts)] -= np.float32(self._penalty) * counts
        return logits


class LogitBias:
    """Adds to the logits of tokens what `biases` has for them; -100 leaves hardly a chance."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._ids = list(biases)
        self._biases = np.fromiter(biases.values(), np.float32, len(biases))

    def __call__(self, ids: Sequence[int], logits: Floats) -> Floats:
        logits[self._ids] += self._biases
        return logits
