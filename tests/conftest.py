"""Fixtures that every test may use."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint("mlx-4") is the directory of that variant of tests/checkpoints.py, made once.

    A test that changes it copies it first.
    """
    from checkpoints import make  # noqa: PLC0415  (it imports torch, which most tests do not need)

    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        directory = root / name
        return directory if directory.exists() else make(directory, name)

    return get
