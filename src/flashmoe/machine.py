"""What this process has: cores, memory, disk. Linux and macOS."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def physical_cores() -> int:
    """Cores that this process may compute on: no hyper-thread twins, within affinity and quota."""
    if sys.platform == "darwin":
        # The performance cores: the others would make every step wait for them.
        return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or 1
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_read(Path(topology.format(cpu))) or str(cpu) for cpu in allowed}
    quota = _cpu_quota()
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def available_memory() -> int:
    """Bytes that may be allocated before the system swaps or kills, cgroup limits included."""
    if sys.platform == "darwin":
        return (_sysctl("hw.memsize") or 0) * 3 // 4
    free = total_memory()
    for line in (_read(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _cgroup_memory()
    return free if limit is None else max(0, min(free, limit - used))


def total_memory() -> int:
    """Bytes of memory in the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    import resource  # noqa: PLC0415

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_rate(threads: int) -> float:
    """Bytes a second that so many threads read from memory together, measured in about 0.2 s."""
    import threading  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415

    parts = [np.ones(8 << 20, np.float32) for _ in range(threads)]  # 32 MiB each: beyond the caches
    best = float("inf")
    for _ in range(4):
        workers = [threading.Thread(target=part.max) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = min(best, time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / best


def disk_rate(files: Sequence[Path], block: int, seconds: float = 0.5) -> float | None:
    """Bytes a second of reads of `block` bytes at random places, four at once, past the page cache.

    None where that cannot be measured: files too small, or no way to read past the cache.
    """
    import mmap  # noqa: PLC0415
    import random  # noqa: PLC0415
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    block = max(block // 4096, 1) * 4096
    candidates = [f for f in files if f.stat().st_size >= 4 * block]
    if not candidates or not hasattr(os, "O_DIRECT"):
        return None
    deadline = time.perf_counter() + seconds

    def read(seed: int) -> int:
        choose, total = random.Random(seed), 0
        buffer = mmap.mmap(-1, block)  # page-aligned, as direct reads ask
        while time.perf_counter() < deadline:
            path = choose.choice(candidates)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                place = choose.randrange((path.stat().st_size - block) // 4096) * 4096
                total += os.preadv(descriptor, [buffer], place)
            finally:
                os.close(descriptor)
        return total

    start = time.perf_counter()
    try:
        with ThreadPoolExecutor(4) as pool:
            total = sum(pool.map(read, range(4)))
    except OSError:
        return None
    return total / (time.perf_counter() - start)


def _sysctl(name: str) -> int | None:
    try:
        return int(subprocess.check_output(["sysctl", "-n", name], stderr=subprocess.DEVNULL))
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _cpu_quota() -> float | None:
    """Cores that the cgroup grants (v2, then v1); None without a limit."""
    fields = (_read(_CGROUP / "cpu.max") or "").split()
    if len(fields) != 2:
        quota, period = (_read(_CGROUP / "cpu" / f"cpu.cfs_{x}_us") for x in ("quota", "period"))
        fields = [quota or "-1", period or "100000"]
    if fields[0] in ("max", "-1"):
        return None
    return int(fields[0]) / int(fields[1])


def _cgroup_memory() -> tuple[int | None, int]:
    """The cgroup's memory limit (None without one) and what is used of it, in bytes."""
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        text = _read(_CGROUP / limit)
        if text is not None and text != "max" and int(text) < 1 << 60:
            return int(text), int(_read(_CGROUP / used) or 0)
    return None, 0
