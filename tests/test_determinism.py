"""Results are the same bits whatever the threads, the chunk size, and what was cached."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import TestEngine, random_ids

pytestmark = pytest.mark.reference
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


def test_caching_changes_no_bit(precision: str, checkpoint: GetCheckpoint) -> None:
    directory = checkpoint("mlx-4")
    ids = random_ids(300, 60)
    uncached = TestEngine(directory, precision=precision, cache_bytes=0)
    cached = TestEngine(directory, precision=precision, cache_bytes=1 << 30)
    first = uncached.logits(ids)
    for _ in range(2):
        assert np.array_equal(first, cached.logits(ids))
    stats = cached.native.stats()
    assert stats["expert_misses"] == stats["reads"]  # each expert was read once and then kept
    assert stats["expert_hits"] > 0
