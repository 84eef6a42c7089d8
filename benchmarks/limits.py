"""What a benchmark does to the machine around a process: memory, cold files, readahead."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

CGROUPS = Path("/sys/fs/cgroup")


def touch_memory(size: int) -> None:
    """Takes so many bytes of memory and gives them back, in a process of its own.

    The host of a virtual machine may provide memory only as it is first touched, and slowly: that
    is its time, not an engine's.
    """
    child = os.fork()
    if child == 0:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise SystemExit(f"the limit leaves no room for {size} bytes")


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[Callable[[], None]]:
    """A cgroup of `size` bytes below this process's own; gives what a child calls to join it.

    Version 2 (memory.max; the controller must be delegated) or 1 (memory.limit_in_bytes). Needs
    the right to make a group, which root has.
    """
    own = dict(
        line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()
    )
    if "memory" in own:
        group, file = CGROUPS / "memory" / own["memory"].lstrip("/"), "memory.limit_in_bytes"
    else:
        group, file = CGROUPS / own[""].lstrip("/"), "memory.max"
    inner = group / f"flashmoe-{os.getpid()}"
    inner.mkdir()
    try:
        (inner / file).write_text(str(size))
        yield lambda: (inner / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        inner.rmdir()


def drop(path: Path) -> None:
    """Takes a file out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _setting(path: Path) -> Path:
    device = path.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    queue = block / "queue"
    return (queue if queue.is_dir() else block.resolve().parent / "queue") / "read_ahead_kb"


@contextlib.contextmanager
def readahead(path: Path, kilobytes: int | None) -> Iterator[None]:
    """The readahead of the disk that holds `path`; None leaves it."""
    if kilobytes is None:
        yield
        return
    setting = _setting(path)
    before = setting.read_text()
    setting.write_text(str(kilobytes))
    try:
        yield
    finally:
        setting.write_text(before)


def readahead_of(path: Path) -> int:
    """KiB that the system reads ahead on the disk that holds `path`."""
    return int(_setting(path).read_text())
