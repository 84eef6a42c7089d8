"""`flashmoe pack`: a checkpoint written anew, quantised, in the layout that reads best.

A destination is either complete or does not open: every file is written under another name, synced
and renamed, and config.json, without which nothing opens, is the last. pack.json, the first, says
what the pack is made of, so that a run that was stopped is continued by the same command, and by no
other.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from flashmoe.checkpoint.index import INDEX
from flashmoe.checkpoint.json import read_json
from flashmoe.checkpoint.open import JOB, Checkpoint
from flashmoe.errors import ArgumentError, FlashMoeError, WriteError
from flashmoe.machine import probe
from flashmoe.pack.convert import convert_rows, convert_vector
from flashmoe.pack.layout import Plan, PlannedFile, RowBlock, VectorCopy, make_plan

log = logging.getLogger("flashmoe")

BITS = (2, 4, 8, 16)
GROUPS = (32, 64, 128)

# What a checkpoint has beside its weights, copied as it is.
_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
)
_LAYOUT = 1  # of pack.json: a pack begun by another version is not continued
_PARTIAL = ".partial"


@dataclass(frozen=True)
class PackSummary:
    """What `pack` made.

    Attributes:
        destination: the directory.
        nbytes: size of its safetensors files.
        written: how many of these bytes this run wrote; the others were there from an earlier one.
        dense: the modules, as config.json calls them, that stay at 16 bits because the group size
            does not divide their columns.
    """

    destination: Path
    nbytes: int
    written: int
    dense: tuple[str, ...]


def pack(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    bits: int = 4,
    group_size: int = 64,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PackSummary:
    """Writes `source` to `destination`, quantised as MLX does, an expert one contiguous extent.

    Every linear layer and the embedding get `bits` and `group_size`; the routers and the shared
    experts' gates 8 bits in groups of 64. Norms, convolutions and the like are kept. With 16 bits
    nothing is quantised: weights are bfloat16, or float16 where they were. A matrix that is stored
    with the wanted bits and group is copied.

    Stopped at any moment, even by a kill or a full disk, it is continued by calling it again.

    Args:
        source: a hub id, a directory, or "demo".
        destination: a new or empty directory, or one that the same call began to fill.
        threads: that convert; None takes every physical core.
        progress: called with the bytes that are complete and the bytes in all.
    Raises:
        ArgumentError: bits or a group size that do not exist; a destination that holds something
            else.
        CheckpointError: the source is damaged, or a weight to quantise is not finite.
        ReadError: the source cannot be read.
        WriteError: too little room on the disk, found before anything is written or on the way; an
            I/O error; another process is packing to the destination.
    """
    if bits not in BITS:
        raise ArgumentError(f"bits is {bits!r}; choose one of {', '.join(map(str, BITS))}")
    if group_size not in GROUPS:
        choices = ", ".join(map(str, GROUPS))
        raise ArgumentError(f"group_size is {group_size!r}; choose one of {choices}")
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads is {threads!r}; give at least 1")
    checkpoint = Checkpoint.open(source)
    plan = make_plan(checkpoint, bits, group_size)
    for path in plan.dense:
        log.warning("%s stays at 16 bits: groups of %d do not divide it", path, group_size)
    with _held(Path(destination)) as directory:
        _begin(directory, checkpoint, bits, group_size)
        job = _Job(directory, checkpoint, plan, threads or probe.physical_cores())
        job.run(progress or (lambda done, total: None))
    return PackSummary(directory, plan.nbytes, job.written, plan.dense)


@contextmanager
def _held(directory: Path) -> Iterator[Path]:
    """The directory, made where it is absent, for this process alone."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ArgumentError(f"{directory}: cannot hold a pack: {error.strerror}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WriteError(f"{directory}: another process is packing to it") from None
        yield directory
    finally:
        os.close(descriptor)


