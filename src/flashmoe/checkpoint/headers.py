"""The safetensors format: https://github.com/huggingface/safetensors#format.

A file is a little-endian u64 n, n bytes of JSON, then the tensors' bytes. The JSON maps each name
to its dtype, shape and [begin, end) counted from the end of the JSON; the tensors fill the rest of
the file exactly, without holes or overlaps.
"""

import json
import math
import struct
from collections.abc import Iterable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flashmoe.checkpoint.json import parse_object
from flashmoe.errors import CheckpointError
from flashmoe.machine.files import regular_file_size, require_itself

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library, which refuses longer headers."""

ITEM_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


class Tensor(NamedTuple):
    """One tensor, row-major; offset and nbytes are in bytes, offset from the start of the file."""

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file by name; each is known to lie inside the file, apart from the others.

    Raises:
        CheckpointError: the file is missing, truncated or breaks the format; the message names it,
            and the tensor where there is one.
    """
    try:
        size = regular_file_size(path)
        with path.open("rb") as file:
            return read_open(file, path, size)[0]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def read_open(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Likewise of an open file of `size` bytes; also what it says of itself, its `__metadata__`."""
    beginning = file.read(64)
    require_itself(path, beginning)
    # The length of a header ends in zeros. Servers answer in words where they have no file.
    if len(beginning) >= 8 and beginning.isascii() and beginning[:8].decode().isprintable():
        raise CheckpointError(
            f"{path}: is text, and not a safetensors file: {_short(beginning.decode())}; download"
            " it again"
        )
    file.seek(8)
    prefix = beginning[:8]
    if len(prefix) < 8:
        raise CheckpointError(f"{path}: {size} bytes; a safetensors file has at least 8")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed:"
            " not a safetensors file, or damaged"
        )
    if 8 + length > size:
        raise CheckpointError(
            f"{path}: claims a header of {length} bytes in a file of {size}:"
            " truncated or damaged; download it again"
        )
    text = file.read(length)
    if len(text) < length:
        raise CheckpointError(f"{path}: the header ends after {len(text)} of {length} bytes")

    entries = parse_object(text, f"{path}: header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not an object of strings")
    tensors = _parse_entries(path, entries, 8 + length)
    _check_cover(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _parse_entries(path: Path, entries: dict[str, Any], start: int) -> list[Tensor]:
    tensors = []
    # A pack of the 397B has 300,000 tensors of a dozen kinds. Keyed by text, since to Python
    # 1 == 1.0 == True, and only the first is a count.
    kinds: dict[str, tuple[int, tuple[int, ...]]] = {}
    for name, entry in entries.items():
        if not is_tensor_name(name):
            raise CheckpointError(f"{path}: a tensor cannot be called {_short(name)}")
        if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
            raise CheckpointError(
                f"{path}: tensor {name}: expected an object of dtype, shape and data_offsets,"
                f" found {_short(entry)}"
            )
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        kind = f"{dtype} {shape}"
        if kind not in kinds:
            kinds[kind] = _parse_kind(path, name, dtype, shape)
        bits, sizes = kinds[kind]
        if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise CheckpointError(
                f"{path}: tensor {name}: data_offsets is {_short(offsets)},"
                " expected [begin, end] with 0 <= begin <= end"
            )
        begin, end = offsets
        if bits != (end - begin) * 8:
            raise CheckpointError(
                f"{path}: tensor {name}: {dtype} {shape} takes {bits / 8:g} bytes,"
                f" data_offsets {offsets} span {end - begin}"
            )
        tensors.append(Tensor(name, path, start + begin, end - begin, dtype, sizes))
    return tensors


def _parse_kind(path: Path, name: str, dtype: Any, shape: Any) -> tuple[int, tuple[int, ...]]:
    """Size in bits, and shape."""
    bits = ITEM_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(f"{path}: tensor {name}: unknown dtype {_short(dtype)}")
    if not _are_counts(shape):
        raise CheckpointError(
            f"{path}: tensor {name}: shape is {_short(shape)}, expected at most 16 integers >= 0"
        )
    return math.prod(shape) * bits, tuple(shape)


def _are_counts(value: Any) -> bool:
    # bool is an int to Python, but true is not a count. Few and below 2^63, or else a shape's
    # product might take minutes to compute.
    return (
        isinstance(value, list)
        and len(value) <= 16
        and {*map(type, value)} <= {int}
        and min(value, default=0) >= 0
        and max(value, default=0) < 1 << 63
    )


def _check_cover(path: Path, tensors: list[Tensor], start: int, size: int) -> None:
    end, before = start, "the header"
    for tensor in sorted(tensors, key=itemgetter(2, 3)):
        if tensor.offset < end:
            raise CheckpointError(
                f"{path}: tensor {tensor.name} begins at byte {tensor.offset}, inside {before},"
                f" which ends at {end}"
            )
        if tensor.offset > end:
            raise CheckpointError(
                f"{path}: tensor {tensor.name} begins at byte {tensor.offset}, but {before} ends"
                f" at {end}; safetensors allows no holes"
            )
        end, before = tensor.offset + tensor.nbytes, f"tensor {tensor.name}"
    if end > size:
        raise CheckpointError(
            f"{path}: {before} ends at byte {end}, but the file ends at {size}: truncated;"
            " download it again"
        )
    if end < size:
        raise CheckpointError(
            f"{path}: {size - end} bytes after {before}, which ends at {end}, belong to no tensor"
        )


def is_tensor_name(name: str) -> bool:
    """Whether a name is fit to be shown to a person: not endless, no control characters."""
    return 0 < len(name) <= 512 and name.isprintable()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def build_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]],
    align: int = 8,
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, int]]:
    """What a file begins with, and where each tensor goes, for (name, dtype, shape) in file order.

    Returns:
        The length and the JSON, padded with spaces to a multiple of `align` bytes; and each
        tensor's absolute offset.

    Raises:
        ValueError: a name occurs twice, a dtype is unknown, or the header would exceed
            MAX_HEADER_BYTES.
    """
    entries: dict[str, dict[str, Any]] = {}
    if metadata:
        entries["__metadata__"] = dict(metadata)
    end = 0
    for name, dtype, shape in tensors:
        if name in entries:
            raise ValueError(f"tensor {name} occurs twice")
        if dtype not in ITEM_BITS:
            raise ValueError(f"tensor {name}: unknown dtype {dtype}")
        begin, end = end, end + math.prod(shape) * ITEM_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % align)
    if len(text) > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(text)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    start = 8 + len(text)
    entries.pop("__metadata__", None)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in entries.items()}
    return struct.pack("<Q", len(text)) + text, offsets
