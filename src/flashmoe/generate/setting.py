"""How an engine computes, every value decided."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial

from flashmoe.checkpoint.config import ExpertsPerToken
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.machine import probe
from flashmoe.machine.budget import check_room, default_cache, prompt_chunk

_LEAST_RESERVE = 256 << 20  # bytes of memory that a cache never grows into


@dataclass(frozen=True)
class Setting:
    """How an engine computes, as `Model` takes it, every value decided."""

    experts_per_token: int
    backend: str
    precision: str
    threads: int
    cache_bytes: int
    chunk: int
    overlap: bool = False
    reserve: int = 0
    """Bytes of memory to leave to others: where they are reached the cache does not grow."""


def decide(
    checkpoint: Checkpoint,
    *,
    experts_per_token: ExpertsPerToken,
    backend: str,
    precision: str,
    threads: int | None,
    cache: int | None,
    context: int | None,
    overlap: bool,
) -> Setting:
    """The setting that `Model`'s arguments, with `cache` in bytes, mean on this machine now.

    Raises ArgumentError where they cannot be used, or memory has no room.
    """
    experts = checkpoint.config.experts_in_force(experts_per_token)
    threads = threads or probe.physical_cores()
    available = probe.available_memory()
    ask = partial(
        checkpoint.needs,
        experts,
        backend=backends_for(backend)[0],
        precision=precision,
        threads=threads,
    )
    # A context that is asked for is meant to be used: its keys and values have their place.
    keys = 0 if context is None else context * ask()["token"]
    if cache is None:
        cache = default_cache(ask, available - keys)
    planned = check_room(ask, cache, available, keys)
    return Setting(
        experts_per_token=experts,
        backend=backend,
        precision=precision,
        threads=threads,
        cache_bytes=cache,
        chunk=prompt_chunk(ask, available),
        overlap=overlap,
        # Half of what was not planned for: two programs do not plan the same memory.
        reserve=max(min(available * 15 // 100, (available - planned) // 2), _LEAST_RESERVE),
    )


def backends_for(choice: str) -> list[str]:
    """What `backend` stands for, to be tried in turn."""
    from flashmoe import _native  # noqa: PLC0415

    if choice != "auto":
        return [choice]
    on_mac = sys.platform == "darwin" and "metal" in _native.backends()
    return ["metal", "cpu"] if on_mac else ["cpu"]
