"""What `flashmoe pack` writes: its files, the tensors in each, and what each is made of.

One file a layer holds the routed experts. Each is a contiguous extent that begins at a multiple of
16 KiB and whose parts begin at multiples of 16 bytes, so that an expert is one read, direct I/O
included. The gaps are tensors named `padding.`, because safetensors allows no holes. All other
weights are in resident.safetensors. Names, norms and convolutions are as in MLX's conversions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flashmoe.checkpoint.architecture import Kind, weights_of
from flashmoe.checkpoint.headers import build_header
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.table import FLOAT_BYTES, Format, StoredExperts, StoredMatrix, StoredVector

RESIDENT = "resident.safetensors"
EXPERT_ALIGNMENT = 16 << 10
PART_ALIGNMENT = 16
BLOCK_WEIGHTS = 4 << 20
"""Weights that a thread converts at a time: one projection of an expert of the 397B."""

_PREFIX = "language_model.model."
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# mlx-lm gives these 8 bits and groups of 64 whatever the rest has.
_ROUTERS = ("mlp.gate", "mlp.shared_expert_gate")
_ROUTER_FORMAT = (8, 64)
_QUANTIZATION_KEYS = ("quantization", "quantization_config")  # mlx-lm writes both


@dataclass(frozen=True, eq=False)
class RowBlock:
    """`count` rows of a matrix from `first` on: what they become, and where each part goes."""

    name: str
    source: StoredMatrix
    target: Format
    first: int
    count: int
    offsets: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return self.target.nbytes // self.target.rows * self.count


@dataclass(frozen=True, eq=False)
class VectorCopy:
    """A vector and where it goes. It is kept as it is, but where 1 is added it becomes float32."""

    name: str
    source: StoredVector
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes to write."""
        return self.source.length * FLOAT_BYTES[_vector_dtype(self.source)]


