"""What transformers and mlx-lm gave for inputs made here, so that the fast layer needs neither.

`tests/reference/make_golden.py` writes the files; `tests/reference/test_golden.py` asserts that the
libraries still give this.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent / "golden"
ROWS = np.array([0, 1, 31, 62, 63, 64, 65, 69, 127, 128, 299])
"""Of 300 tokens, those whose logits are kept: chunks are of 64."""
DEMO_ROWS = ROWS[[0, 5, -1]]
SHORT = 70
"""Tokens of variants that are compared at one length: their golden rows are those below it."""

PERPLEXITY_TOKENS = 200
"""Of held-out text: mlx has no fast kernels for the CPU."""


def arrays(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file by name; "logits" has a variant's rows by `checkpoints.twin`."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def texts(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
