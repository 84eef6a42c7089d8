"""Ctrl-C while native code computes: the pass stops in the middle, and nothing is lost."""

import os
import signal
import threading
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from engines import TestEngine, random_ids


@pytest.fixture(scope="module")
def deep(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many layers, so that one pass takes long and each layer little of it."""
    directory = tmp_path_factory.mktemp("interrupt") / "deep"
    shape = maker.Shape(128, 48, 4, 2, 64, 64, 320, 4, 2, 64, 2, 4, 32)
    maker.make_checkpoint(directory, shape)
    return directory


def test_ctrl_c_stops_a_pass_in_the_middle_and_the_model_goes_on(deep: Path) -> None:
    prompt, after = random_ids(300, 2000), random_ids(300, 5, seed=2)
    engine = TestEngine(deep, chunk=2048)  # the whole prompt in one pass
    state = engine.native.new_state()
    begun = engine.logits(after, state)
    began = time.monotonic()
    engine.native.forward(engine.native.new_state(), prompt)
    whole = time.monotonic() - began

    timer = threading.Timer(whole / 10, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        engine.native.forward(state, prompt)
    timer.join()
    assert state.position == len(after)  # the pass did not end
    fresh = engine.native.new_state()
    assert np.array_equal(engine.logits(after, fresh), begun)
    assert np.array_equal(engine.logits(after, state), engine.logits(after, fresh))
