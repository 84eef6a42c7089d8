"""Tensors as checkpoints hold them, in numpy: bfloat16, safetensors files, MLX's affine groups.

tests/reference compares each of these with torch or mlx, bit for bit.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors

_NUMPY: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "U32": np.uint32,
    "U8": np.uint8,
    "I32": np.int32,
}
EPSILON = np.float32(1e-7)  # MLX's least scale


class Tensor(NamedTuple):
    """`dtype` is safetensors' word; bfloat16 lies in a uint16 array."""

    dtype: str
    array: npt.NDArray[Any]

    def floats(self) -> npt.NDArray[np.float32]:
        if self.dtype == "BF16":
            return (self.array.astype(np.uint32) << 16).view(np.float32)
        return self.array.astype(np.float32)

    def map(self, change: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> "Tensor":
        """The same dtype over another array."""
        return Tensor(self.dtype, change(self.array))


def stored(values: npt.NDArray[Any], dtype: str) -> Tensor:
    """float32 rounded to a dtype, to nearest and ties to even."""
    if dtype != "BF16":
        return Tensor(dtype, values.astype(_NUMPY[dtype]))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return Tensor(dtype, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))


def of_bytes(dtype: str, data: bytes | bytearray) -> Tensor:
    """One dimension of elements."""
    return Tensor(dtype, np.frombuffer(data, _NUMPY[dtype]))


def load(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name: the library's own order is another each time."""
    return {
        name: of_bytes(view["dtype"], view["data"]).map(lambda a, to=view["shape"]: a.reshape(to))
        for name, view in sorted(
            safetensors.deserialize(file.read_bytes()), key=lambda item: item[0]
        )
    }


def save(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Writes a safetensors file of them, in their order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, array) in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            out.write(tensor.array.tobytes())


def save_shards(
    tensors: Mapping[str, Tensor],
    directory: Path,
    shard_bytes: int | None = None,
    *,
    index: bool = False,
) -> None:
    """model.safetensors, or files of at most `shard_bytes` (and a tensor at least).

    Several files have an index; one has it where `index` asks for it.
    """
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        held = sum(other.array.nbytes for other in shards[-1].values())
        if shard_bytes and shards[-1] and held + tensor.array.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save(shard, directory / file)
        weight_map.update(dict.fromkeys(shard, file))
    if index or len(shards) > 1:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / "model.safetensors.index.json").write_text(text)


def quantize(weight: npt.NDArray[np.float32], dtype: str, bits: int, group: int) -> list[Tensor]:
    """Words, scales and biases as `mlx.core.quantize` computes them from values of `dtype`.

    weight: [..., cols]; words: [..., cols * bits / 32]; scales, biases: [..., cols / group].
    A level q stands for scale * q + bias. The edge of a group that is farther from zero is exact.
    """
    levels = np.float32((1 << bits) - 1)
    groups = weight.reshape(*weight.shape[:-1], -1, group)
    low, high = groups.min(-1), groups.max(-1)
    down = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / levels, EPSILON)
    scale = np.where(down, scale, -scale)
    edge = np.where(down, low, high)
    steps = np.rint(edge / scale)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(steps != 0, edge / steps, scale).astype(np.float32)
    bias = np.where(steps != 0, edge, 0).astype(np.float32)
    q = np.clip(np.rint((groups - bias[..., None]) / scale[..., None]), 0, levels)
    per_word = 32 // bits
    q = q.astype(np.uint32).reshape(*weight.shape[:-1], -1, per_word)
    words = np.bitwise_or.reduce(q << (np.arange(per_word, dtype=np.uint32) * bits), axis=-1)
    return [Tensor("U32", words), stored(scale, dtype), stored(bias, dtype)]


def dequantize(
    words: Tensor, scales: Tensor, biases: Tensor, bits: int, group: int
) -> npt.NDArray[np.float32]:
    """[..., cols], computed in float32."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * bits
    q = (words.array[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    q = q.astype(np.float32).reshape(*words.array.shape[:-1], -1, group)
    weight = q * scales.floats()[..., None] + biases.floats()[..., None]
    return weight.reshape(*words.array.shape[:-1], -1)
