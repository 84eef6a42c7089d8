"""Whether a model fits a machine, and how fast the time model says that it decodes there."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe import hub
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.table import Format
from flashmoe.errors import ArgumentError
from flashmoe.machine import chips, probe
from flashmoe.machine.budget import cache_for, parse_bytes
from flashmoe.measure.family import FAMILY, Published
from flashmoe.measure.rates import ASSUMED_DISK_RATE, cpu_rates, gpu_rates
from flashmoe.measure.time_model import (
    Prediction,
    Rates,
    TokenBytes,
    bytes_by_layer,
    predict,
    text_hits,
)

SLOW_DISK = 1e9
"""Bytes a second of a drive that experts cannot sensibly be read from."""


@dataclass(frozen=True)
class Target:
    """Where a model would run, and how.

    Attributes:
        machine: a Mac like "M3 Max 48GB"; None is this machine.
        disk_rate, memory_rate: bytes a second; None measures them, or takes the Mac's.
        threads: of the CPU; None is all physical cores.
        cache: memory for experts, as `Model` takes it.
    """

    machine: str | None = None
    disk_rate: float | None = None
    memory_rate: float | None = None
    threads: int | None = None
    cache: int | str | None = None

    def check(self) -> None:
        """Raises ArgumentError for a rate, a cache or a machine that cannot be."""
        for name, rate in (("disk", self.disk_rate), ("memory", self.memory_rate)):
            if rate is not None and not 0 < rate < math.inf:
                raise ArgumentError(f"the rate of the {name} must be more than 0; got {rate!r}")
        if self.cache is not None:
            parse_bytes(self.cache)
        if self.machine is not None:
            chips.find_chip(self.machine)


HERE = Target()


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts: always in memory, routed experts, all of its files."""

    resident: int
    experts: int
    disk: int


@dataclass(frozen=True)
class Fit:
    """A model on a machine; bytes, bytes a second.

    Attributes:
        machine: "this machine", or another's name.
        threads: of the CPU; None where a GPU computes.
        disk_free: None on another machine.
        present: the checkpoint lies here already, so that free disk is not needed.
        disk_rate_basis, memory_rate_basis: "measured" here, "stated" by the caller, "published" or
            "assumed".
        cached_share: of the experts, what memory has room for beside the resident part.
        prediction: decoding where all experts are equally likely, as on random tokens.
        on_text: likewise where they repeat as the 397B's do on text (time_model.TEXT_HITS).
    """

    machine: str
    backend: str
    threads: int | None
    memory: int
    memory_available: int
    disk_free: int | None
    present: bool
    fits_memory: bool
    fits_disk: bool
    disk_rate: float
    disk_rate_basis: str
    memory_rate: float
    memory_rate_basis: str
    cached_share: float
    prediction: Prediction
    on_text: Prediction

    @property
    def reads_disk(self) -> bool:
        return self.cached_share < 1

    @property
    def slow_disk(self) -> bool:
        return self.reads_disk and self.disk_rate < SLOW_DISK

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return dataclasses.asdict(self) | {
            "tokens_per_second": self.prediction.tokens_per_second,
            "prediction": self.prediction.to_dict(),
            "on_text": self.on_text.to_dict(),
        }


def fit_family(target: Target = HERE) -> list[tuple[Published, Fit]]:
    """The published models on a machine, from tables: no network, and no drive is measured."""
    target.check()
    works = [bytes_by_layer(model.config, model.format_of) for model in FAMILY]
    rates = _rates(target, {name: f for work in works for name, f in work.formats.items()})
    return [
        (model, fit_published(target, model, model.experts_per_token, rates)) for model in FAMILY
    ]


def fit_published(
    target: Target, model: Published, experts_per_token: int, rates: Rates | None = None
) -> Fit:
    """One of them with so many experts per token; see `fit_model`."""
    sizes = Sizes(model.resident, model.experts, model.disk)
    work = bytes_by_layer(model.config, model.format_of)
    return fit_model(target, sizes, work, experts_per_token, rates=rates)


def fit_model(
    target: Target,
    sizes: Sizes,
    work: TokenBytes,
    experts_per_token: int,
    here: Checkpoint | None = None,
    rates: Rates | None = None,
) -> Fit:
    """A model of such sizes on a machine.

    `here` is its checkpoint if its files can be read; `rates` are the machine's, where they have
    been measured.
    """
    chip = _chip(target)
    other = chip is not None and target.machine is not None
    rates = rates or _rates(target, work.formats)
    memory = chip.memory if chip and other else probe.total_memory()
    available = memory * 3 // 4 if other else probe.available_memory()
    cache = (
        cache_for(sizes.resident, sizes.experts, available, on_mac=chip is not None)
        if target.cache is None
        else parse_bytes(target.cache)
    )
    if cache:
        share, rates = cache / sizes.experts, dataclasses.replace(rates, page_cache=None)
    else:
        share = max(0, available - sizes.resident) / sizes.experts
    share = min(1.0, share)
    if target.disk_rate is not None:
        disk, disk_basis = target.disk_rate, "stated"
    elif chip is not None and other:
        disk, disk_basis = chip.disk, chip.disk_basis
    else:
        disk, disk_basis = ASSUMED_DISK_RATE, "assumed"
        if here is not None and share < 1:
            computing = predict(work, rates, experts_per_token, 1.0).seconds / len(work.layers)
            if rate := _measure_disk(here, experts_per_token, share, computing):
                disk, disk_basis = rate, "measured"
    rates = dataclasses.replace(rates, disk=disk)
    free = None
    if not other:
        free = shutil.disk_usage(here.directory if here else hub.cache_place()).free
    return Fit(
        machine=chip.name if chip and other else "this machine",
        backend="cpu" if chip is None else "metal",
        threads=_threads(target) if chip is None else None,
        memory=memory,
        memory_available=available,
        disk_free=free,
        present=here is not None,
        fits_memory=sizes.resident <= available,
        fits_disk=here is not None or free is None or sizes.disk <= free,
        disk_rate=disk,
        disk_rate_basis=disk_basis,
        memory_rate=rates.memory,
        memory_rate_basis="stated" if target.memory_rate else "published" if chip else "measured",
        cached_share=share,
        prediction=predict(work, rates, experts_per_token, share),
        on_text=predict(work, rates, experts_per_token, text_hits(share)),
    )


def _chip(target: Target) -> chips.Chip | None:
    """The Mac that is meant; None for this machine where it is none."""
    return chips.this_chip() if target.machine is None else chips.find_chip(target.machine)


def _threads(target: Target) -> int:
    return target.threads or probe.physical_cores()


def _rates(target: Target, formats: Mapping[str, Format]) -> Rates:
    """The machine's, with experts in the page cache and no disk yet."""
    chip, threads = _chip(target), _threads(target)
    if chip is not None:
        return gpu_rates(target.memory_rate or chip.bandwidth, page_cache=True)
    memory = target.memory_rate or probe.memory_rate(threads)
    return cpu_rates(formats, threads, memory, page_cache=True)


def _measure_disk(
    here: Checkpoint, experts_per_token: int, share: float, computing: float
) -> float | None:
    """Reads as many experts at once as a token lacks in a layer, and pauses as if it computed."""
    readers = min(8, max(1, round(experts_per_token * (1 - share))))  # the engine reads 8 at once
    block = max(layer.expert_bytes for layer in here.experts)
    return probe.disk_rate(here.files, block, 1.0, readers, pause=computing)
