"""What tells the weights of one model from those of another, however they are stored.

SHA-256 of the config, and of the first 4 KiB of every resident tensor and of the tensors of 64
experts, by canonical names and in the form they are used in: a pack that keeps the bits of its
source has the source's fingerprint. A change elsewhere in a tensor is not seen.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.table import (
    FLOAT_BYTES,
    Extents,
    Format,
    StoredExperts,
    StoredMatrix,
    StoredVector,
)
from flashmoe.errors import ReadError

SAMPLE = 4096
EXPERTS = 64
_SUFFIXES = ("weight", "scales", "biases")


class _Sample(NamedTuple):
    name: str
    extents: Extents
    nbytes: int
    used: Callable[[bytes], bytes]  # from how it is stored to how it is used


def fingerprint(
    config: ModelConfig,
    files: Sequence[Path],
    matrices: Mapping[str, StoredMatrix],
    vectors: Mapping[str, StoredVector],
    experts: Sequence[StoredExperts],
) -> str:
    """64 hexadecimal digits, of what a `Checkpoint` holds under these names.

    Raises:
        ReadError: a file cannot be read, or ends early.
    """
    values = dataclasses.asdict(config)
    del values["quantization"]  # says how the bits are named, and formats are hashed below
    digest = hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode())
    found = _samples(matrices, vectors, experts, config.num_experts)
    samples = sorted(found, key=lambda sample: sample.name)
    with ExitStack() as stack:
        opened = _Files(files, stack)
        for sample in samples:  # together: the disk need not wait for one to ask for the next
            opened.ask_for(sample)
        for sample in samples:
            digest.update(f"{sample.name}\n".encode())
            digest.update(sample.used(opened.read(sample)))
    return digest.hexdigest()


def _samples(
    matrices: Mapping[str, StoredMatrix],
    vectors: Mapping[str, StoredVector],
    layers: Sequence[StoredExperts],
    each: int,
) -> Iterator[_Sample]:
    for name, matrix in matrices.items():
        yield from _of_parts(name, matrix.format, matrix.parts)
    for name, vector in vectors.items():
        nbytes = min(vector.length, SAMPLE // 4) * FLOAT_BYTES[vector.dtype]
        yield _Sample(
            f"{name} {vector.length}",
            vector.extents,
            nbytes,
            partial(_float32, vector.dtype, vector.plus_one),
        )
    count = min(EXPERTS, len(layers) * each)
    for number in range(count):
        layer, expert = divmod(number * len(layers) * each // count, each)
        stored = layers[layer]
        row = expert * stored.parts
        for matrix_name in ("gate", "up", "down"):
            format = getattr(stored, matrix_name)
            parts = [stored.extents[row + part : row + part + 1] for part in range(format.parts)]
            row += format.parts
            yield from _of_parts(f"layers.{layer}.experts.{expert}.{matrix_name}", format, parts)


def _of_parts(name: str, format: Format, parts: Sequence[Extents]) -> Iterator[_Sample]:
    kind = f"{format.rows}x{format.cols} {format.dtype} {format.bits} {format.group}"
    for part, extents in enumerate(parts):
        nbytes = min(SAMPLE, format.part_bytes(part))
        yield _Sample(f"{name}.{_SUFFIXES[part]} {kind}", extents, nbytes, bytes)


def _float32(dtype: str, plus_one: bool, data: bytes) -> bytes:
    """Elements of a vector as the model uses them, which is how a pack may store them."""
    if dtype == "BF16":
        values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(data, np.float16 if dtype == "F16" else np.float32)
    values = values.astype(np.float32)
    return (values + np.float32(1) if plus_one else values).tobytes()


class _Files:
    """Files that are opened when they are first needed, and closed with `stack`."""

    def __init__(self, paths: Sequence[Path], stack: ExitStack) -> None:
        self._paths = paths
        self._stack = stack
        self._descriptors: dict[int, int] = {}

    def ask_for(self, sample: _Sample) -> None:
        if hasattr(os, "posix_fadvise"):
            for file, offset, length in _spans(sample):
                try:
                    os.posix_fadvise(self._open(file), offset, length, os.POSIX_FADV_WILLNEED)
                except OSError:
                    return  # only advice: reading will tell

    def read(self, sample: _Sample) -> bytes:
        return b"".join(self._read(*span) for span in _spans(sample))

    def _read(self, file: int, offset: int, length: int) -> bytes:
        where = f"{self._paths[file]}: {length} bytes at {offset}"
        try:
            data = os.pread(self._open(file), length, offset)
        except OSError as error:
            raise ReadError(f"{where}: {error.strerror}") from error
        if len(data) < length:
            raise ReadError(f"{where}: only {len(data)} are there; the file has changed")
        return data

    def _open(self, file: int) -> int:
        if file not in self._descriptors:
            descriptor = os.open(self._paths[file], os.O_RDONLY | os.O_CLOEXEC)
            self._stack.callback(os.close, descriptor)
            self._descriptors[file] = descriptor
        return self._descriptors[file]


def _spans(sample: _Sample) -> Iterator[tuple[int, int, int]]:
    """File, offset and length of what holds a sample."""
    left = sample.nbytes
    for file, offset, length in sample.extents.tolist():
        if left == 0:
            return
        taken = min(left, length)
        yield file, offset, taken
        left -= taken
