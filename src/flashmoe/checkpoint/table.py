"""Where a weight lies: its format, and the extents that hold it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Extents = npt.NDArray[np.int64]
"""int64 [m, 3]: index into Checkpoint.files, offset in bytes, length in bytes."""

FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Bytes of an element, for the dtypes that dense weights, scales and biases may have."""


@dataclass(frozen=True)
class Format:
    """A matrix of rows (outputs) x cols: dense where bits is 0, else affine-quantized.

    dtype is a key of FLOAT_BYTES: of the elements, or of scales and biases where quantized.
    """

    rows: int
    cols: int
    dtype: str
    bits: int = 0
    group: int = 0

    @property
    def parts(self) -> int:
        """1 (the weight), or 3 where quantized: weight, scales, biases."""
        return 3 if self.bits else 1

    def part_bytes(self, part: int) -> int:
        """Bytes of the weight (part 0), the scales (1) or the biases (2)."""
        cells = self.rows * self.cols
        if part:
            return cells // self.group * FLOAT_BYTES[self.dtype]
        return cells * self.bits // 8 if self.bits else cells * FLOAT_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(self.part_bytes(part) for part in range(self.parts))


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A matrix whose parts (weight[, scales, biases]) are each the concatenation of extents."""

    format: Format
    parts: tuple[Extents, ...]


@dataclass(frozen=True, eq=False)
class StoredVector:
    """A dense tensor of `length` elements; plus_one: stored zero-centred, used as 1 + w."""

    length: int
    dtype: str
    extents: Extents
    plus_one: bool = False


@dataclass(frozen=True, eq=False)
class StoredExperts:
    """The routed experts of one layer.

    extents is int64 [experts * parts, 3], expert by expert, parts in the order gate weight
    [scales biases], up ..., down ....
    """

    gate: Format
    up: Format
    down: Format
    extents: Extents

    @property
    def parts(self) -> int:
        """Parts of one expert: 3, 5, 7 or 9."""
        return self.gate.parts + self.up.parts + self.down.parts

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert's parts."""
        return self.gate.nbytes + self.up.nbytes + self.down.nbytes
