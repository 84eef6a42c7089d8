"""The forward pass in float32 against the libraries that define it: transformers and mlx-lm."""

from collections.abc import Callable
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from engines import TestEngine, random_ids, spread
from libraries import mlx_logits, transformers_logits, transformers_model

BOUND = 2e-3  # of the logits' standard deviation
GetCheckpoint = Callable[[str], Path]


@pytest.mark.parametrize("name", [*checkpoints.PARITY, "heads-of-48"])
def test_logits_equal_transformers(name: str, checkpoint: GetCheckpoint) -> None:
    model = transformers_model(name)
    engine = TestEngine(checkpoint(name))
    ids = random_ids(model.config.vocab_size, 300)
    for length in (1, 63, 64, 65, 300):
        theirs = transformers_logits(model, ids[:length])
        assert spread(engine.logits(ids[:length]), theirs) <= BOUND, f"prompt of {length}"


@pytest.mark.parametrize("name", checkpoints.PARITY)
def test_greedy_tokens_equal_transformers(name: str, checkpoint: GetCheckpoint) -> None:
    model = transformers_model(name)
    prompt = random_ids(model.config.vocab_size, 20, seed=2)
    ours = TestEngine(checkpoint(name)).greedy(prompt, 64)
    # transformers would decode as we did if each of our tokens is its likeliest after those before.
    ids = np.concatenate([prompt, np.array(ours[:-1], np.int32)])
    assert ours == transformers_logits(model, ids)[len(prompt) - 1 :].argmax(axis=1).tolist()


@pytest.mark.parametrize("name", checkpoints.FORMS)
def test_stored_forms_equal_transformers(name: str, checkpoint: GetCheckpoint) -> None:
    model = transformers_model(name)
    ids = random_ids(model.config.vocab_size, 70)
    theirs = transformers_logits(model, ids)
    assert spread(TestEngine(checkpoint(name)).logits(ids), theirs) <= BOUND


def test_fewer_experts_take_the_top_of_the_same_softmax(checkpoint: GetCheckpoint) -> None:
    model = transformers_model("base")
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 2
    ids = random_ids(model.config.vocab_size, 70)
    engine = TestEngine(checkpoint("base"), experts_per_token=2)
    assert spread(engine.logits(ids), transformers_logits(model, ids)) <= BOUND


@pytest.mark.parametrize("name", checkpoints.MLX)
def test_logits_equal_mlx_lm(name: str, checkpoint: GetCheckpoint) -> None:
    directory = checkpoint(name)
    engine = TestEngine(directory)
    ids = random_ids(engine.logits([0]).shape[1], 70)
    assert spread(engine.logits(ids), mlx_logits(directory, ids)) <= BOUND
