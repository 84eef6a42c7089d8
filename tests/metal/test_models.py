"""Whole models on the simulated GPU against the CPU in float32: prompts, decode, greedy tokens."""

from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
from engines import TestEngine, random_ids, spread
from metal_simulator import Simulator

BOUND = 2e-3  # of the logits' standard deviation
GetCheckpoint = Callable[[str], Path]
VARIANTS = [*checkpoints.PARITY, "bf16", "f16", "nested-bf16-sharded", *checkpoints.MLX]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_greedy_tokens_equal_the_cpu(
    name: str, simulator: Simulator, checkpoint: GetCheckpoint
) -> None:
    directory = checkpoint(name)
    engine = TestEngine(directory)
    prompt = random_ids(engine.logits([0]).shape[1], 70)
    ids = [*prompt.tolist(), *engine.greedy(prompt, 12)]
    # In chunks of 64 (matrix-matrix) and 6, then a token at a time (matrix-vector).
    theirs = engine.logits(ids)
    ours = simulator.logits(directory, ids, one_by_one=12)
    assert spread(ours, theirs) <= BOUND
    assert (ours[len(prompt) - 1 :].argmax(1) == theirs[len(prompt) - 1 :].argmax(1)).all()
