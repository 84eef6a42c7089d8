"""The native engine of a checkpoint, opened with its resident weights loaded."""

from __future__ import annotations

import atexit
import functools
import importlib.resources
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.errors import ArgumentError, DeviceError
from flashmoe.generate.setting import Setting, backends_for
from flashmoe.machine import probe

if TYPE_CHECKING:
    from flashmoe import _native

log = logging.getLogger("flashmoe")

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Engine:
    """An open native engine, and what its states are of: a checkpoint and a setting."""

    native: _native.Engine
    checkpoint: Checkpoint
    setting: Setting


def open_engine(checkpoint: Checkpoint, setting: Setting, progress: Progress | None) -> Engine:
    """The engine for a checkpoint.

    Raises:
        ArgumentError: a backend or kernels that are not here, or memory that is not granted.
        CheckpointError, ReadError: a weight is damaged or cannot be read.
        DeviceError: the GPU is absent, too small, or refuses a kernel.
    """
    from flashmoe import _native  # noqa: PLC0415

    try:
        _native.cpu_kernels()
    except ValueError as error:  # FLASHMOE_ISA names what this machine has not
        raise ArgumentError(str(error)) from error
    names = backends_for(setting.backend)
    for name in names[:-1]:
        try:
            return Engine(_load(checkpoint, setting, name, progress), checkpoint, setting)
        except DeviceError as error:
            log.warning('%s; going on with backend="cpu"', error)
    return Engine(_load(checkpoint, setting, names[-1], progress), checkpoint, setting)


@functools.cache
def kernel_sources() -> Path:
    """The directory of the GPU kernels' sources, if this build has any.

    In a zipped application it is a copy, which lives until exit: the GPU's compiler reads files.
    """
    found = importlib.resources.files("flashmoe").joinpath("metal")
    if isinstance(found, Path) or not found.is_dir():
        return Path(str(found))
    copy = Path(tempfile.mkdtemp(prefix="flashmoe-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for file in found.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def _load(
    checkpoint: Checkpoint, setting: Setting, backend: str, progress: Progress | None
) -> _native.Engine:
    from flashmoe import _native  # noqa: PLC0415

    if backend not in _native.backends():
        raise ArgumentError(
            f'backend "{backend}" is not in this build of flashmoe, which has '
            f"{', '.join(_native.backends())}; Metal needs macOS"
        )
    try:
        return _native.Engine(
            checkpoint.native_config(setting.experts_per_token),
            checkpoint.native,
            backend=backend,
            precision=setting.precision,
            threads=setting.threads,
            cache_bytes=setting.cache_bytes,
            chunk=setting.chunk,
            kernels=str(kernel_sources()),
            overlap=setting.overlap,
            may_grow=functools.partial(_may_grow, checkpoint.source, setting.reserve),
            progress=progress,
        )
    except MemoryError:
        raise ArgumentError(
            f"{checkpoint.source}: the system does not grant the memory for resident weights, "
            f"activations and a cache of {setting.cache_bytes / 1e9:.1f} GB; "
            f"{probe.available_memory() / 1e9:.1f} GB are available: give a smaller cache, and see "
            "what 'flashmoe info' says"
        ) from None


def _may_grow(source: str, reserve: int, nbytes: int) -> bool:
    """Whether the machine can spare so many bytes more for a cache of experts."""
    left = probe.available_memory()
    if left - nbytes >= reserve:
        return True
    log.warning(
        "%s: the cache of experts stays smaller than planned: %.2f GB of memory are left, and "
        "%.2f are kept for others",
        source,
        left / 1e9,
        reserve / 1e9,
    )
    return False