@dataclass(frozen=True, eq=False)
class PlannedFile:
    """A safetensors file: its header, its size, its tensors and the work that fills it."""

    name: str
    header: bytes
    size: int
    tensors: tuple[str, ...]
    work: tuple[RowBlock | VectorCopy, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """A whole pack. `dense` names the modules, as config.json does, that stay at 16 bits because
    the group size does not divide their columns."""

    files: tuple[PlannedFile, ...]
    config: dict[str, Any]
    dense: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(file.size for file in self.files)

    @property
    def index(self) -> dict[str, Any]:
        """Of the format of model.safetensors.index.json."""
        weight_map = {name: file.name for file in self.files for name in file.tensors}
        return {"metadata": {"total_size": self.nbytes}, "weight_map": weight_map}


def make_plan(checkpoint: Checkpoint, bits: int, group: int) -> Plan:
    """The pack of a checkpoint at 2, 4, 8 or 16 `bits`."""
    formats = _Formats(bits, group)
    resident = _FileBuilder()
    for name, matrix in checkpoint.matrices.items():
        path = "language_model.lm_head" if name == "lm_head" else _PREFIX + name
        resident.add_matrix(path, matrix, formats.choose(path, matrix.format))
    for weight in weights_of(checkpoint.config):
        if weight.name in checkpoint.vectors:
            suffix = "" if weight.kind is Kind.PARAMETER else ".weight"
            # MLX's convention for convolutions is [channels, taps, 1].
            shape = (*weight.shape, 1) if weight.kind is Kind.CONVOLUTION else weight.shape
            vector = checkpoint.vectors[weight.name]
            resident.add_vector(_PREFIX + weight.name + suffix, vector, shape)
    # Larger elements first, as the safetensors library has it: every tensor is aligned to its own.
    resident.entries.sort(key=lambda entry: entry[1] not in ("U32", "F32"))
    files = [resident.finish(RESIDENT)]
    for layer, experts in enumerate(checkpoint.experts):
        files.append(_expert_file(layer, experts, formats))
    config = _without_quantization(checkpoint.metadata.config)
    if isinstance(text := config.get("text_config"), dict):
        config["text_config"] = _without_quantization(text)
    # It may say that a head is tied which is not.
    config["tie_word_embeddings"] = checkpoint.config.tie_word_embeddings
    if bits != 16:
        config |= dict.fromkeys(_QUANTIZATION_KEYS, formats.described())
    return Plan(tuple(files), config, tuple(formats.dense))


class _Formats:
    """Chooses what each matrix becomes, and keeps what config.json has to say about it."""

    def __init__(self, bits: int, group: int) -> None:
        self.bits = bits
        self.group = group
        self.dense: list[str] = []
        self.exceptions: dict[str, Any] = {}

    def choose(self, path: str, source: Format) -> Format:
        """The new format of the module at `path`; a layer's experts share switch_mlp's."""
        bits, group = self.bits, self.group
        if bits != 16:
            if path.endswith(_ROUTERS):
                bits, group = _ROUTER_FORMAT
            if source.cols % group == 0:
                if (bits, group) != (self.bits, self.group):
                    self.exceptions[path] = {"group_size": group, "bits": bits}
                return Format(source.rows, source.cols, source.dtype, bits, group)
            self.exceptions[path] = False
            self.dense.append(path)
        return Format(source.rows, source.cols, "F16" if source.dtype == "F16" else "BF16")

    def described(self) -> dict[str, Any]:
        """The value of config.json's `quantization`."""
        default = {"group_size": self.group, "bits": self.bits, "mode": "affine"}
        return default | self.exceptions


class _FileBuilder:
    """Lays tensors out one after the other. `padding` begins the names of those that fill gaps."""

    def __init__(self, padding: str = "padding.") -> None:
        self.entries: list[tuple[str, str, tuple[int, ...]]] = []
        self._padding = padding
        self._paddings = 0
        self._size = 0
        self._matrices: list[tuple[str, StoredMatrix, Format]] = []
        self._vectors: list[tuple[str, StoredVector]] = []

    def add_matrix(
        self, path: str, source: StoredMatrix, target: Format, align: int = 1, part_align: int = 1
    ) -> None:
        """Its first part begins at a multiple of `align` bytes, the others of `part_align`."""
        self._matrices.append((path, source, target))
        for part, (suffix, dtype, shape) in enumerate(_parts(target)):
            gap = -self._size % (part_align if part else align)
            if gap:
                self._add(f"{self._padding}{self._paddings}", "U8", (gap,), gap)
                self._paddings += 1
            self._add(path + suffix, dtype, shape, target.part_bytes(part))

    def add_vector(self, name: str, source: StoredVector, shape: tuple[int, ...]) -> None:
        self._vectors.append((name, source))
        self._add(name, _vector_dtype(source), shape, VectorCopy(name, source, 0).nbytes)

    def _add(self, name: str, dtype: str, shape: tuple[int, ...], nbytes: int) -> None:
        self.entries.append((name, dtype, shape))
        self._size += nbytes

    def finish(self, name: str) -> PlannedFile:
        header, offsets = build_header(self.entries, EXPERT_ALIGNMENT)
        work: list[RowBlock | VectorCopy] = [
            VectorCopy(v, source, offsets[v]) for v, source in self._vectors
        ]
        for path, source, target in self._matrices:
            places = [offsets[path + suffix] for suffix, _, _ in _parts(target)]
            work += _blocks(path, source, target, places)
        names = tuple(entry[0] for entry in self.entries)
        return PlannedFile(name, header, len(header) + self._size, names, tuple(work))


def _expert_file(layer: int, experts: StoredExperts, formats: _Formats) -> PlannedFile:
    name = f"{_PREFIX}layers.{layer}.mlp."
    sources = experts.gate, experts.up, experts.down
    targets = [
        formats.choose(f"{name}switch_mlp.{projection}", source)
        for projection, source in zip(_PROJECTIONS, sources, strict=True)
    ]
    builder = _FileBuilder(f"padding.{layer}.")
    row = 0
    for expert in range(len(experts.extents) // experts.parts):
        align = EXPERT_ALIGNMENT
        for projection, source, target in zip(_PROJECTIONS, sources, targets, strict=True):
            parts = tuple(experts.extents[row + part :][:1] for part in range(source.parts))
            row += source.parts
            path = f"{name}experts.{expert}.{projection}"
            builder.add_matrix(path, StoredMatrix(source, parts), target, align, PART_ALIGNMENT)
            align = PART_ALIGNMENT
    return builder.finish(f"layer-{layer:03d}.safetensors")


def _blocks(
    path: str, source: StoredMatrix, target: Format, places: list[int]
) -> Iterator[RowBlock]:
    step = max(1, BLOCK_WEIGHTS // target.cols)
    for first in range(0, target.rows, step):
        offsets = tuple(
            place + target.part_bytes(part) // target.rows * first
            for part, place in enumerate(places)
        )
        yield RowBlock(path, source, target, first, min(step, target.rows - first), offsets)


def _parts(format: Format) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """Suffix, dtype and shape of each part's tensor."""
    if not format.bits:
        yield ".weight", format.dtype, (format.rows, format.cols)
        return
    yield ".weight", "U32", (format.rows, format.cols * format.bits // 32)
    for suffix in (".scales", ".biases"):
        yield suffix, format.dtype, (format.rows, format.cols // format.group)


def _vector_dtype(source: StoredVector) -> str:
    # In 16 bits 1 + w would lose most of w.
    return "F32" if source.plus_one else source.dtype


def _without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _QUANTIZATION_KEYS}
