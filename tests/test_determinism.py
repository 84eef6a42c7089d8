"""Results are the same bits whatever the threads, the chunk size, and what was cached."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import TestEngine, random_ids

from flashmoe.checkpoint.open import Checkpoint

NAMES = ["odd", "next-ratio-4", "mlx-4", "mlx-2"]
GetCheckpoint = Callable[[str], Path]


@pytest.fixture(params=["float32", "int8"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("name", NAMES)
def test_threads_change_no_bit(name: str, precision: str, checkpoint: GetCheckpoint) -> None:
    directory = checkpoint(name)
    ids = random_ids(300, 100)
    one = TestEngine(directory, precision=precision, threads=1).logits(ids)
    for threads in (2, 3):
        many = TestEngine(directory, precision=precision, threads=threads).logits(ids)
        assert np.array_equal(one, many)


@pytest.mark.parametrize("name", NAMES)
def test_chunk_size_changes_no_bit(name: str, precision: str, checkpoint: GetCheckpoint) -> None:
    directory = checkpoint(name)
    ids = random_ids(300, 100)
    whole = TestEngine(directory, precision=precision, chunk=128).logits(ids)
    for chunk in (1, 7, 64):
        parts = TestEngine(directory, precision=precision, chunk=chunk).logits(ids)
        assert np.array_equal(whole, parts)


@pytest.mark.parametrize("name", NAMES)
def test_caching_changes_no_bit(name: str, precision: str, checkpoint: GetCheckpoint) -> None:
    directory = checkpoint(name)
    ids = random_ids(300, 60)
    uncached = TestEngine(directory, precision=precision, cache_bytes=0)
    cached = TestEngine(directory, precision=precision, cache_bytes=1 << 30)
    expected = uncached.logits(ids)
    assert np.array_equal(expected, cached.logits(ids))
    read_once = cached.native.stats()["reads"]
    assert np.array_equal(expected, cached.logits(ids))
    assert cached.native.stats()["reads"] == read_once  # the second pass found all in slots
    if hasattr(os, "posix_fadvise"):
        for file in directory.glob("*.safetensors"):
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert np.array_equal(expected, uncached.logits(ids))  # read from the disk
    # A cache that holds a part, read past the page cache.
    assert np.array_equal(
        expected, TestEngine(directory, precision=precision, cache_bytes=1).logits(ids)
    )


@pytest.mark.parametrize("name", NAMES)
def test_reading_ahead_changes_no_bit(name: str, checkpoint: GetCheckpoint) -> None:
    directory = checkpoint(name)
    config = Checkpoint.open(directory).config
    whole = TestEngine(directory, cache_bytes=1 << 30)
    # From prompts that need few experts of a layer to prompts that need all, into caches from a
    # few slots to nearly all: experts read ahead are used, kept, or were read for nothing.
    for cache in (
        0,
        whole.native.stats()["slot_bytes"] // 3,
        whole.native.stats()["slot_bytes"] - 1,
    ):
        engine = TestEngine(directory, cache_bytes=cache)
        for length in (5, 60, 14, 20, 64, 30):
            ids = random_ids(300, length, seed=length)
            assert np.array_equal(whole.logits(ids), engine.logits(ids))

    once = TestEngine(directory, cache_bytes=1 << 30)
    once.logits(random_ids(300, 64))
    stats = once.native.stats()
    experts = config.num_experts * len(config.layer_types)
    assert (stats["expert_hits"], stats["expert_misses"]) == (0, experts)
