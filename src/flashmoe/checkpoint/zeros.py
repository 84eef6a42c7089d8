"""Stretches of zeros where no weight is zero: what a download leaves that was never written.

Such a file has its whole length and a sound header, and the model that it makes talks nonsense at
worst and a little worse at best. Weights that were trained are not zero hundreds in a row; those
that are so for a reason (rows of the vocabulary that no token uses, weights that were pruned) are
told apart by what is around them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flashmoe.checkpoint.table import FLOAT_BYTES, Format

Bytes = npt.NDArray[np.uint8]

LEAST = 512
"""Bytes of zeros in a row that are a hole: a disk's sector."""
_STEP = LEAST // 2  # any run of LEAST bytes holds a whole aligned step
_PRUNED = 0.01  # share of zeros outside of holes from which on zero is a weight like others
_UNUSED = 16  # at most one in so many rows of the vocabulary belongs to no token
_PARTS = ("weight", "scales", "biases")


def hole_in(
    parts: Sequence[Bytes], format: Format, first: int = 0, *, used: int | None = None
) -> str | None:
    """What to say of a hole among rows of a matrix; None where there is none.

    Args:
        parts: the bytes of rows from `first` on: the weight, and scales and biases where it is
            quantized.
        used: of a matrix with a row a token, how many rows have a use; see `used_rows`. Those
            behind, and single ones, may be zero.
    """
    sizes = [format.part_bytes(part) // format.rows for part in range(format.parts)]
    for part, (data, row_bytes) in enumerate(zip(parts, sizes, strict=True)):
        # Of words and biases the others tell whether zero is meant.
        live = used if not format.bits or part == 1 else None
        end = len(data) if live is None else max(0, min(len(data), (live - first) * row_bytes))
        runs = list(_runs(data[:end]))
        if live is not None:  # the token that pads has a row of zeros, as torch makes it
            runs = [run for run in runs if not _is_one_row(*run, row_bytes)]
        if not runs or (not format.bits and _is_pruned(data[:end], runs, format.dtype)):
            continue
        for begin, length in runs:
            if (
                part != 1
                and format.bits
                and _is_of_zero_weights(parts, format, part, begin, length)
            ):
                continue
            row = first + begin // row_bytes
            return f"{length} bytes of its {_PARTS[part]} from row {row} on are zero"
    return None


def used_rows(weight: Bytes, rows: int) -> int:
    """Rows of a vocabulary's matrix up to the last that is not zero, of its last rows' bytes.

    All of them where more are zero than a vocabulary has to spare.
    """
    spare = min(spare_rows(rows), len(weight))
    row = weight.reshape(-1, len(weight) // spare) if spare else weight.reshape(0, 1)
    live = np.flatnonzero(row.any(axis=1))
    return rows if not len(live) else rows - (len(row) - 1 - int(live[-1]))


def spare_rows(rows: int) -> int:
    """The most rows that a vocabulary has to spare."""
    return max(1, rows // _UNUSED)


def hole_in_vector(data: Bytes, *, may_be_zero: bool) -> str | None:
    """Likewise of a vector, or of a convolution; `may_be_zero`: all of it, as when it is made."""
    runs = list(_runs(data))
    if not runs or (may_be_zero and not data.any()):
        return None
    return f"{runs[0][1]} bytes of it are zero"


def _runs(data: Bytes) -> Iterator[tuple[int, int]]:
    """Begin and length of each run of at least LEAST zeros."""
    steps = len(data) // _STEP
    whole = data[: steps * _STEP]
    words = whole.view(np.uint64) if whole.ctypes.data % 8 == 0 else whole
    empty = np.flatnonzero(~words.reshape(steps, -1).any(axis=1)) if steps else np.empty(0, int)
    if not len(empty):
        return
    breaks = np.flatnonzero(np.diff(empty) != 1)
    for low, high in zip(
        empty[np.concatenate(([0], breaks + 1))],
        empty[np.concatenate((breaks, [len(empty) - 1]))],
        strict=True,
    ):
        begin, end = int(low) * _STEP, (int(high) + 1) * _STEP
        before = np.flatnonzero(data[max(0, begin - _STEP) : begin])
        begin -= min(begin, _STEP) - (int(before[-1]) + 1 if len(before) else 0)
        behind = np.flatnonzero(data[end : end + _STEP])
        end += int(behind[0]) if len(behind) else len(data[end : end + _STEP])
        if end - begin >= LEAST:
            yield begin, end - begin


def _is_one_row(begin: int, length: int, row_bytes: int) -> bool:
    """Whether a run is of one whole row, and some zeros of its neighbours."""
    row = -(-begin // row_bytes)
    inside = begin + length - row * row_bytes
    return row_bytes <= inside < row_bytes + min(LEAST, row_bytes) and (
        row * row_bytes - begin < min(LEAST, row_bytes)
    )


def _is_pruned(data: Bytes, runs: list[tuple[int, int]], dtype: str) -> bool:
    """Whether zero is a common weight outside of the runs, too."""
    size = FLOAT_BYTES[dtype]
    elements = data.view(np.uint16 if size == 2 else np.uint32)
    held = sum(length // size for _, length in runs)
    outside = len(elements) - held
    zeros = len(elements) - int(np.count_nonzero(elements)) - held
    return outside > 0 and zeros > _PRUNED * outside


def _is_of_zero_weights(
    parts: Sequence[Bytes], format: Format, part: int, begin: int, length: int
) -> bool:
    """Whether words and biases are both zero there, as those of groups of zeros are."""
    words, _, biases = parts
    per_group = {0: format.group * format.bits // 8, 2: FLOAT_BYTES[format.dtype]}
    low = -(-begin // per_group[part])
    high = (begin + length) // per_group[part]
    other, size = (biases, per_group[2]) if part == 0 else (words, per_group[0])
    found: npt.NDArray[Any] = other[low * size : high * size]
    return not found.any()
