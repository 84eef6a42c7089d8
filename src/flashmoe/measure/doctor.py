"""A report on this machine: what it is, whether every backend is right here, and how fast.

Made to be run once by somebody with a machine that the authors have not, and sent to them.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe import hub
from flashmoe.errors import FlashMoeError
from flashmoe.machine import probe
from flashmoe.measure import kernels
from flashmoe.measure.family import FAMILY
from flashmoe.measure.kernels import Check
from flashmoe.measure.rates import cpu_rates, gpu_rates
from flashmoe.measure.specialised import needed
from flashmoe.measure.time_model import Prediction, Rates, bytes_by_layer, predict, text_hits

BOUND = 2e-3
"""How far logits may be from the CPU's in float32, as a share of their standard deviation."""
PROMPT, STEPS = 150, 16
READERS = (1, 2, 4, 8)
EXPERTS = {"397B, 4-bit": 7_077_888, "397B, 2-bit": 3_932_160, "35B, 4-bit": 1_769_472}
"""Bytes of an expert."""


@dataclass(frozen=True)
class Demo:
    """What one backend made of the demo model.

    Attributes:
        difference: the largest of any logit from the CPU's in float32, as a share of their standard
            deviation; None where it could not run.
        same_tokens: whether its likeliest tokens are the CPU's.
        error: why it could not run, or None.
    """

    difference: float | None = None
    same_tokens: bool = False
    error: str | None = None

    @property
    def good(self) -> bool:
        return self.difference is not None and self.difference <= BOUND and self.same_tokens


@dataclass(frozen=True)
class Latency:
    """Seconds beside the GPU's own work: from commit to its start, from its end to the host."""

    start: float
    wake: float


@dataclass(frozen=True)
class Reads:
    """Bytes a second of `block` bytes at random places: from the drive, and from the page cache."""

    name: str
    block: int
    readers: int
    cold: float | None
    warm: float | None


@dataclass
class BackendReport:
    """Of one backend.

    Attributes:
        device: what it says of itself; of a GPU also "compiler", all that the compiler said.
        compiled: a GPU's kernels, each with what it was specialised for.
        missing: those that the published models need and that were not.
        copy: bytes a second that a kernel with next to no arithmetic reads and writes.
        error: why it could not be opened, or None.
    """

    name: str
    device: dict[str, str] = field(default_factory=dict)
    compiled: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    copy: float | None = None
    latency: Latency | None = None
    demo: Demo = field(default_factory=Demo)
    predictions: dict[str, Prediction] = field(default_factory=dict)
    error: str | None = None

    @property
    def good(self) -> bool:
        right = self.demo.good and all(c.good for c in self.checks)
        return self.error is None and right and not self.missing


@dataclass
class Report:
    """All of it; `quick` where shapes were cut down, so that speeds mean nothing."""

    quick: bool
    machine: dict[str, Any]
    backends: list[BackendReport] = field(default_factory=list)
    reads: list[Reads] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return all(backend.good for backend in self.backends)

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return dataclasses.asdict(self) | {"good": self.good}


def examine(*, quick: bool = False) -> Report:
    """Examines this machine and every backend of this build; minutes, a few seconds if `quick`."""
    from flashmoe import _native  # noqa: PLC0415

    report = Report(quick, _machine())
    report.reads = list(_reads(quick))
    expected: Any = None
    for name in _native.backends():
        part = BackendReport(name)
        report.backends.append(part)
        try:
            ops = _open(name)
            part.device = ops.describe()
            part.checks = [
                kernels.check(ops, case, 2 if quick else 10) for case in kernels.cases(ops, quick)
            ]
            if part.device:
                part.compiled = ops.compiled()
                part.missing = sorted(needed() - set(part.compiled))
            part.copy = (
                kernels.copy_rate(ops, quick)
                if part.device
                else probe.memory_rate(probe.physical_cores())
            )
            if part.device and all(check.failure is None for check in part.checks):
                part.latency = _latency(ops)
            expected, part.demo = _demo(name, expected)
            if not quick and part.good:
                part.predictions = _predict(part, report.reads)
        except FlashMoeError as error:
            part.error = str(error)
    return report


def _machine() -> dict[str, Any]:
    import flashmoe  # noqa: PLC0415
    from flashmoe import _native  # noqa: PLC0415

    system = platform.mac_ver()[0]
    return {
        "flashmoe": flashmoe.__version__,
        "system": f"macOS {system}" if system else f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "processor": probe.processor(),
        "cores": probe.physical_cores(),
        "memory": probe.total_memory(),
        "memory_available": probe.available_memory(),
        "kernels": _native.cpu_kernels(),
    }