def _begin(directory: Path, checkpoint: Checkpoint, bits: int, group_size: int) -> None:
    """Writes pack.json, or checks that the one there is of the same job."""
    sources = [*checkpoint.files, checkpoint.directory / "config.json"]
    job = {
        "layout": _LAYOUT,
        "bits": bits,
        "group_size": group_size,
        # Modification times in nanoseconds. No paths: the pack may be published.
        "source": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in sources],
    }
    path = directory / JOB
    if path.exists():
        begun = read_json(path)
        changed = sorted(key for key in job | begun if job.get(key) != begun.get(key))
        if changed:
            raise ArgumentError(
                f"{directory}: was packed from another source or in another way ({JOB} differs in"
                f" {', '.join(changed)}); name a new directory, or remove this one"
            )
        return
    present = sorted(entry.name for entry in directory.iterdir())
    if set(present) - {JOB + _PARTIAL}:
        raise ArgumentError(
            f"{directory}: holds something else ({', '.join(present[:5])}); name a new directory"
        )
    _write_json(path, job)


class _Job:
    """One run: what is complete is kept, the rest is written."""

    def __init__(self, directory: Path, checkpoint: Checkpoint, plan: Plan, threads: int) -> None:
        self.directory = directory
        self.checkpoint = checkpoint
        self.plan = plan
        self.threads = threads
        self.written = 0

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Raises WriteError before anything is written where the disk is too small."""
        for leftover in self.directory.glob("*" + _PARTIAL):
            leftover.unlink()
        todo = [file for file in self.plan.files if not self._is_complete(file)]
        if not todo and (self.directory / "config.json").exists():
            progress(self.plan.nbytes, self.plan.nbytes)
            return
        needed = sum(file.size for file in todo)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise WriteError(
                f"{self.directory}: {_size(needed)} to write, {_size(free)} free; make room, or"
                " name a directory on another disk"
            )
        before = self.plan.nbytes - needed
        progress(before, self.plan.nbytes)
        for pattern in _COMPANIONS:
            for path in sorted(self.checkpoint.directory.glob(pattern)):
                if path.is_file():
                    _write_bytes(self.directory / path.name, path.read_bytes())

        def wrote(nbytes: int) -> None:
            self.written += nbytes
            progress(before + self.written, self.plan.nbytes)

        for file in todo:
            self._write(file, wrote)
        _write_json(self.directory / INDEX, self.plan.index)
        _write_json(self.directory / "config.json", self.plan.config)

    def _is_complete(self, file: PlannedFile) -> bool:
        path = self.directory / file.name
        return path.exists() and path.stat().st_size == file.size

    def _write(self, file: PlannedFile, wrote: Callable[[int], None]) -> None:
        with _replacing(self.directory / file.name) as out:
            out.truncate(file.size)
            _write_at(out, file.header, 0)
            wrote(file.size - sum(work.nbytes for work in file.work))
            pool = ThreadPoolExecutor(self.threads)
            try:
                futures = [pool.submit(self._convert, out, work) for work in file.work]
                for future in as_completed(futures):
                    wrote(future.result())
            finally:
                pool.shutdown(cancel_futures=True)

    def _convert(self, out: BinaryIO, work: RowBlock | VectorCopy) -> int:
        files = self.checkpoint.files
        if isinstance(work, VectorCopy):
            _write_at(out, convert_vector(files, work.source), work.offset)
        else:
            parts = convert_rows(files, work.name, work.source, work.target, work.first, work.count)
            for part, offset in zip(parts, work.offsets, strict=True):
                _write_at(out, part, offset)
        return work.nbytes


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to; once what was written is on the disk, it takes the place of `path`."""
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with partial.open("wb") as out:
            yield out
            os.fsync(out.fileno())
        partial.replace(path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, FlashMoeError):
            raise WriteError(
                f"{path}: cannot be written: {error.strerror}; what is complete is kept: make room"
                " and run the same command again"
            ) from error
        raise


def _write_at(out: BinaryIO, data: Any, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(out.fileno(), view, offset)
        view, offset = view[written:], offset + written


def _write_bytes(path: Path, data: bytes) -> None:
    with _replacing(path) as out:
        _write_at(out, data, 0)


def _write_json(path: Path, value: Any) -> None:
    _write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.3f} MB"
