"""`flashmoe pack`: a checkpoint written anew, quantized, in the layout that reads best.

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
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from flashmoe.checkpoint.index import INDEX
from flashmoe.checkpoint.json import read_json
from flashmoe.checkpoint.open import JOB, Checkpoint
from flashmoe.checkpoint.table import StoredMatrix
from flashmoe.checkpoint.template import TEMPLATES
from flashmoe.errors import (
    ArgumentError,
    CheckpointError,
    FlashMoeError,
    OutOfMemoryError,
    ReadError,
    WriteError,
)
from flashmoe.machine import probe
from flashmoe.machine.files import (
    PART,
    is_there,
    names_in,
    read_file,
    replacing,
    to_path,
    write_at,
)
from flashmoe.pack.convert import convert_rows, convert_vector, rows_in_use
from flashmoe.pack.layout import Plan, PlannedFile, RowBlock, VectorCopy, make_plan

log = logging.getLogger("flashmoe")

BITS = (2, 4, 8, 16)
GROUPS = (32, 64, 128)

# What a checkpoint has beside its weights, copied as it is.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    f"{TEMPLATES}/*.jinja",
    "generation_config.json",
    "LICENSE*",
)
_LAYOUT = 1  # of pack.json: a pack begun by another version is not continued
_LARGEST_COMPANION = 1 << 30


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
    """Writes `source` to `destination`, quantized as MLX does, an expert one contiguous extent.

    Every linear layer and the embedding get `bits` and `group_size`; the routers and the shared
    experts' gates 8 bits in groups of 64. Norms, convolutions and the like are kept. With 16 bits
    nothing is quantized: weights are bfloat16, or float16 where they were. A matrix that is stored
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
        CheckpointError: the source is damaged, a weight to quantize is not finite, or there are
            zeros where no weight is zero, as a download leaves them that was never written.
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
    source_files = _Source(checkpoint)
    plan = make_plan(checkpoint, bits, group_size)
    for path in plan.dense:
        log.warning("%s stays at 16 bits: groups of %d do not divide it", path, group_size)
    with _held(to_path(destination)) as directory:
        _begin(directory, source_files, bits, group_size)
        job = _Job(directory, source_files, plan, threads or probe.physical_cores())
        job.run(progress or (lambda done, total: None))
    return PackSummary(directory, plan.nbytes, job.written, plan.dense)


@contextmanager
def _held(directory: Path) -> Iterator[Path]:
    """The directory, made where it is absent, for this process alone.

    What the system refuses within it becomes a WriteError, a thread that it does not grant an
    OutOfMemoryError.
    """
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
        except OSError as error:  # network file systems have no locks, or none of directories
            log.info("%s: cannot be locked (%s): pack to it only once", directory, error.strerror)
        yield directory
    except FlashMoeError:
        raise
    except OSError as error:
        where = error.filename or directory
        raise WriteError(
            f"{where}: the system refuses this: {error.strerror or error}; what is complete is"
            " kept: run the same command again"
        ) from error
    except MemoryError:
        raise OutOfMemoryError(
            f"{directory}: there is no memory to convert weights; give fewer threads"
        ) from None
    finally:
        with suppress(OSError):  # every file is complete, and said to be
            os.close(descriptor)