def _open(name: str) -> Any:
    from flashmoe import _native  # noqa: PLC0415
    from flashmoe.generate.engine import kernel_sources  # noqa: PLC0415

    threads = probe.physical_cores()
    return _native.ops.Backend("float32", threads, name, str(kernel_sources()))


def _latency(ops: Any) -> Latency:
    """Medians over small kernels, one at a time, as a layer waits for its router."""
    x, weight = np.ones((1, 64), np.float32), np.ones(64, np.float32)
    starts, wakes = [], []
    for _ in range(30):
        ops.rms_norm(x, weight, 1e-6)
        times = ops.times()
        starts.append(times["began"] - times["committed"])
        wakes.append(times["woken"] - times["ended"])
    return Latency(statistics.median(starts), statistics.median(wakes))


def _reads(quick: bool) -> Iterator[Reads]:
    """Of a temporary file where models are kept."""
    size = (32 << 20) if quick else (1 << 30)
    with tempfile.TemporaryDirectory(dir=_writable(hub.cache_place())) as directory:
        path = Path(directory) / "experts"
        block = np.random.default_rng(0).bytes(16 << 20)
        try:
            with path.open("wb") as file:
                for _ in range(size // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            return  # a full disk; the report has no reads
        for name, nbytes in EXPERTS.items():
            for readers in READERS:
                seconds = 0.02 if quick else 0.5
                cold = probe.disk_rate([path], nbytes, seconds, readers)
                warm = probe.disk_rate([path], nbytes, seconds, readers, cached=True)
                yield Reads(name, nbytes, readers, cold, warm)


def _writable(place: Path) -> Path | None:
    return place if os.access(place, os.W_OK) else None


def _demo(backend: str, expected: Any) -> tuple[Any, Demo]:
    """Runs the demo model in float32 and compares it with the CPU's logits, `expected`; None where
    this is the CPU, which then says what they are."""
    from flashmoe.generate.model import Model  # noqa: PLC0415

    ids = [int(i) for i in np.random.default_rng(1).integers(3, 6000, PROMPT + STEPS)]
    if expected is None:
        with Model("demo", backend="cpu", precision="float32") as model:
            expected = model.logits(ids)[PROMPT - 1 :]
    try:
        with Model("demo", backend=backend, precision="float32") as model:
            state = model.new_state()
            steps = [ids[:PROMPT], *([i] for i in ids[PROMPT:])]
            found = np.stack([model.logits(step, state=state)[-1] for step in steps])
    except FlashMoeError as error:
        return expected, Demo(error=str(error))
    difference = float(np.abs(found - expected).max() / expected.std())
    same = bool((found.argmax(1) == expected.argmax(1)).all())
    return expected, Demo(difference, same)


def _predict(part: BackendReport, reads: Sequence[Reads]) -> dict[str, Prediction]:
    """The published models by what was measured here."""
    on_mac = sys.platform == "darwin"
    measured = {r.readers: r for r in reads if r.block == max(EXPERTS.values())}
    found = measured.get(4)
    assert part.copy is not None
    predictions = {}
    for model in FAMILY:
        work = bytes_by_layer(model.config, model.format_of)
        if part.device:
            rates = _gpu(part)
        else:
            rates = cpu_rates(work.formats, probe.physical_cores(), part.copy, page_cache=on_mac)
        if found is not None and found.cold:
            rates = dataclasses.replace(rates, disk=found.cold)
        if found is not None and found.warm and rates.page_cache is not None:
            rates = dataclasses.replace(rates, page_cache=found.warm)
        room = max(0, probe.available_memory() - model.resident) / model.experts
        hits = text_hits(min(1.0, room))
        predictions[model.name.strip()] = predict(work, rates, model.experts_per_token, hits)
    return predictions


def _gpu(part: BackendReport) -> Rates:
    """An Apple GPU's rates as measured: of experts in 4 bits, and what waiting costs."""
    assert part.copy is not None
    rates = gpu_rates(part.copy, page_cache=True)
    experts = [c.rate for c in part.checks if re.match(r"\d+ experts .* 4-bit", c.name) and c.rate]
    latency = part.latency.start + part.latency.wake if part.latency else rates.wait
    product = statistics.median(experts) if experts else rates.product[""]
    return dataclasses.replace(rates, product={"": product}, wait=latency)
