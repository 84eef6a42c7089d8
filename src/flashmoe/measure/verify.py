"""Whether the files of a checkpoint are what was published, and whole.

Where the hub's hashes are known (its cache and `hf download --local-dir` keep them), files are
compared with those. Weights in other files are searched for stretches of zeros where no weight is
zero, which a download leaves where it wrote nothing.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe import hub
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.table import Extents, StoredMatrix, StoredVector
from flashmoe.checkpoint.zeros import hole_in, hole_in_vector
from flashmoe.errors import FlashMoeError
from flashmoe.machine import probe
from flashmoe.machine.files import is_there, names_in, open_file, regular_file_size
from flashmoe.pack.convert import hole_message, may_be_zero, read_rows, read_vector, rows_in_use

BLOCK_BYTES = 16 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CheckedFile:
    """A file. `published`: whether it has the hub's hash; None where that is not known."""

    name: str
    nbytes: int
    published: bool | None


@dataclass(frozen=True)
class Verified:
    """What was found of a checkpoint.

    Attributes:
        faults: what is wrong, a sentence each that names the file.
        searched: bytes of weights that were searched for zeros, no hash being known.
    """

    source: str
    files: tuple[CheckedFile, ...]
    searched: int
    faults: tuple[str, ...]

    @property
    def good(self) -> bool:
        return not self.faults

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return dataclasses.asdict(self) | {"good": self.good}


def verify(source: str | os.PathLike[str], *, progress: Progress | None = None) -> Verified:
    """Reads every byte of a checkpoint: a directory, "demo" or a hub id.

    Args:
        progress: called with (bytes read, bytes to read).
    Raises:
        CheckpointError: it does not even open.
    """
    checkpoint = Checkpoint.open(source)
    directory = checkpoint.directory
    paths = [directory / name for name in names_in(directory)]
    weights = set(checkpoint.files)
    hashes = {path: hub.known_hash(path) for path in paths if is_there(path) and path.is_file()}
    known = [path for path, found in hashes.items() if found is not None]
    unknown = [n for n, path in enumerate(checkpoint.files) if hashes.get(path) is None]
    searched = [w for w in _weights(checkpoint) if np.isin(w.extents[:, 0], unknown).any()]
    nbytes = sum(weight.nbytes for weight in searched)
    total = sum(map(regular_file_size, known)) + nbytes
    count = _Count(total, progress or (lambda done, total: None))
    with ThreadPoolExecutor(probe.physical_cores()) as pool:
        same = dict(
            zip(known, pool.map(lambda p: _has_hash(p, hashes[p], count), known), strict=True)
        )
        holes = pool.map(lambda weight: _search(weight, checkpoint.files, count), searched)
        faults = [
            f"{path}: is not the file that the hub has under its hash; download it again"
            for path, right in same.items()
            if not right
        ]
        faults += [hole for hole in holes if hole]
    files = tuple(
        CheckedFile(path.name, regular_file_size(path), same.get(path))
        for path in hashes
        if path in weights or path in same
    )
    return Verified(checkpoint.source, files, nbytes, tuple(faults))


class _Count:
    """Bytes that were read, by whichever thread."""

    def __init__(self, total: int, progress: Progress) -> None:
        self._done, self._total, self._progress = 0, total, progress
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._progress(self._done, self._total)


def _has_hash(path: Path, expected: hub.Hash | None, count: _Count) -> bool:
    assert expected is not None
    digest = expected.begin(regular_file_size(path))
    with open_file(path) as file:
        while data := file.read(BLOCK_BYTES):
            digest.update(data)
            count.add(len(data))
    return digest.hexdigest() == expected.value


@dataclass(frozen=True, eq=False)
class _Weight:
    """One weight of a checkpoint, to be searched."""

    name: str
    stored: StoredMatrix | StoredVector

    @property
    def extents(self) -> Extents:
        if isinstance(self.stored, StoredVector):
            return self.stored.extents
        return np.concatenate(self.stored.parts)

    @property
    def nbytes(self) -> int:
        return int(self.extents[:, 2].sum())

    def hole(self, files: Sequence[Path]) -> str | None:
        """What is wrong with it, if anything."""
        if isinstance(self.stored, StoredVector):
            data = read_vector(files, self.stored)
            return hole_in_vector(data, may_be_zero=may_be_zero(self.name, self.stored))
        format, used = self.stored.format, None
        if self.name in ("embed_tokens", "lm_head"):
            used = rows_in_use(files, self.stored)
        step = max(1, BLOCK_BYTES * format.rows // max(1, format.nbytes))
        for first in range(0, format.rows, step):
            parts = read_rows(files, self.stored, first, min(step, format.rows - first))
            if hole := hole_in(parts, format, first, used=used):
                return hole
        return None


def _search(weight: _Weight, files: Sequence[Path], count: _Count) -> str | None:
    try:
        hole = weight.hole(files)
    except FlashMoeError as error:  # a file that cannot be read is a finding, too
        return str(error)
    finally:
        count.add(weight.nbytes)
    return hole and hole_message(files, weight.name, weight.extents, hole)


def _weights(checkpoint: Checkpoint) -> Iterator[_Weight]:
    for name, matrix in checkpoint.matrices.items():
        yield _Weight(name, matrix)
    for name, vector in checkpoint.vectors.items():
        yield _Weight(name, vector)
    for layer, experts in enumerate(checkpoint.experts):
        row = 0
        for expert in range(checkpoint.config.num_experts):
            for kind in ("gate", "up", "down"):
                format = getattr(experts, kind)
                parts = tuple(experts.extents[row + part :][:1] for part in range(format.parts))
                row += format.parts
                name = f"layers.{layer}.mlp.experts.{expert}.{kind}_proj"
                yield _Weight(name, StoredMatrix(format, parts))
