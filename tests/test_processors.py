"""Logits processors and constraints: what they see, and what comes of it."""

from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeEngine, hashed, install, make_directory

import flashmoe
from flashmoe.generate.sampling import Sampler, Sampling, likeliest


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    return install(monkeypatch)


@pytest.fixture
def model(engine: FakeEngine, tmp_path: Path) -> flashmoe.Model:
    return flashmoe.Model(make_directory(tmp_path / "model"))


def test_a_processor_sees_all_ids_and_the_models_logits_and_decides(model) -> None:
    seen = []

    def forbid_the_likeliest(ids, logits):
        seen.append(list(ids))
        assert np.array_equal(logits, hashed(seen[-1]))
        logits[np.argmax(logits)] = -np.inf
        return logits

    tokens = list(
        model.generate([1, 2], max_tokens=4, temperature=0, processors=[forbid_the_likeliest])
    )
    expected = [1, 2]
    for token in tokens:
        logits = hashed(expected).astype(np.float64)
        assert token.id == np.argsort(-logits)[1]
        # The logprob is the model's own.
        assert token.logprob == pytest.approx(
            logits[token.id] - np.log(np.exp(logits).sum()), abs=1e-4
        )
        expected.append(token.id)
    assert seen == [expected[:n] for n in range(2, 6)]


def test_processors_run_in_their_order_behind_penalties_and_the_constraint() -> None:
    order = []

    class Allow:
        finished = False

        def mask(self, logits):
            order.append(("mask", float(logits[3])))
            masked = np.full_like(logits, -np.inf)
            masked[[2, 3]] = logits[[2, 3]]
            return masked

        def advance(self, token):
            order.append(("advance", token))

    def first(ids, logits):
        order.append(("first", float(logits[3]), float(logits[0])))
        return logits + 1

    def second(ids, logits):
        order.append(("second", float(logits[3])))
        return logits

    logits = np.array([9, 0, 1, 8], np.float32)
    sampling = Sampling(repetition_penalty=4)
    sampler = Sampler(sampling, None, [3], Allow(), [first, second])
    assert sampler.draw(logits, [3])[0] == 3
    assert order == [("mask", 2.0), ("first", 2.0, -np.inf), ("second", 3.0), ("advance", 3)]
    assert logits.tolist() == [9, 0, 1, 8]


def test_a_constraint_that_is_complete_ends_the_answer(monkeypatch, tmp_path) -> None:
    class Two:
        def __init__(self) -> None:
            self.drawn = 0

        @property
        def finished(self) -> bool:
            return self.drawn == 2

        def mask(self, logits):
            return logits

        def advance(self, token) -> None:
            self.drawn += 1

    sampler = Sampler(Sampling(), None, (), Two())
    logits = np.zeros(4, np.float32)
    assert not sampler.finished
    sampler.draw(logits)
    assert not sampler.finished
    sampler.draw(logits)
    assert sampler.finished


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (lambda ids, logits: None, r"gave NoneType, expected an array \[512\]"),
        (lambda ids, logits: logits[:5], r"gave \(5,\), expected an array \[512\]"),
        (lambda ids, logits: np.full_like(logits, -np.inf), "whose largest is -inf"),
        (lambda ids, logits: logits * np.nan, "whose largest is nan"),
    ],
)
def test_what_is_no_logits_is_refused(model, processor, message) -> None:
    with pytest.raises(flashmoe.ArgumentError, match=message):
        list(model.generate([1], max_tokens=1, processors=[processor]))


def test_alternatives_are_the_likeliest_with_their_logprobs(model) -> None:
    token = next(model.generate([1], temperature=0, logprobs=3))
    logits = hashed([1]).astype(np.float64)
    order = np.argsort(-logits)[:3]
    logprobs = logits[order] - np.log(np.exp(logits).sum())
    assert [i for i, _ in token.alternatives] == order.tolist()
    assert [p for _, p in token.alternatives] == pytest.approx(logprobs.tolist(), abs=1e-4)
    assert token.alternatives[0] == (token.id, token.logprob)
    assert next(model.generate([1])).alternatives == ()
    assert len(likeliest(np.zeros(4, np.float32), 9)) == 4
    with pytest.raises(flashmoe.ArgumentError, match="logprobs must be"):
        model.generate([1], logprobs=-1)
