"""The native core: what Python hands over, and what it gets back."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, overload

import numpy as np
import numpy.typing as npt

Extents = npt.NDArray[np.int64]
"""int64 [m, 3]: index of the file, offset in bytes, length in bytes."""

class Format:
    """A matrix's shape [rows, cols] and element type; bits 0 is dense, else affine-quantized.

    dtype is "F32", "F16" or "BF16": of the elements, or of scales and biases where quantized.
    """

    def __init__(self, rows: int, cols: int, dtype: str, bits: int = 0, group: int = 0) -> None: ...

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
    def needs(
        self,
        config: dict[str, Any],
        *,
        backend: str = "cpu",
        precision: str = "int8",
        threads: int = 1,
        cache_bytes: int = 0,
        chunk: int = 256,
        context: int = 0,
    ) -> Needs:
        """What an Engine would take, said by the code that allocates it. No weight is read; the
        files need not be here. Raises CheckpointError where the table lacks a weight."""

class Needs(TypedDict):
    """Bytes; those that an open engine reports too are the same there."""

    resident: int
    """Weights that every token needs."""
    mapped: int
    """Of them, those that are pages of their files and not copies."""
    slots: int
    """Memory for experts in this setting."""
    all_slots: int
    """With a cache that holds every expert."""
    slot: int
    """One expert in such a cache."""
    activations: int
    """What a pass of a whole chunk computes in."""
    recurrent: int
    """Convolution and recurrent states of a sequence; an engine has one set more of its own."""
    token: int
    """Keys and values of one token."""
    state: int
    """A sequence of `context` tokens that came a chunk at a time: its caches have room for more."""
    scratch: int
    """What the CPU's operations work in when a chunk ends at `context`, at most. An engine that has
    seen longer and longer calls may hold half as much again. 0 where a GPU computes."""

class State:
    """Everything a sequence carries: KV caches, convolution and recurrent states."""

    @property
    def position(self) -> int: ...
    @property
    def nbytes(self) -> int:
        """Bytes held, those of shared keys and values too."""
    @property
    def shared(self) -> tuple[int, int]:
        """The keys and values that forks share: what tells them from others, and their bytes."""
    @property
    def logits(self) -> npt.NDArray[np.float32] | None:
        """What the latest forward() predicts: float32 [vocab], read-only; None before the first."""
    def fork(self) -> State:
        """A copy that shares keys and values until one of both writes behind the other's end.

        It waits for no turn; StateError where the state is in use at this moment."""
    def export(self) -> dict[str, npt.NDArray[Any]]:
        """Copies: `layers.N.keys`, `.values` [kv_heads, position, head_dim] (float32, or uint16
        holding bfloat16), `.conv` [kernel - 1, channels], `.recurrent` [heads, Dk, Dv]. And
        `logits`, which is none of the forward pass's own, where there are any."""
    def restore(self, position: int, tensors: dict[str, npt.NDArray[Any]]) -> None:
        """What export() gave, into a fresh state. ValueError for any other shape or dtype."""

class Request:
    """Who wants passes. Once a thread has cancelled it they raise StoppedError within a layer."""

    def cancel(self) -> None: ...
    @property
    def cancelled(self) -> bool: ...
    @property
    def seconds(self) -> float:
        """What its latest pass took, without the wait for its turn."""

class Engine:
    """A loaded model. Threads that use it and its states take turns, in the order they asked;
    only `State.fork` waits for none.

    A call waits for its turn without the GIL. From a signal handler that interrupts another call
    of its thread it would wait for ever, and raises StateError instead.

    config holds ModelConfig's fields and `experts_per_token`, the number in force. progress is
    called with (bytes read, bytes in all) while weights are loaded. kernels is the directory of a
    GPU's kernels; with overlap it computes experts beside the reads of others. may_grow is asked
    whether the cache of experts may take so many bytes more, until it says no. Raises ReadError,
    CheckpointError (a weight is infinite or NaN), DeviceError, KeyboardInterrupt.
    """

    def __init__(
        self,
        config: dict[str, Any],
        checkpoint: Checkpoint,
        *,
        backend: str = "cpu",
        precision: str = "int8",
        threads: int = 1,
        cache_bytes: int = 0,
        chunk: int = 256,
        kernels: str = "",
        overlap: bool = False,
        may_grow: Callable[[int], bool] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None: ...
    @property
    def backend(self) -> str: ...
    def new_state(self) -> State: ...
    def state_layout(self, position: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What export() of a state of so many tokens holds: dtype, as safetensors names it, and
        shape by name."""
    @overload
    def forward(
        self,
        state: State,
        ids: npt.NDArray[np.int32],
        all_logits: bool = False,
        routing: Literal[False] = False,
        request: Request | None = None,
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def forward(
        self,
        state: State,
        ids: npt.NDArray[np.int32],
        all_logits: bool = False,
        *,
        routing: Literal[True],
        request: Request | None = None,
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Appends ids to state; float32 logits [vocab] of the last one, or [len(ids), vocab].

        With routing, also int32 [len(ids), layers, experts_per_token]: each token's experts, the
        likeliest first.

        ids go through in chunks of `chunk`. After an exception (ReadError, CheckpointError,
        StateError, DeviceError, StoppedError, KeyboardInterrupt) state is as it was before the
        chunk that failed.
        """
    def stats(self) -> dict[str, float]:
        """reads, bytes_read, bytes_cached (of them in the page cache; -1 where the system cannot
        tell), read_seconds (summed over reads, which overlap), wait_seconds, expert_hits,
        expert_misses, rows (passed to Forward), forward_seconds, head_seconds, busy_seconds
        (of all threads together), resident_bytes, slot_bytes, activation_bytes,
        scratch_bytes (what operations work in)."""
    def layer_times(self) -> list[dict[str, float]]:
        """Seconds so far in each layer, as the host saw them: mixer, router (with the norm before
        it), wait (for experts), experts (the shared one too) and combine (with the norm that the
        next layer begins with)."""
    def close(self) -> None: ...

def backends() -> list[str]:
    """Those of this build: "cpu", and "metal" on macOS."""

def cpu_kernels() -> str:
    """The kernels picked on this machine: "portable", "avx2", "avx-vnni", "avx512", "avx512-bf16",
    "neon", "neon-dotprod" or "neon-i8mm"."""

def quantize(
    weight: npt.NDArray[Any], dtype: str, bits: int, group: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[Any], npt.NDArray[Any]]:
    """MLX's affine quantizer: words [..., cols * bits / 32], scales and biases [..., cols / group].

    weight [..., cols] is float32, float16 or uint16 (holding bfloat16); dtype ("F32", "F16" or
    "BF16") is that of the scales and biases returned, in the same numpy types. Bits are 2, 4 or 8,
    a group is 32, 64 or 128. Raises ValueError for other arguments, and for weights that are not
    finite, naming the row. The GIL is free: call it from several threads.
    """

def dequantize(
    words: npt.NDArray[np.uint32],
    scales: npt.NDArray[Any],
    biases: npt.NDArray[Any],
    bits: int,
    group: int,
) -> npt.NDArray[np.float32]:
    """word · scale + bias, computed in float32; the inverse of quantize's layout."""

ops: Any
"""A backend's operations on numpy arrays: for tests, benchmarks and `flashmoe doctor`."""
GpuPlans: Any
"""What a GPU is asked to run, planned and not run: for tests, benchmarks and `flashmoe doctor`."""
