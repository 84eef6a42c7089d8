"""Finds the weights of the architecture among a checkpoint's tensors, as Hugging Face, MLX or
`flashmoe pack` lay them out."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from flashmoe.checkpoint.architecture import Kind, Weight, weights_of
from flashmoe.checkpoint.config import BITS, GROUPS, ModelConfig
from flashmoe.checkpoint.headers import Tensor
from flashmoe.checkpoint.index import listed
from flashmoe.checkpoint.table import (
    FLOAT_BYTES,
    Extents,
    Format,
    StoredExperts,
    StoredMatrix,
    StoredVector,
)
from flashmoe.errors import CheckpointError
from flashmoe.machine.files import open_file

log = logging.getLogger("flashmoe")

# Hugging Face with vision, MLX and pack, Hugging Face text only (and MLX's Qwen3-Next).
_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_HEADS = ("lm_head.", "language_model.lm_head.")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_PARTS = ("weight", "scales", "biases")
_OTHER_FORMATS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    "_blocks": "MXFP4",
}
_INSTEAD = (
    "reads weights of 16 or 32 bits and MLX's affine ones: take the model's bf16 or MLX 4-bit"
    " edition (mlx-community)"
)
_COMPARED = 4 << 20  # bytes at a time


class WeightFinder:
    """Takes a checkpoint's tensors one weight at a time, each checked against the config.

    `listing` is what said which tensors there are (an index, a file, a model on the hub); messages
    name it. `here` says whether the tensors' files are on this machine. `config` becomes that of an
    untied head where one is stored.
    """

    def __init__(
        self,
        listing: Path,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        *,
        here: bool = True,
    ) -> None:
        self.config = config
        self.listing = listing
        self.here = here
        self.files: dict[Path, int] = {}
        for tensor in tensors.values():
            self.files.setdefault(tensor.file, len(self.files))
        self.matrices: dict[str, StoredMatrix] = {}
        self.vectors: dict[str, StoredVector] = {}
        self.experts: list[StoredExperts] = []
        self._expert_shapes: dict[str, tuple[int, int]] = {}  # of one layer's, by projection
        self._prefix = self._find_prefix(tensors)
        self._tensors = self._canonical(tensors)
        self._mlx_convention = self._find_convention()

    def find(self) -> None:
        """Fills files, matrices, vectors and experts.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or dtype than the
                config says.
        """
        if self.config.tie_word_embeddings and "lm_head.weight" in self._tensors:
            self._settle_head()
        for weight in weights_of(self.config):
            match weight.kind:
                case Kind.MATRIX if weight.name not in self.matrices:
                    self._matrix(weight)
                case Kind.EXPERTS:
                    name, _, projection = weight.name.rpartition("experts.")
                    rows, cols = weight.shape
                    self._expert_shapes[projection] = rows, cols
                    if projection == "down_proj":  # the last of a layer's three
                        self.experts.append(self._layer_experts(name))
                case Kind.NORM | Kind.VECTOR | Kind.CONVOLUTION | Kind.PARAMETER:
                    self._vector(weight)
        if self._tensors:
            raise self._unknown(self._tensors.values())

    def _settle_head(self) -> None:
        """Leaves out a stored head that is a copy of the embedding it is said to be tied to.

        One that differs was trained apart; it is used, as transformers does.
        """
        head, embedding = (
            [self._tensors.get(f"{name}.{part}") for part in _PARTS]
            for name in ("lm_head", "embed_tokens")
        )
        if self.here and not all(map(_equal, head, embedding)):
            self.config = dataclasses.replace(self.config, tie_word_embeddings=False)
            log.warning(
                "%s: lm_head differs from the embedding, to which config.json says it is tied; it"
                " is used as it is stored",
                self.listing,
            )
            return
        for part in _PARTS:
            self._tensors.pop(f"lm_head.{part}", None)

    def _matrix(self, weight: Weight) -> None:
        name = weight.name
        if name.endswith("in_proj_qkv") and f"{name}z.weight" in self._tensors:
            self._interleaved_projections(name.removesuffix("in_proj_qkv"))
            return
        rows, cols = weight.shape
        format, tensors = self._take_parts(name, (), rows, cols)
        parts = tuple(self._split(tensor, 1) for tensor in tensors)
        self.matrices[name] = StoredMatrix(format, parts)

    def _vector(self, weight: Weight) -> None:
        tensor = self._take(weight.name + ("" if weight.kind is Kind.PARAMETER else ".weight"))
        shape = weight.shape
        if weight.kind is Kind.CONVOLUTION:
            channels, taps = shape
            shape = (channels, taps, 1) if self._mlx_convention else (channels, 1, taps)
        _check(tensor, FLOAT_BYTES, shape)
        length = tensor.nbytes // FLOAT_BYTES[tensor.dtype]
        plus_one = weight.kind is Kind.NORM and not self._mlx_convention
        extents = self._split(tensor, 1)
        self.vectors[weight.name] = StoredVector(length, tensor.dtype, extents, plus_one)

    def _interleaved_projections(self, name: str) -> None:
        """Qwen3-Next's: per key head its q, k, and its value heads' v and z; likewise b and a."""
        c = self.config
        heads = c.linear_num_key_heads
        ratio = c.linear_num_value_heads // heads
        k, v = c.linear_key_head_dim, ratio * c.linear_value_head_dim
        fields = _interleaved_rows(heads, (k, k, v, v))
        stored = self._take_parts(name + "in_proj_qkvz", (), heads * 2 * (k + v), c.hidden_size)
        self._gather(name + "in_proj_qkv", *stored, fields[0] + fields[1] + fields[2])
        self._gather(name + "in_proj_z", *stored, fields[3])
        fields = _interleaved_rows(heads, (ratio, ratio))
        stored = self._take_parts(name + "in_proj_ba", (), heads * 2 * ratio, c.hidden_size)
        self._gather(name + "in_proj_b", *stored, fields[0])
        self._gather(name + "in_proj_a", *stored, fields[1])

    def _gather(
        self, name: str, format: Format, tensors: list[Tensor], runs: list[tuple[int, int]]
    ) -> None:
        """A matrix of some of the rows of a stored one, given as runs of (first row, rows)."""
        parts = []
        for tensor in tensors:
            row = tensor.nbytes // format.rows
            file = self.files[tensor.file]
            parts.append(_extents((file, tensor.offset + a * row, n * row) for a, n in runs))
        rows = sum(n for _, n in runs)
        gathered = Format(rows, format.cols, format.dtype, format.bits, format.group)
        self.matrices[name] = StoredMatrix(gathered, tuple(parts))

    def _layer_experts(self, name: str) -> StoredExperts:
        """The experts of one layer, in whichever of three ways they are stored below `name`."""
        if f"{name}experts.gate_up_proj" in self._tensors:
            return self._fused_experts(name + "experts.")
        if f"{name}switch_mlp.gate_proj.weight" in self._tensors:
            return self._stacked_experts(name + "switch_mlp.")
        return self._separate_experts(name)

    def _fused_experts(self, name: str) -> StoredExperts:
        """Hugging Face: gate_up_proj [E, 2I, H], gate first, and down_proj [E, H, I]."""
        count = self.config.num_experts
        inner, hidden = self._expert_shapes["gate_proj"]
        gate_up = self._take(name + "gate_up_proj")
        down = self._take(name + "down_proj")
        _check(gate_up, FLOAT_BYTES, (count, 2 * inner, hidden))
        _check(down, FLOAT_BYTES, (count, hidden, inner))
        extents = np.empty((count, 3, 3), np.int64)
        extents[:, :2] = self._split(gate_up, 2 * count).reshape(count, 2, 3)
        extents[:, 2] = self._split(down, count)
        gate = Format(inner, hidden, gate_up.dtype)
        return StoredExperts(gate, gate, Format(hidden, inner, down.dtype), extents.reshape(-1, 3))

    def _stacked_experts(self, name: str) -> StoredExperts:
        """MLX: each part of each projection has a leading [E]."""
        formats, columns = [], []
        for projection in _PROJECTIONS:
            format, tensors = self._take_parts(
                name + projection, (self.config.num_experts,), *self._expert_shapes[projection]
            )
            formats.append(format)
            columns += [self._split(tensor, self.config.num_experts) for tensor in tensors]
        gate, up, down = formats
        return StoredExperts(gate, up, down, np.stack(columns, axis=1).reshape(-1, 3))

    def _separate_experts(self, name: str) -> StoredExperts:
        """Hugging Face before fusing, and pack: one tensor per expert, projection and part."""
        formats: dict[str, Format] = {}
        extents: list[tuple[int, int, int]] = []
        for expert in range(self.config.num_experts):
            for projection in _PROJECTIONS:
                format, tensors = self._take_parts(
                    f"{name}experts.{expert}.{projection}",
                    (),
                    *self._expert_shapes[projection],
                )
                first = formats.setdefault(projection, format)
                if format != first:
                    raise CheckpointError(
                        f"{tensors[0].file}: tensor {tensors[0].name}: {_describe(format)}, but"
                        f" the layer's first expert is {_describe(first)}; they must be alike"
                    )
                extents += [(self.files[t.file], t.offset, t.nbytes) for t in tensors]
        gate, up, down = (formats[projection] for projection in _PROJECTIONS)
        return StoredExperts(gate, up, down, _extents(extents))

    def _split(self, tensor: Tensor, count: int) -> Extents:
        """`count` equal pieces of a tensor, in order."""
        extents = np.empty((count, 3), np.int64)
        length = tensor.nbytes // count
        extents[:, 0] = self.files[tensor.file]
        extents[:, 1] = tensor.offset + length * np.arange(count, dtype=np.int64)
        extents[:, 2] = length
        return extents

    def _take_parts(
        self, name: str, lead: tuple[int, ...], rows: int, cols: int
    ) -> tuple[Format, list[Tensor]]:
        """The weight of a matrix, and its scales and biases where it is quantized.

        `lead` is what comes before [rows, cols] in the tensors' shapes.
        """
        weight = self._take(name + ".weight")
        if weight.dtype != "U32" and f"{name}.scales" not in self._tensors:
            _check(weight, FLOAT_BYTES, (*lead, rows, cols))
            return Format(rows, cols, weight.dtype), [weight]
        scales = self._take(name + ".scales")
        if scales.dtype not in FLOAT_BYTES:
            raise CheckpointError(
                f"{scales.file}: tensor {scales.name}: dtype {scales.dtype}, expected"
                f" {' or '.join(FLOAT_BYTES)}: only MLX's affine quantization is supported, and"
                " none of mxfp4, mxfp8 and nvfp4"
            )
        biases = self._take(name + ".biases")
        bits = _divided(weight, 32 * _last(weight), cols, BITS, "bits")
        group = _divided(scales, cols, _last(scales), GROUPS, "columns a group")
        why = f" for {bits} bits and groups of {group}"
        _check(weight, ("U32",), (*lead, rows, cols * bits // 32), why)
        _check(scales, FLOAT_BYTES, (*lead, rows, cols // group), why)
        _check(biases, (scales.dtype,), (*lead, rows, cols // group), why)
        return Format(rows, cols, scales.dtype, bits, group), [weight, scales, biases]

    def _take(self, name: str) -> Tensor:
        tensor = self._tensors.pop(name, None)
        if tensor is None:
            for suffix, method in _OTHER_FORMATS.items():
                if (other := name.removesuffix(".weight") + suffix) in self._tensors:
                    raise CheckpointError(
                        f"{self.listing}: tensor {self._prefix}{other} is {method}'s; flashmoe"
                        f" {_INSTEAD}"
                    )
            raise CheckpointError(
                f"{self.listing}: no tensor {self._prefix}{name}; is the download complete, and"
                " does config.json belong to these weights?"
            )
        return tensor

    def _find_prefix(self, tensors: Mapping[str, Tensor]) -> str:
        for prefix in _PREFIXES:
            if f"{prefix}embed_tokens.weight" in tensors:
                return prefix
        names = " or ".join(f"{prefix}embed_tokens.weight" for prefix in _PREFIXES)
        raise CheckpointError(f"{self.listing}: no tensor {names}")

    def _canonical(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        unknown = []
        start = len(self._prefix)
        for name, tensor in tensors.items():
            if name.startswith(self._prefix):
                key = name[start:]
            elif name.startswith(_HEADS):
                key = name.removeprefix("language_model.")
            else:
                unknown.append(tensor)
                continue
            if result.setdefault(key, tensor) is not tensor:
                unknown.append(tensor)
        if unknown:
            raise self._unknown(unknown)
        return result

    def _unknown(self, tensors: Iterable[Tensor]) -> CheckpointError:
        return CheckpointError(
            f"{self.listing}: tensors that this model does not have:"
            f" {listed({tensor.name for tensor in tensors})}"
        )

    def _find_convention(self) -> bool:
        """Whether norms and convolutions are MLX's: conv1d is [C, kernel, 1] and the norms have
        had 1 added (mlx-lm's `sanitize` does both or neither, and so does pack)."""
        for name in sorted(self._tensors):  # in one order, whatever the files list them in
            if name.endswith("linear_attn.conv1d.weight"):
                return self._tensors[name].shape[-1:] == (1,)
        # Attention alone: only MLX and pack spell names so.
        return self._prefix == "language_model.model." or any(
            ".switch_mlp." in name for name in self._tensors
        )


def _interleaved_rows(heads: int, widths: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """Per field, its runs of (first row, rows), where each head holds `widths` rows a field."""
    stride = sum(widths)
    starts = [sum(widths[:i]) for i in range(len(widths))]
    return [
        [(head * stride + start, width) for head in range(heads)]
        for start, width in zip(starts, widths, strict=True)
    ]


def _extents(items: Iterable[tuple[int, int, int]]) -> Extents:
    return np.array(list(items), dtype=np.int64)


def _divided(
    tensor: Tensor, dividend: int, divisor: int, choices: tuple[int, ...], what: str
) -> int:
    """How a matrix is quantized, as a shape has it: config.json is wrong at times, shapes never."""
    for choice in choices:
        if dividend == choice * divisor:
            return choice
    found = dividend / divisor if divisor else 0
    raise CheckpointError(
        f"{tensor.file}: tensor {tensor.name}: shape {list(tensor.shape)} is {found:g} {what} for"
        f" what config.json makes of this matrix, expected {', '.join(map(str, choices))}"
    )


def _last(tensor: Tensor) -> int:
    return tensor.shape[-1] if tensor.shape else 0


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors hold the same; the first difference ends the reading."""
    if one is None or other is None:
        return one is other
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open_file(one.file) as a, open_file(other.file) as b:
        for at in range(0, one.nbytes, _COMPARED):
            length = min(_COMPARED, one.nbytes - at)
            try:
                if os.pread(a.fileno(), length, one.offset + at) != os.pread(
                    b.fileno(), length, other.offset + at
                ):
                    return False
            except OSError as error:
                raise CheckpointError(f"{one.file}: cannot be read: {error.strerror}") from None
    return True


def _check(tensor: Tensor, dtypes: Iterable[str], shape: tuple[int, ...], why: str = "") -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name}: shape {list(tensor.shape)},"
            f" expected {list(shape)}{why or ' from config.json'}"
        )
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name}: dtype {tensor.dtype},"
            f" expected {' or '.join(dtypes)}{why}"
            + (f": flashmoe {_INSTEAD}" if tensor.dtype.startswith(("F8", "U8", "I8")) else "")
        )


def _describe(format: Format) -> str:
    if format.bits:
        return f"{format.bits} bits in groups of {format.group} with {format.dtype} scales"
    return format.dtype
