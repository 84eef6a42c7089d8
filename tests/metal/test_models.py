"""Whole models on the simulated GPU against the CPU in float32: prompts, decode, greedy tokens."""

from collections.abc import Callable
from pathlib import Path

import checkpoints
import pytest
from engines import TestEngine, random_ids, spread
from metal_simulator import Simulator

import flashmoe
from flashmoe.pack.pack import pack

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


TAKEN = """\
import sys
from pathlib import Path
from engines import TestEngine
from flashmoe.checkpoint.open import Checkpoint

for cache in (0, 1 << 30):
    checkpoint = Checkpoint.open(sys.argv[1])
    experts = checkpoint.config.num_experts_per_tok
    needs = checkpoint.needs(experts, backend="metal", cache_bytes=cache, chunk=64)
    engine = TestEngine(Path(sys.argv[1]), backend="metal", cache_bytes=cache)
    stats = engine.native.stats()
    taken = [int(stats[name + "_bytes"]) for name in ("resident", "slot", "activation")]
    assert [needs["resident"], needs["slots"], needs["activations"]] == taken, (needs, taken)
    print(needs["mapped"])
"""


@pytest.mark.parametrize("packed", [False, True])
def test_it_takes_what_the_native_core_says(
    packed: bool, simulator: Simulator, tmp_path: Path
) -> None:
    model = Path(flashmoe.__file__).parent / "demo_model"
    if packed:
        model = pack(model, tmp_path / "pack").destination
    mapped = simulator.python(TAKEN, str(model)).split()
    # Weights of a pack lie where a GPU can use them, those of the demo at odd offsets.
    assert all((int(nbytes) > 1_000_000) == packed for nbytes in mapped)