class _Source:
    """The files of a checkpoint, which must stay what they were when packing began."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._paths = [*checkpoint.files, checkpoint.directory / "config.json"]
        self._begun = [_status(path) for path in self._paths]

    def described(self) -> list[list[object]]:
        """Names, sizes and modification times in nanoseconds. No paths: packs are published."""
        return [
            [path.name, status.st_size, status.st_mtime_ns]
            for path, status in zip(self._paths, self._begun, strict=True)
        ]

    def require_unchanged(self) -> None:
        """Raises ReadError where a file is not the one it was."""
        for path, begun in zip(self._paths, self._begun, strict=True):
            now = _status(path)
            if (begun.st_ino, begun.st_size, begun.st_mtime_ns, begun.st_ctime_ns) != (
                now.st_ino,
                now.st_size,
                now.st_mtime_ns,
                now.st_ctime_ns,
            ):
                raise ReadError(
                    f"{path}: was changed or replaced while it was being packed, so that the"
                    " pack is of two models and does not open; remove it, and pack again"
                )

    def companions(self) -> list[tuple[str, bytes]]:
        """What a checkpoint has beside its weights, to be copied as it is.

        Raises:
            CheckpointError: one cannot be read, or is a link out of the checkpoint: who made it
                could have any file of this machine published.
        """
        directory = self.checkpoint.directory
        found = []
        names = names_in(directory)
        if (directory / TEMPLATES).is_dir():
            names += [f"{TEMPLATES}/{name}" for name in names_in(directory / TEMPLATES)]
        for name in names:
            path = directory / name
            if path.is_dir() or not any(fnmatch(name, pattern) for pattern in _COMPANIONS):
                continue
            if not _belongs(path, directory):
                raise CheckpointError(
                    f"{path}: is a link to {path.resolve()}, outside of the checkpoint; if it is"
                    " meant to be packed, put the file itself there"
                )
            found.append((name, read_file(path, _LARGEST_COMPANION)))
        return found


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ReadError(f"{path}: cannot be looked at: {error.strerror}") from error


def _belongs(path: Path, directory: Path) -> bool:
    """Whether a file is the directory's own, or in the hub's cache, where files are links."""
    real, home = path.resolve(), directory.resolve()
    snapshots = home.parent
    blobs = snapshots.parent / "blobs"
    return real.is_relative_to(home) or (snapshots.name == "snapshots" and real.parent == blobs)


def _begin(directory: Path, source: _Source, bits: int, group_size: int) -> None:
    """Writes pack.json, or checks that the one there is of the same job."""
    job = {
        "layout": _LAYOUT,
        "bits": bits,
        "group_size": group_size,
        "source": source.described(),
    }
    path = directory / JOB
    if is_there(path):
        begun = read_json(path)
        changed = sorted(key for key in job | begun if job.get(key) != begun.get(key))
        if changed:
            raise ArgumentError(
                f"{directory}: was packed from another source or in another way ({JOB} differs in"
                f" {', '.join(changed)}); name a new directory, or remove this one"
            )
        return
    present = [name for name in names_in(directory) if not fnmatch(name, PART)]
    if present:
        raise ArgumentError(
            f"{directory}: holds something else ({', '.join(present[:5])}); name a new directory"
        )
    _write_json(path, job)


class _Job:
    """One run: what is complete is kept, the rest is written."""

    def __init__(self, directory: Path, source: _Source, plan: Plan, threads: int) -> None:
        self.directory = directory
        self.source = source
        self.plan = plan
        self.threads = threads
        self.written = 0
        self._used: dict[str, int] = {}

    def run(self, progress: Callable[[int, int], None]) -> None:
        """Raises WriteError before anything is written where the disk is too small."""
        for name in names_in(self.directory):
            if fnmatch(name, PART):
                (self.directory / name).unlink()
        todo = [file for file in self.plan.files if not self._is_complete(file)]
        if not todo and is_there(self.directory / "config.json"):
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
        for name, data in self.source.companions():
            (self.directory / name).parent.mkdir(exist_ok=True)
            _write_bytes(self.directory / name, data)

        def wrote(nbytes: int) -> None:
            self.written += nbytes
            progress(before + self.written, self.plan.nbytes)

        for file in todo:
            self._write(file, wrote)
            self.source.require_unchanged()
        _write_json(self.directory / INDEX, self.plan.index)
        _write_json(self.directory / "config.json", self.plan.config)

    def _is_complete(self, file: PlannedFile) -> bool:
        path = self.directory / file.name
        return is_there(path) and path.stat().st_size == file.size

    def _write(self, file: PlannedFile, wrote: Callable[[int], None]) -> None:
        with replacing(self.directory / file.name) as out:
            os.ftruncate(out, file.size)
            write_at(out, file.header, 0)
            wrote(file.size - sum(work.nbytes for work in file.work))
            pool = ThreadPoolExecutor(self.threads)
            try:
                futures = [self._submit(pool, out, work) for work in file.work]
                for future in as_completed(futures):
                    wrote(future.result())
            finally:
                pool.shutdown(cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, out: int, work: RowBlock | VectorCopy
    ) -> Future[int]:
        try:
            return pool.submit(self._convert, out, work)
        except RuntimeError as error:  # of threading: can't start new thread
            raise OutOfMemoryError(
                f"{self.directory}: the system grants no thread ({error}); give fewer threads"
            ) from error

    def _convert(self, out: int, work: RowBlock | VectorCopy) -> int:
        files = self.source.checkpoint.files
        if isinstance(work, VectorCopy):
            write_at(out, convert_vector(files, work.name, work.source), work.offset)
        else:
            used = None
            if work.name.endswith(("embed_tokens", "lm_head")):
                used = self._used_rows(work.name, work.source)
            parts = convert_rows(
                files, work.name, work.source, work.target, work.first, work.count, used
            )
            for part, offset in zip(parts, work.offsets, strict=True):
                write_at(out, part, offset)
        return work.nbytes

    def _used_rows(self, name: str, source: StoredMatrix) -> int:
        if name not in self._used:  # more than one thread may find out
            self._used[name] = rows_in_use(self.source.checkpoint.files, source)
        return self._used[name]


def _write_bytes(path: Path, data: bytes) -> None:
    with replacing(path) as out:
        write_at(out, data, 0)


def _write_json(path: Path, value: Any) -> None:
    _write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e7 else f"{nbytes / 1e6:.3f} MB"
