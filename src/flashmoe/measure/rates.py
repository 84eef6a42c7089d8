"""This machine's rates, measured with the engine's own kernels, or another's from tables."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from flashmoe.checkpoint.table import Format
from flashmoe.machine import probe
from flashmoe.measure.time_model import (
    CPU_LAUNCHES,
    GPU_COMMAND_BUFFER,
    GPU_DISPATCH,
    GPU_PRODUCT,
    GPU_WAIT,
    METAL_LAUNCHES,
    PAGE_CACHE_RATE,
    Rates,
)

ASSUMED_DISK_RATE = 3e9
"""Bytes a second of a middling NVMe SSD, where nothing was stated and nothing can be measured."""


def gpu_rates(memory: float, *, page_cache: bool, disk: float = math.inf) -> Rates:
    """What an Apple GPU beside memory of such a bandwidth is expected to do."""
    return Rates(
        memory=memory,
        product={"": GPU_PRODUCT * memory},
        dispatch=GPU_DISPATCH,
        wait=GPU_WAIT + GPU_COMMAND_BUFFER,
        disk=disk,
        page_cache=PAGE_CACHE_RATE if page_cache else None,
        overlap=False,
        launches=METAL_LAUNCHES,
    )


def cpu_rates(
    formats: Mapping[str, Format],
    threads: int,
    memory: float,
    *,
    page_cache: bool,
    disk: float = math.inf,
) -> Rates:
    """What this machine's CPU does, measured in a second or two.

    `formats` are those of a model's matrices, as in TokenBytes.
    """
    from flashmoe import _native  # noqa: PLC0415

    backend = _native.ops.Backend("int8", threads)
    product: dict[str, float] = {}
    for name, format in formats.items():
        large, nbytes = random_matrix(format, probe.beyond_caches())
        x = np.ones((1, format.cols), np.float32)
        product[name] = nbytes / median_seconds(partial(backend.matmul, x, [large]), 5)
    main, format = next(iter(formats.items()))
    # An operation so small that its bytes do not matter.
    small, _ = random_matrix(format, 64 << 10)
    x = np.ones((1, format.cols), np.float32)
    return Rates(
        memory=memory,
        product=product | {"": product[main]},
        dispatch=median_seconds(partial(backend.matmul, x, [small]), 50),
        wait=0.0,
        disk=disk,
        page_cache=memory / 2 if page_cache else None,  # a copy reads and writes
        overlap=True,
        launches=CPU_LAUNCHES,
    )


def random_matrix(format: Format, nbytes: int) -> tuple[Any, int]:
    """A native matrix of that format's columns with rows for about so many bytes; its bytes."""
    from flashmoe import _native  # noqa: PLC0415

    rows = max(8, nbytes * format.rows // format.nbytes // 8 * 8)
    format = Format(rows, format.cols, format.dtype, format.bits, format.group)
    # Small numbers in float32, float16 and bfloat16 alike; as packed weights anything will do.
    block = np.random.default_rng(0).integers(0x3000, 0x3400, 1 << 16).astype(np.uint16)
    parts = [np.resize(block, format.part_bytes(part) // 2) for part in range(format.parts)]
    native = _native.ops.Matrix(rows, format.cols, format.dtype, parts, format.bits, format.group)
    return native, format.nbytes


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Of one call, after one to warm up."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
