"""Sampling against transformers' logits processors, and against the distribution it must draw."""

import itertools

import golden
import numpy as np
import pytest

import flashmoe
from flashmoe.generate.sampling import Sampler, Sampling, largest

VOCAB = 997

CASES = {
    "temperature 1": Sampling(temperature=1.0),
    "temperature 0.6": Sampling(temperature=0.6),
    "top-k 20": Sampling(temperature=1.7, top_k=20),
    "top-k past the vocabulary": Sampling(temperature=1.0, top_k=1000),
    "top-p 0.9": Sampling(temperature=0.8, top_p=0.9),
    "top-p 0.99, hot": Sampling(temperature=3.0, top_p=0.99),
    "top-p of one token": Sampling(temperature=0.7, top_p=1e-6),
    "min-p 0.1": Sampling(temperature=1.0, min_p=0.1),
    "min-p 1": Sampling(temperature=1.0, min_p=1.0),
    "all filters": Sampling(temperature=0.6, top_k=20, top_p=0.95, min_p=0.02),
    "repetition penalty 1.3": Sampling(temperature=1.0, repetition_penalty=1.3),
    "repetition penalty 0.7 and filters": Sampling(
        temperature=1.0, repetition_penalty=0.7, top_k=50, top_p=0.8
    ),
}
FEW = Sampling(temperature=1.2, top_k=12, top_p=0.97)


def random_logits(seed: int, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2.5, vocab).astype(np.float32)


def case_inputs() -> tuple[np.ndarray, list[int]]:
    """Logits, and a prompt of some of the likely tokens."""
    logits = random_logits(1)
    return logits, [int(i) for i in np.argsort(-logits)[:40:2]]


def few_logits() -> np.ndarray:
    return random_logits(2, 50)


class _Sweep:
    """A generator of evenly spread "random" numbers: drawing with all of them shows the weights."""

    def __init__(self, points: int) -> None:
        self._numbers = itertools.cycle((np.arange(points) + 0.5) / points)

    def random(self) -> float:
        return float(next(self._numbers))


def _drawn(logits: np.ndarray, sampling: Sampling, prompt: list[int], points: int) -> np.ndarray:
    sampler = Sampler(sampling, 0, seen=prompt)
    sampler._rng = _Sweep(points)  # type: ignore[assignment]
    ids = [sampler._pick(sampler._penalised(logits)) for _ in range(points)]
    return np.bincount(ids, minlength=len(logits)) / points


@pytest.mark.parametrize("case", CASES)
def test_probabilities_are_those_of_transformers(case: str) -> None:
    logits, prompt = case_inputs()
    expected = golden.arrays("sampling")[case]
    points = 20_000
    drawn = _drawn(logits, CASES[case], prompt, points)
    assert set(np.flatnonzero(drawn)) <= set(np.flatnonzero(expected))
    assert np.abs(drawn - expected).max() <= 1.5 / points


def test_presence_penalty_lowers_what_was_generated_and_not_the_prompt() -> None:
    logits = np.zeros(4, np.float32)
    sampler = Sampler(Sampling(presence_penalty=1.0), None, seen=[0])
    assert [sampler.draw(logits)[0] for _ in range(5)] == [0, 1, 2, 3, 0]


def test_repetition_penalty_counts_prompt_and_answer() -> None:
    logits = np.array([1.0, 1.0, 0.9, -1.0], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), None, seen=[0])
    assert [sampler.draw(logits)[0] for _ in range(3)] == [1, 2, 0]


def test_repetition_penalty_makes_the_unlikely_less_likely_too() -> None:
    logits = np.array([-1.0, -1.5], np.float32)
    sampler = Sampler(Sampling(repetition_penalty=2.0), None, seen=[0])
    assert sampler.draw(logits)[0] == 1


def test_draws_follow_the_distribution() -> None:
    logits = few_logits()
    expected = golden.arrays("sampling")["few"]
    sampler = Sampler(FEW, seed=7)
    n = 20_000
    counts = np.bincount([sampler.draw(logits)[0] for _ in range(n)], minlength=50)
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_squared = ((counts - n * expected)[kept] ** 2 / (n * expected[kept])).sum()
    # The 99.9th percentile of chi squared with 10 degrees of freedom.
    assert kept.sum() == 11
    assert chi_squared < 29.6


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = np.array([0.0, 3.0, 1.0, 3.0, 3.0], np.float32)
    assert Sampler(Sampling(temperature=0), None).draw(logits)[0] == 1


def test_a_seed_fixes_the_tokens_and_none_does_not() -> None:
    logits = random_logits(3)
    sampling = Sampling(temperature=1.5)

    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(sampling, seed)
        return [sampler.draw(logits)[0] for _ in range(20)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_logprob_is_the_log_softmax_of_the_logits_themselves() -> None:
    logits = random_logits(4)
    token, logprob = Sampler(Sampling(temperature=0.3, repetition_penalty=1.5), 1, [3]).draw(logits)
    wide = logits.astype(np.float64)
    assert logprob == pytest.approx(wide[token] - np.log(np.exp(wide).sum()), abs=1e-5)


def test_logits_are_left_as_they_are() -> None:
    logits = random_logits(5)
    before = logits.copy()
    Sampler(Sampling(1.0, 5, 0.9, 0.1, 1.2, 0.5), 0, seen=[1, 2]).draw(logits)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize("k", [1, 2, 20, 333, 996, 997, 5000])
@pytest.mark.parametrize("levels", [3, 100_000])
def test_largest_orders_by_score_then_index(k: int, levels: int) -> None:
    scores = np.random.default_rng(k).integers(0, levels, VOCAB).astype(np.float32)
    expected = sorted(range(VOCAB), key=lambda i: (-scores[i], i))[:k]
    assert largest(scores, k).tolist() == expected


def test_a_tiny_temperature_is_greedy_without_overflow() -> None:
    logits = random_logits(6)
    assert Sampler(Sampling(temperature=1e-30), 0).draw(logits)[0] == int(logits.argmax())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    logits = random_logits(7)
    logits[10] = bad
    with pytest.raises(flashmoe.CheckpointError, match="not finite"):
        Sampler(Sampling(temperature=1.0), 0).draw(logits)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": 10**400},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_k": -2},
        {"top_k": 1.5},
        {"top_k": float("inf")},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 1e-300},
        {"presence_penalty": float("inf")},
    ],
    ids=str,
)
def test_a_bad_value_is_named(values: dict[str, float]) -> None:
    (name,) = values
    with pytest.raises(flashmoe.ArgumentError, match=name):
        Sampling(**values)


@pytest.mark.parametrize("seed", [-1, 1.0, "1", True])
def test_a_bad_seed_is_refused(seed: object) -> None:
    with pytest.raises(flashmoe.ArgumentError, match="seed"):
        Sampler(Sampling(), seed)  # type: ignore[arg-type]


def test_defaults_come_from_the_generation_config() -> None:
    published = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "eos_token_id": 1,
    }
    sampling = Sampling.from_generation_config(published)
    assert sampling == Sampling(temperature=0.6, top_k=20, top_p=0.95)
    assert sampling.override(temperature=0, top_k=None).temperature == 0
    assert Sampling.from_generation_config({}).temperature == 0
    assert Sampling.from_generation_config({"do_sample": True}).temperature == 1
    assert (
        Sampling.from_generation_config({"do_sample": False, "temperature": 1.0}).temperature == 0
    )
