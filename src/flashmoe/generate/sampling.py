"""Choosing the next token from its logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from flashmoe.errors import ArgumentError, CheckpointError
from flashmoe.generate.processors import Constraint, Floats, LogitsProcessor, process

Ids = npt.NDArray[np.intp]


# Values by which other engines mean that something is off, as generation configs have them.
_MEANS_OFF: dict[str, Callable[[Any], bool]] = {
    "top_k": lambda x: _is_number(x) and x < 0,
    "top_p": lambda x: _is_number(x) and (x < 0 or x > 1),
    "min_p": lambda x: _is_number(x) and x < 0,
    "repetition_penalty": lambda x: _is_number(x) and -1 <= x <= 0,
}


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. The rules and their order are those of transformers' `generate`.

    Penalties first, then a constraint and processors, then temperature, top_k, top_p, min_p; what
    remains is drawn from in proportion to its probability.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token (ties: lowest id).
        top_k: keep the k most probable tokens (ties: lowest ids); 0 or -1 keeps all.
        top_p: keep the fewest most probable tokens whose probabilities sum to at least top_p.
        min_p: keep tokens at least min_p times as probable as the most probable one.
        repetition_penalty: of every token seen, a logit x > 0 becomes x / penalty, else x * penalty
            (Keskar et al. 2019, arXiv:1909.05858); 1 is off.
        presence_penalty: subtracted from the logits of every token generated so far; 0 is off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        rules: tuple[tuple[str, Callable[[float], bool], str], ...] = (
            ("temperature", lambda x: 0 <= x <= 1e6, "between 0 (greedy) and 1000000"),
            ("top_k", lambda x: -1 <= x < 2**31 and x == int(x), "a whole number, 0 (off) or more"),
            ("top_p", lambda x: 0 < x <= 1, "more than 0 and at most 1 (off)"),
            ("min_p", lambda x: 0 <= x <= 1, "between 0 (off) and 1"),
            ("repetition_penalty", lambda x: 1e-3 <= x <= 1e3, "0.001 to 1000 (1 is off)"),
            ("presence_penalty", lambda x: -1e6 <= x <= 1e6, "-1000000 to 1000000 (0 is off)"),
        )
        for name, allowed, text in rules:
            value = getattr(self, name)
            if not _is_number(value) or not allowed(value):  # no comparison holds for NaN
                raise ArgumentError(f"{name} must be {text}; got {value!r}")

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> Sampling:
        """The defaults of a checkpoint's `generation_config.json`; greedy unless it samples."""
        given = {f.name: config[f.name] for f in fields(cls) if config.get(f.name) is not None}
        for name, off in _MEANS_OFF.items():
            if name in given and off(given[name]):
                del given[name]
        if given.get("top_p") == 0:  # the likeliest token alone, as transformers has it
            given["top_p"] = 1e-9
        samples = config.get("do_sample")
        if ("temperature" in given if samples is None else samples) is False:
            given["temperature"] = 0.0
        else:
            given.setdefault("temperature", 1.0)
        return cls(**given)

    def override(self, **values: float | None) -> Sampling:
        """A copy with every value that is not None replaced."""
        return replace(self, **{k: v for k, v in values.items() if v is not None})  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


