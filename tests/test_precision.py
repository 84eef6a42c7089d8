"""What 8-bit activations cost against float32, measured on a model with 4-bit weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import Logits, TestEngine, random_ids


def log_softmax(logits: Logits) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("name", ["mlx-2", "mlx-4", "mlx-8"])
def test_int8_stays_close_to_float32(
    name: str, checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    ids = random_ids(300, 300)
    exact = log_softmax(TestEngine(checkpoint(name)).logits(ids))
    fast = log_softmax(TestEngine(checkpoint(name), precision="int8").logits(ids))
    kl = float((np.exp(exact) * (exact - fast)).sum(axis=1).mean())
    agreement = float((exact.argmax(axis=1) == fast.argmax(axis=1)).mean())
    with capsys.disabled():
        print(f"\n{name}: KL {kl:.2e} nats a token, greedy agreement {agreement:.1%}")
    # Logits of these models are flat: half of a unit apart is common. A wrong scale, sign or group
    # lifts KL above 0.1, one wrong lane in a row above 0.02.
    assert kl < 1.2e-2
    assert agreement > 0.88
