"""The forward pass in float32 against the libraries that define it: transformers and mlx-lm."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import Logits, TestEngine, random_ids, spread

pytestmark = pytest.mark.reference
torch = pytest.importorskip("torch")

import checkpoints  # noqa: E402  (it imports torch and transformers)

BOUND = 2e-3  # of the logits' standard deviation
GetCheckpoint = Callable[[str], Path]


def their_logits(model: torch.nn.Module, ids: np.ndarray) -> Logits:
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()


@pytest.mark.parametrize("name", checkpoints.PARITY)
def test_logits_equal_transformers(name: str, checkpoint: GetCheckpoint) -> None:
    model = checkpoints.reference(name)
    engine = TestEngine(checkpoint(name))
    ids = random_ids(model.config.vocab_size, 300)
    for length in (1, 63, 64, 65, 300):
        theirs = their_logits(model, ids[:length])
        assert spread(engine.logits(ids[:length]), theirs) <= BOUND, f"prompt of {length}"


@pytest.mark.parametrize("name", checkpoints.PARITY)
def test_greedy_tokens_equal_transformers(name: str, checkpoint: GetCheckpoint) -> None:
    model = checkpoints.reference(name)
    prompt = random_ids(model.config.vocab_size, 20, seed=2)
    ours = TestEngine(checkpoint(name)).greedy(prompt, 64)
    # transformers would decode as we did if each of our tokens is its likeliest after those before.
    theirs = their_logits(model, np.concatenate([prompt, np.array(ours[:-1], np.int32)]))
    assert ours == theirs[len(prompt) - 1 :].argmax(axis=1).tolist()


@pytest.mark.parametrize("name", checkpoints.PARITY)
def test_prompts_equal_token_by_token(name: str, checkpoint: GetCheckpoint) -> None:
    engine = TestEngine(checkpoint(name))
    ids = random_ids(engine.logits([0]).shape[1], 130)
    assert spread(engine.logits(ids), engine.stepwise(ids)) <= BOUND


@pytest.mark.parametrize(
    "name", ["bf16", "f16", "fused", "nested", "nested-bf16-sharded", "sharded"]
)
def test_stored_forms_equal_transformers(name: str, checkpoint: GetCheckpoint) -> None:
    model = checkpoints.reference(name)
    ids = random_ids(model.config.vocab_size, 70)
    assert spread(TestEngine(checkpoint(name)).logits(ids), their_logits(model, ids)) <= BOUND


def test_fewer_experts_take_the_top_of_the_same_softmax(checkpoint: GetCheckpoint) -> None:
    model = checkpoints.reference("base")
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 2
    ids = random_ids(model.config.vocab_size, 70)
    engine = TestEngine(checkpoint("base"), experts_per_token=2)
    assert spread(engine.logits(ids), their_logits(model, ids)) <= BOUND


MLX = [name for name in checkpoints.VARIANTS if name.startswith("mlx-")]


def mlx_logits(directory: Path, ids: np.ndarray) -> Logits:
    """mlx-lm's forward pass over its own conversion, dequantised, in float32."""
    import mlx.core as mx  # noqa: PLC0415
    from mlx.utils import tree_map  # noqa: PLC0415
    from mlx_lm import utils  # noqa: PLC0415

    model, config = utils.load_model(directory)
    # In float32 before it dequantises: in bfloat16 each weight would be rounded to 8 bits again.
    model.update(
        tree_map(
            lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
            model.parameters(),
        )
    )
    if "quantization" in config:
        model = utils.dequantize_model(model)
    return np.array(model(mx.array(ids[None])).astype(mx.float32))[0]


@pytest.mark.parametrize("name", MLX)
def test_logits_equal_mlx_lm(name: str, checkpoint: GetCheckpoint) -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    directory = checkpoint(name)
    engine = TestEngine(directory)
    ids = random_ids(engine.logits([0]).shape[1], 70)
    assert spread(engine.logits(ids), mlx_logits(directory, ids)) <= BOUND
