"""Whether this machine computes what it should: the demo model on every backend of this build."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flashmoe.errors import FlashMoeError

BOUND = 2e-3
"""How far logits may be from the CPU's in float32, as a share of their standard deviation."""
PROMPT, STEPS = 150, 16


@dataclass(frozen=True)
class Finding:
    """What one backend did.

    Attributes:
        backend: its name.
        difference: the largest of any logit from the CPU's in float32, as a share of their standard
            deviation; None where it could not run.
        same_tokens: whether its likeliest tokens are the CPU's.
        error: why it could not run, or None.
    """

    backend: str
    difference: float | None = None
    same_tokens: bool = False
    error: str | None = None

    @property
    def good(self) -> bool:
        return self.difference is not None and self.difference <= BOUND and self.same_tokens

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.backend}: FAILED: {self.error}"
        tokens = "the same tokens" if self.same_tokens else "OTHER TOKENS"
        verdict = "ok" if self.good else "FAILED"
        return (
            f"{self.backend}: {verdict}: demo model, a prompt of {PROMPT} and {STEPS} more tokens: "
            f"logits within {self.difference:.1e} of their standard deviation, {tokens}"
        )


def examine() -> Iterator[Finding]:
    """Runs the demo model on each backend, in float32, and compares it with the CPU."""
    from flashmoe import _native  # noqa: PLC0415
    from flashmoe.generate.model import Model  # noqa: PLC0415

    ids = [int(i) for i in np.random.default_rng(1).integers(3, 6000, PROMPT + STEPS)]
    with Model("demo", backend="cpu", precision="float32") as model:
        expected = model.logits(ids)
    for backend in _native.backends():
        try:
            with Model("demo", backend=backend, precision="float32") as model:
                state = model.new_state()
                steps = [ids[:PROMPT], *([i] for i in ids[PROMPT:])]
                found = np.stack([model.logits(step, state=state)[-1] for step in steps])
        except FlashMoeError as error:
            yield Finding(backend, error=str(error))
            continue
        theirs = expected[PROMPT - 1 :]
        difference = float(np.abs(found - theirs).max() / theirs.std())
        same = bool((found.argmax(1) == theirs.argmax(1)).all())
        yield Finding(backend, difference, same)
