"""Apple's chips: what a Mac that is not at hand can be expected to do.

Bandwidths are Apple's own figures (support.apple.com, technical specifications of each Mac); where
a chip comes with two, the memory's size tells which. Of drives there is one published measurement
at the size of experts: 5.5 GB/s, M3 Max, 1 TB (the original engine's README). No other drive is
believed to be faster. What reviews measured with Blackmagic's sequential test stands where it is
less: 1.5 and 3.0 GB/s of M2 and M2 Pro with the smallest drives, 2.8 of an M1, 2.0 of an M4.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass

from flashmoe.errors import ArgumentError
from flashmoe.machine import probe


@dataclass(frozen=True)
class Chip:
    """A Mac; bytes, bytes a second.

    Attributes:
        bandwidth: of memory.
        disk: reads of experts at random places, past the page cache.
        disk_basis: "published" or "assumed".
    """

    name: str
    memory: int
    bandwidth: float
    disk: float
    disk_basis: str


_BANDWIDTH: dict[str, float | dict[int, float]] = {
    "M1": 68,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max": {36: 300, 48: 400, 64: 400, 96: 300, 128: 400},
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": {36: 410, 48: 546, 64: 546, 128: 546},
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max": {36: 460, 48: 614, 64: 614, 128: 614},
}
_DISK = {"M1": 2.8, "M2": 1.5, "M2 Pro": 3.0, "M3 Max": 5.5, "M4": 2.0}
_ASSUMED_DISK = {True: 5.5, False: 3.0}
"""Of Pro, Max and Ultra, and of others."""


def find_chip(name: str) -> Chip:
    """The Mac that "M3 Max 48GB" names.

    Raises:
        ArgumentError: there is no such chip, or not with so much memory.
    """
    match = re.fullmatch(r"(?:apple )?(m\d)(?: (pro|max|ultra))?,? *(\d{1,4}) ?gb", name.lower())
    chip = " ".join(part.title() for part in match.groups()[:2] if part) if match else ""
    if match is None or chip not in _BANDWIDTH:
        raise ArgumentError(
            f'a machine is a chip and its memory, like "M3 Max 48GB"; got {name!r}. Known are '
            f"{', '.join(_BANDWIDTH)}; for others give --memory-rate and --disk-rate"
        )
    memory, bandwidth = int(match[3]), _BANDWIDTH[chip]
    if isinstance(bandwidth, dict):
        if memory not in bandwidth:
            sizes = ", ".join(str(size) for size in bandwidth)
            raise ArgumentError(f"{chip} comes with {sizes} GB of memory; got {memory}")
        bandwidth = bandwidth[memory]
    disk = _DISK.get(chip)
    return Chip(
        f"{chip} {memory} GB",
        memory * 10**9,
        bandwidth * 1e9,
        1e9 * (disk or _ASSUMED_DISK[" " in chip]),
        "published" if disk else "assumed",
    )


def this_chip() -> Chip | None:
    """Of the Mac that this is; None elsewhere, and where the table does not know it."""
    if sys.platform != "darwin":
        return None
    gigabytes = round(probe.total_memory() / 2**30)
    try:
        return find_chip(f"{probe.processor()} {gigabytes}GB")
    except ArgumentError:
        return None