class Sampler:
    """Draws tokens one after another, remembering what it has seen.

    Args:
        seed: of `numpy.random.default_rng`; None takes fresh entropy.
        seen: ids that came before (the prompt): the repetition penalty applies to them.
        constraint: forbids tokens, and is told each that is drawn.
        processors: change logits after the penalties and the constraint.
    """

    def __init__(
        self,
        sampling: Sampling,
        seed: int | None,
        seen: Iterable[int] = (),
        constraint: Constraint | None = None,
        processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.sampling = sampling
        self._constraint = constraint
        self._processors = processors
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or seed < 0):
            raise ArgumentError(f"seed must be None or a whole number, 0 or more; got {seed!r}")
        self._rng = np.random.default_rng(seed)
        self._seen = dict.fromkeys(seen) if sampling.repetition_penalty != 1 else {}
        self._generated: dict[int, None] = {}

    @property
    def finished(self) -> bool:
        """Whether the constraint lets nothing follow."""
        return self._constraint is not None and self._constraint.finished

    def draw(
        self, logits: Floats, ids: Sequence[int] = (), left: int | None = None
    ) -> tuple[int, float]:
        """The next token's id and its log-probability under the model itself.

        Args:
            logits: float32 [vocab], left as they are. The log-probability is their log-softmax,
                before penalties and temperature.
            ids: those so far, for processors.
            left: how many tokens may still come, this one too, for the constraint.
        Raises:
            CheckpointError: logits are not finite.
            ArgumentError: a processor gives something else than logits, or leaves no token.
        """
        top = logits.max()
        # A NaN anywhere is the maximum, to numpy.
        if not math.isfinite(top):
            raise CheckpointError(
                "the model computed logits that are not finite numbers: the checkpoint is damaged, "
                "or was quantized from one that was; download or pack it again"
            )
        allowed = self._penalised(logits)
        if self._constraint is not None:
            allowed = self._constraint.mask(allowed, left)
        if self._processors:
            allowed = process(self._processors, ids, allowed.copy())
        token = self._pick(allowed)
        if self._constraint is not None:
            self._constraint.advance(token)
        self._generated[token] = None
        if self.sampling.repetition_penalty != 1:
            self._seen[token] = None
        return token, float(logits[token]) - _log_sum(logits)

    def _penalised(self, logits: Floats) -> Floats:
        penalty, presence = self.sampling.repetition_penalty, self.sampling.presence_penalty
        if (penalty == 1 or not self._seen) and (presence == 0 or not self._generated):
            return logits
        logits = logits.copy()
        if penalty != 1 and self._seen:
            ids = np.fromiter(self._seen, np.intp, len(self._seen))
            x = logits[ids]
            logits[ids] = np.where(x > 0, x / penalty, x * penalty)
        if presence != 0 and self._generated:
            logits[np.fromiter(self._generated, np.intp, len(self._generated))] -= presence
        return logits

    def _pick(self, logits: Floats) -> int:
        s = self.sampling
        if s.temperature == 0 or s.top_k == 1:
            return int(np.argmax(logits))
        # Relative to the largest, so that a low temperature overflows to probability 0 only.
        with np.errstate(over="ignore"):
            scores = (logits - logits.max()) / np.float32(max(s.temperature, 1e-30))
        ids, weights = _candidates(scores, max(int(s.top_k), 0), float(s.top_p))
        if s.min_p > 0:
            kept = weights >= s.min_p * weights.max()
            ids, weights = ids[kept], weights[kept]
        cumulative = np.cumsum(weights, dtype=np.float64)
        drawn = np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])


def likeliest(logits: Floats, n: int) -> tuple[tuple[int, float], ...]:
    """The n most probable ids with their log-probabilities, the most probable first."""
    total = _log_sum(logits)
    return tuple((int(i), float(logits[i]) - total) for i in largest(logits, n))


def _log_sum(logits: Floats) -> float:
    """The logarithm of the sum of exp(logits)."""
    top = logits.max()
    return float(top) + math.log(np.exp(logits - top).sum(dtype=np.float64))


def _candidates(scores: Floats, top_k: int, top_p: float) -> tuple[Ids, Floats]:
    """The ids that top_k and then top_p keep, and their unnormalised probabilities."""
    vocab = len(scores)
    if top_k == 0 and top_p == 1:
        return np.arange(vocab), np.exp(scores)
    if top_k > 0:
        ids = largest(scores, top_k)
        weights = np.exp(scores[ids])
        total = float(weights.sum(dtype=np.float64))
    else:
        # A nucleus rarely holds more than some hundreds of tokens: sort few, and more if need be.
        total = float(np.exp(scores).sum(dtype=np.float64))
        k = 256
        while True:
            ids = largest(scores, k)
            weights = np.exp(scores[ids])
            if len(ids) < k or float(weights.sum(dtype=np.float64)) >= top_p * total:
                break
            k *= 8
    if top_p < 1:
        before = np.cumsum(weights, dtype=np.float64) - weights
        kept = before < top_p * total
        kept[0] = True
        ids, weights = ids[kept], weights[kept]
    return ids, weights


def largest(scores: npt.NDArray[Any], k: int) -> Ids:
    """Indices of the k largest scores, largest first; of equal ones the lower index first.

    Those of minus infinity may be left out: a constraint has many.

    The k-th largest of the blocks' maxima is a lower bound of the k-th largest score, so that only
    few scores need be sorted: 20 times faster than `numpy.partition` at 248,320.
    """
    n = len(scores)
    if k >= n:
        ids = np.arange(n)
    else:
        width = max(1, min(256, n // (2 * k)))
        maxima = scores[: n - n % width].reshape(-1, width).max(axis=1)
        bound = np.partition(maxima, -k)[-k]
        ids = np.flatnonzero(scores >= bound if bound > -np.inf else scores > bound)
    return ids[np.argsort(-scores[ids], kind="stable")][:k]
