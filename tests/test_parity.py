"""The forward pass in float32 against what the libraries that define it gave.

tests/reference/test_parity.py runs the libraries themselves, over every row.
"""

from collections.abc import Callable
from pathlib import Path

import checkpoints
import golden
import pytest
from engines import TestEngine, random_ids, spread

BOUND = 2e-3  # of the logits' standard deviation
GetCheckpoint = Callable[[str], Path]
THEIRS = golden.arrays("logits")


def vocab(name: str) -> int:
    return int(checkpoints.text_config(name)["vocab_size"])


@pytest.mark.parametrize("name", [*checkpoints.PARITY, "heads-of-48"])
def test_logits_equal_those_of_transformers(name: str, checkpoint: GetCheckpoint) -> None:
    engine = TestEngine(checkpoint(name))
    ids = random_ids(vocab(name), 300)
    for length in (1, 63, 64, 65, 300):
        rows = golden.ROWS[length > golden.ROWS]
        ours = engine.logits(ids[:length])[rows]
        assert spread(ours, THEIRS[name][: len(rows)]) <= BOUND, f"prompt of {length}"


@pytest.mark.parametrize("name", checkpoints.PARITY)
def test_greedy_tokens_equal_those_of_transformers(name: str, checkpoint: GetCheckpoint) -> None:
    prompt = random_ids(vocab(name), 20, seed=2)
    expected = THEIRS[f"{name} greedy"].tolist()
    assert TestEngine(checkpoint(name)).greedy(prompt, len(expected)) == expected


@pytest.mark.parametrize("name", checkpoints.PARITY)
def test_prompts_equal_token_by_token(name: str, checkpoint: GetCheckpoint) -> None:
    engine = TestEngine(checkpoint(name))
    ids = random_ids(vocab(name), 130)
    assert spread(engine.logits(ids), engine.stepwise(ids)) <= BOUND


@pytest.mark.parametrize("name", [*checkpoints.FORMS, *checkpoints.MLX])
def test_stored_forms_equal_the_library_whose_they_are(
    name: str, checkpoint: GetCheckpoint
) -> None:
    rows = golden.ROWS[golden.ROWS < golden.SHORT]
    ours = TestEngine(checkpoint(name)).logits(random_ids(vocab(name), golden.SHORT))[rows]
    assert spread(ours, THEIRS[checkpoints.twin(name)][: len(rows)]) <= BOUND


def test_fewer_experts_take_the_top_of_the_same_softmax(checkpoint: GetCheckpoint) -> None:
    theirs = THEIRS["base, 2 experts"]
    engine = TestEngine(checkpoint("base"), experts_per_token=2)
    ours = engine.logits(random_ids(vocab("base"), golden.SHORT))[golden.ROWS[: len(theirs)]]
    assert spread(ours, theirs) <= BOUND


def test_every_variant_is_compared() -> None:
    for name in checkpoints.VARIANTS:
        assert THEIRS[checkpoints.twin(name)].shape[1] == vocab(name)
