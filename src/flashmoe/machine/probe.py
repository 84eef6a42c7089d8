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
    granted = _cgroup_memory()
    return free if granted is None else min(free, granted)


def total_memory() -> int:
    """Bytes of memory in the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    import resource  # noqa: PLC0415

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def beyond_caches() -> int:
    """Bytes of which the processor's caches hold only a part: 256 MB, 1 GB where caches are so."""
    caches = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [_read(path) or "0" for path in caches.glob("index*/size")]
    largest = max(
        (int(s.rstrip("KM")) * (1 << 20 if "M" in s else 1 << 10) for s in sizes), default=0
    )
    return min(max(256 << 20, 2 * largest), 1 << 30)


def memory_rate(threads: int) -> float:
    """Bytes a second that so many threads read from memory together, measured in about 0.3 s."""
    import threading  # noqa: PLC0415

    import numpy as np  # noqa: PLC0415

    size = beyond_caches() // threads
    # Of numpy's reductions this one asks least of the processor.
    parts = [np.ones(size, np.uint8) for _ in range(threads)]
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


def disk_rate(
    files: Sequence[Path],
    block: int,
    seconds: float = 0.5,
    readers: int = 4,
    *,
    pause: float = 0.0,
    cached: bool = False,
) -> float | None:
    """Bytes a second of reads of `block` bytes at random places, past the page cache.

    `readers` of them begin together and the next when all are done and `pause` seconds are over, as
    a layer's experts are read and then computed: drives that are rented out give more to those who
    pause. With `cached` each place is read twice through the page cache and the second counts.
    None where that cannot be measured: files too small, or no way to read past the cache.
    """
    import mmap  # noqa: PLC0415
    import random  # noqa: PLC0415
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415

    block = max(block // 4096, 1) * 4096
    try:
        candidates = [f for f in files if f.stat().st_size >= 4 * block]
    except OSError:
        return None
    if not candidates:
        return None
    choose = random.Random(readers)
    buffers = [mmap.mmap(-1, block) for _ in range(readers)]  # page-aligned, as direct reads ask

    def read(reader: int, path: Path, place: int) -> int:
        descriptor = os.open(path, os.O_RDONLY) if cached else _open_uncached(path)
        with open(descriptor, "rb", buffering=0) as file:
            file.seek(place)
            return file.readinto(buffers[reader])

    total, spent = 0, 0.0
    deadline = time.perf_counter() + seconds
    try:
        with ThreadPoolExecutor(readers) as pool:
            while total == 0 or time.perf_counter() < deadline:
                paths = [choose.choice(candidates) for _ in range(readers)]
                places = [
                    choose.randrange((p.stat().st_size - block) // 4096) * 4096 for p in paths
                ]
                for counts in (False, True) if cached else (True,):
                    start = time.perf_counter()
                    nbytes = sum(pool.map(read, range(readers), paths, places))
                    if counts:
                        total += nbytes
                        spent += time.perf_counter() - start
                time.sleep(pause)
    except OSError:
        return None
    return total / spent


def _open_uncached(path: Path) -> int:
    """A descriptor whose reads go past the page cache. Raises OSError where there is no such."""
    if sys.platform == "darwin":
        import fcntl  # noqa: PLC0415

        descriptor = os.open(path, os.O_RDONLY)
        fcntl.fcntl(descriptor, fcntl.F_NOCACHE, 1)
        return descriptor
    return os.open(path, os.O_RDONLY | os.O_DIRECT)


def processor() -> str:
    """Its name, like "Apple M3 Max"; "" where the system does not tell."""
    if sys.platform == "darwin":
        return _sysctl_text("machdep.cpu.brand_string") or ""
    lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
    return next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), "")


def _sysctl(name: str) -> int | None:
    try:
        return int(_sysctl_text(name) or "")
    except ValueError:
        return None


def _sysctl_text(name: str) -> str | None:
    try:
        command = ["sysctl", "-n", name]
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _cgroup(controller: str) -> list[Path]:
    """The cgroup of this process and those around it, innermost first: v2, or v1's controller."""
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            root = _CGROUP / controller
        elif controllers == "" and (_CGROUP / "cgroup.controllers").exists():
            root = _CGROUP
        else:
            continue
        # Within a container the path may be the host's, which is not to be seen.
        folder = root / path.lstrip("/")
        inner = [
            d for d in (folder, *folder.parents) if d.is_relative_to(root) and os.path.isdir(d)
        ]
        return inner or [root]
    return []


def _cpu_quota() -> float | None:
    """Cores that the cgroups grant; None without a limit."""
    quotas = []
    for folder in _cgroup("cpu"):
        fields = (_read(folder / "cpu.max") or "").split()
        if len(fields) != 2:
            fields = [_read(folder / f"cpu.cfs_{x}_us") or "-1" for x in ("quota", "period")]
        if fields[0] not in ("max", "-1"):
            quotas.append(int(fields[0]) / int(fields[1]))
    return min(quotas, default=None)


def _cgroup_memory() -> int | None:
    """Bytes that the cgroups still grant, pages of files counted as free; None without a limit."""
    left = []
    for folder in _cgroup("memory"):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            text = _read(folder / limit)
            if text is None or text == "max" or int(text) >= 1 << 60:
                continue
            stat = dict(line.split() for line in (_read(folder / "memory.stat") or "").splitlines())
            files = sum(
                int(stat.get(f"total_{kind}", stat.get(kind, 0)))
                for kind in ("inactive_file", "active_file")
            )
            left.append(max(0, int(text) - int(_read(folder / used) or 0) + files))
    return min(left, default=None)
