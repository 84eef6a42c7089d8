"""A native engine on a checkpoint, without tokenizer or sampling: what parity tests compare."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

import flashmoe
from flashmoe import _native
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.generate.engine import kernel_sources

DEMO = Path(flashmoe.__file__).parent / "demo_model"
Logits = npt.NDArray[np.float32]


class TestEngine:
    """precision "float32" and the model's own experts per token unless told otherwise."""

    __test__ = False

    def __init__(
        self,
        directory: Path,
        *,
        experts_per_token: int | None = None,
        precision: str = "float32",
        threads: int = 2,
        cache_bytes: int = 0,
        chunk: int = 64,
        backend: str = "cpu",
        overlap: bool = False,
        kernels: Path | None = None,
    ) -> None:
        checkpoint = Checkpoint.open(directory)
        self.native = _native.Engine(
            checkpoint.native_config(experts_per_token or checkpoint.config.num_experts_per_tok),
            checkpoint.native,
            backend=backend,
            precision=precision,
            threads=threads,
            cache_bytes=cache_bytes,
            chunk=chunk,
            kernels=str(kernels or kernel_sources()),
            overlap=overlap,
        )

    def logits(self, ids: npt.ArrayLike, state: _native.State | None = None) -> Logits:
        """float32 [len(ids), vocab], ids taken in at once."""
        return self.native.forward(
            state or self.native.new_state(), np.asarray(ids, np.int32), all_logits=True
        )

    def stepwise(self, ids: npt.ArrayLike) -> Logits:
        """The same, a token at a time."""
        state = self.native.new_state()
        steps = [self.native.forward(state, np.array([i], np.int32)) for i in np.asarray(ids)]
        return np.stack(steps)

    def greedy(self, prompt: npt.ArrayLike, count: int) -> list[int]:
        """`count` ids after the prompt, each the likeliest."""
        state = self.native.new_state()
        last = self.native.forward(state, np.asarray(prompt, np.int32))
        ids = []
        for _ in range(count):
            ids.append(int(last.argmax()))
            last = self.native.forward(state, np.array(ids[-1:], np.int32))
        return ids


def spread(ours: Logits, theirs: Logits) -> float:
    """Largest difference as a share of the standard deviation of theirs."""
    return float(np.abs(ours - theirs).max() / theirs.std())


def random_ids(vocab: int, count: int, seed: int = 1) -> npt.NDArray[np.int32]:
    return np.random.default_rng(seed).integers(3, vocab, count).astype(np.int32)
