"""Weights from the format they are stored in to another."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashmoe import _native
from flashmoe.checkpoint.table import Extents, Format, StoredMatrix, StoredVector
from flashmoe.checkpoint.zeros import hole_in, hole_in_vector, spare_rows, used_rows
from flashmoe.errors import CheckpointError, ReadError

# bfloat16, which numpy lacks, is uint16, as _native has it.
_NUMPY = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def convert_rows(
    files: Sequence[Path],
    name: str,
    source: StoredMatrix,
    target: Format,
    first: int,
    count: int,
    used: int | None = None,
) -> list[npt.NDArray[Any]]:
    """`count` rows from `first` on: the bytes of each part in the format `target`.

    Words, scales and biases of a matrix that has the bits and group of `target` are copied. Others
    are dequantized in float32 and quantized from there.

    Args:
        used: as `hole_in` takes it.
    Raises:
        CheckpointError: a weight to quantize is not finite, or there is a stretch of zeros where no
            weight is zero; the message says which row.
        ReadError: a file ends early or cannot be read.
    """
    stored = source.format
    parts = read_rows(files, source, first, count)
    if hole := hole_in(parts, stored, first, used=used):
        raise CheckpointError(hole_message(files, name, source.parts[0], hole))
    if (stored.bits, stored.group, stored.dtype) == (target.bits, target.group, target.dtype):
        return parts
    weight: npt.NDArray[Any]
    if stored.bits:
        words, scales, biases = parts
        weight = _native.dequantize(
            words.view(np.uint32).reshape(count, -1),
            scales.view(_NUMPY[stored.dtype]).reshape(count, -1),
            biases.view(_NUMPY[stored.dtype]).reshape(count, -1),
            stored.bits,
            stored.group,
        )
    else:
        weight = parts[0].view(_NUMPY[stored.dtype]).reshape(count, -1)
    if not target.bits:
        return [weight.astype(np.float16) if target.dtype == "F16" else to_bf16(weight)]
    try:
        return list(_native.quantize(weight, target.dtype, target.bits, target.group))
    except ValueError as error:
        file = files[int(source.parts[0][0, 0])]
        raise CheckpointError(
            f"{file}: {name}: from row {first} on: {error}; the checkpoint is damaged"
        ) from None


def convert_vector(files: Sequence[Path], name: str, source: StoredVector) -> npt.NDArray[Any]:
    """The elements as they are stored; where 1 is to be added, as float32 with 1 added.

    Raises CheckpointError and ReadError as `convert_rows`.
    """
    data = read_vector(files, source)
    if hole := hole_in_vector(data, may_be_zero=may_be_zero(name, source)):
        raise CheckpointError(hole_message(files, name, source.extents, hole))
    if not source.plus_one:
        return data
    stored = data.view(_NUMPY[source.dtype])
    if source.dtype == "BF16":
        stored = (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32) + np.float32(1)


def read_rows(
    files: Sequence[Path], source: StoredMatrix, first: int, count: int
) -> list[npt.NDArray[np.uint8]]:
    """The bytes of each part of `count` rows from `first` on. Raises ReadError."""
    stored = source.format
    return [
        _read(files, extents, stored.part_bytes(part) // stored.rows, first, count)
        for part, extents in enumerate(source.parts)
    ]


def read_vector(files: Sequence[Path], source: StoredVector) -> npt.NDArray[np.uint8]:
    """The bytes of a vector. Raises ReadError."""
    size = np.dtype(_NUMPY[source.dtype]).itemsize
    return _read(files, source.extents, size, 0, source.length)


def rows_in_use(files: Sequence[Path], source: StoredMatrix) -> int:
    """How many rows of the embedding or the head belong to tokens; those behind are zero."""
    rows = source.format.rows
    spare = spare_rows(rows)
    return used_rows(read_rows(files, source, rows - spare, spare)[0], rows)


def may_be_zero(name: str, source: StoredVector) -> bool:
    """Whether a vector is zero where it was made and never trained."""
    return source.plus_one or name.endswith(("A_log", "dt_bias"))


def hole_message(files: Sequence[Path], name: str, extents: Extents, hole: str) -> str:
    """What to say of a hole in the weight that begins at these extents."""
    return (
        f"{files[int(extents[0, 0])]}: {name}: {hole}, where no weight is zero: that part was never"
        " downloaded; download the file again"
    )


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _read(
    files: Sequence[Path], extents: Extents, row_bytes: int, first: int, count: int
) -> npt.NDArray[np.uint8]:
    """Bytes of `count` rows from `first` on of a part, which is the concatenation of `extents`."""
    begin, end = first * row_bytes, (first + count) * row_bytes
    pieces, at = [], 0
    for file, offset, length in extents.tolist():
        low, high = max(begin, at), min(end, at + length)
        if low < high:
            pieces.append(_read_file(files[file], offset + low - at, high - low))
        at += length
    return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), np.uint8)


def _read_file(path: Path, offset: int, length: int) -> bytes:
    where = f"{path}: {length} bytes at {offset}"
    try:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), length, offset)
    except OSError as error:
        raise ReadError(f"{where}: {error.strerror}") from error
    if len(data) < length:
        raise ReadError(
            f"{where}: only {len(data)} are there; the file has changed since it was opened"
        )
    return data
