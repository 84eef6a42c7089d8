"""What a checkpoint's table of spans points at, read from its files."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from tensors import Tensor, dequantize, of_bytes

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.table import Extents, Format


def read(checkpoint: Checkpoint, extents: Extents) -> bytes:
    """The bytes of (file, offset, length) after (file, offset, length)."""
    result = b""
    for file, offset, length in extents.tolist():
        with checkpoint.files[file].open("rb") as stream:
            stream.seek(offset)
            result += stream.read(length)
    assert len(result) == extents[:, 2].sum()
    return result


def parts_of(checkpoint: Checkpoint, form: Format, parts: Sequence[Extents]) -> list[Tensor]:
    """The weight [rows, ...]; words, scales and biases where it is quantized."""
    dtypes = ("U32", form.dtype, form.dtype) if form.bits else (form.dtype,)
    return [
        of_bytes(dtype, read(checkpoint, part)).map(lambda a: a.reshape(form.rows, -1))
        for dtype, part in zip(dtypes, parts, strict=True)
    ]


def floats(
    checkpoint: Checkpoint, form: Format, parts: Sequence[Extents]
) -> npt.NDArray[np.float32]:
    """[rows, cols], dequantized."""
    if not form.bits:
        return parts_of(checkpoint, form, parts)[0].floats()
    words, scales, biases = parts_of(checkpoint, form, parts)
    return dequantize(words, scales, biases, form.bits, form.group)
