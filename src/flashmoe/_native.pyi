"""The native core: what Python hands over, and what it gets back."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Extents = npt.NDArray[np.int64]
"""int64 [m, 3]: index of the file, offset in bytes, length in bytes."""

class Format:
    """A matrix's shape [rows, cols] and element type; bits 0 is dense, else affine-quantised.

    dtype is "F32", "F16" or "BF16": of the elements, or of scales and biases where quantised.
    """

    def __init__(
        self, rows: int, cols: int, dtype: str, bits: int = 0, group: int = 0
    ) -> None: ...

class Checkpoint:
    """Where every weight lies. Names are those of `docs/checkpoints.md`."""

    def __init__(self, files: Sequence[str]) -> None: ...
    def add_matrix(self, name: str, format: Format, parts: Sequence[Extents]) -> None:
        """Each part (weight[, scales, biases]) is the concatenation of its extents."""
    def add_vector(
        self, name: str, length: int, dtype: str, extents: Extents, plus_one: bool = False
    ) -> None: ...
    def add_experts(self, gate: Format, up: Format, down: Format, extents: Extents) -> None:
        """The next layer's experts; extents is [experts * parts, 3], parts in the order gate
        weight [scales biases], up …, down …."""

class State:
    """Everything a sequence carries: KV caches, convolution and recurrent states."""

    @property
    def position(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def fork(self) -> State: ...
    def export(self) -> dict[str, npt.NDArray[Any]]:
        """Copies: `layers.N.keys`, `.values` [kv_heads, position, head_dim] (float32, or uint16
        holding bfloat16), `.conv` [kernel - 1, channels], `.recurrent` [heads, Dk, Dv]."""
    def restore(self, position: int, tensors: dict[str, npt.NDArray[Any]]) -> None: ...

class Engine:
    """A loaded model. One call at a time; a second thread gets StateError."""

    def __init__(
        self,
        config: dict[str, Any],
        checkpoint: Checkpoint,
        *,
        precision: str,
        threads: int,
        cache_bytes: int,
        chunk: int,
    ) -> None: ...
    def new_state(self) -> State: ...
    def forward(
        self, state: State, ids: npt.NDArray[np.int32], all_logits: bool = False
    ) -> npt.NDArray[np.float32]:
        """Appends ids to state; float32 logits [vocab] of the last one, or [len(ids), vocab].

        On any exception state is as before. Raises ReadError, StateError, KeyboardInterrupt.
        """
    def stats(self) -> dict[str, float]: ...
    def close(self) -> None: ...

def cpu_kernels() -> str:
    """The kernels picked on this machine: "portable", "avx2", "avx512" or "neon"."""

def quantize(
    weight: npt.NDArray[Any], dtype: str, bits: int, group: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[Any], npt.NDArray[Any]]: ...
def dequantize(
    words: npt.NDArray[np.uint32],
    scales: npt.NDArray[Any],
    biases: npt.NDArray[Any],
    dtype: str,
    bits: int,
    group: int,
) -> npt.NDArray[np.float32]: ...
