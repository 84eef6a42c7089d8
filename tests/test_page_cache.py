"""With a cache of its own, a model does not leave experts in the page cache as well."""

import ctypes
import mmap
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from engines import TestEngine

from flashmoe.checkpoint.open import Checkpoint

LIBC = ctypes.CDLL(None)


def model(maker: ModuleType, directory: Path, offset: int) -> Path:
    """A small model whose data lies `offset` bytes past a multiple of 16 in its one file."""
    shape = replace(maker.PRESETS["tiny"], intermediate=1024)
    maker.make_checkpoint(directory, shape)
    (file,) = directory.glob("*.safetensors")
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    pad = (offset - 8 - length) % 16
    head = (length + pad).to_bytes(8, "little") + data[8 : 8 + length] + b" " * pad
    file.write_bytes(head + data[8 + length :])
    return file


def forget(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def cached(file: Path, offset: int, length: int) -> int:
    """How many pages of a range the page cache holds."""
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as view:
        first, end = offset // mmap.PAGESIZE, -(-(offset + length) // mmap.PAGESIZE)
        pages = (ctypes.c_ubyte * (end - first))()
        base = np.frombuffer(view, np.uint8).ctypes.data
        begin = ctypes.c_void_p(base + first * mmap.PAGESIZE)
        assert LIBC.mincore(begin, ctypes.c_size_t(len(pages) * mmap.PAGESIZE), pages) == 0
    return sum(page & 1 for page in pages)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not tell what its cache holds")
@pytest.mark.parametrize("offset", [0, 1])  # 1: not aligned for any kernel
def test_experts_in_slots_are_not_in_the_page_cache(
    offset: int, maker: ModuleType, tmp_path: Path
) -> None:
    file = model(maker, tmp_path / "model", offset)
    experts = [
        extent
        for layer in Checkpoint.open(file.parent).experts
        for _, *extent in layer.extents.tolist()
        if extent[1] >= 8 * mmap.PAGESIZE  # those whose pages are nearly all their own
    ]
    assert experts
    forget(file)
    if sum(cached(file, *extent) for extent in experts):
        pytest.skip("this file system keeps what it was told to forget")
    expected = TestEngine(file.parent).logits([5, 6, 7])
    forget(file)
    engine = TestEngine(file.parent, cache_bytes=64 << 20)
    assert (engine.logits([5, 6, 7]) == expected).all()
    left = sum(cached(file, *extent) for extent in experts)
    assert left * mmap.PAGESIZE < 0.3 * engine.native.stats()["bytes_read"]
