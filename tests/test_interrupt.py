"""Ctrl-C while native code computes: the pass stops in the middle, and nothing is lost."""

import signal

import numpy as np
import pytest
from engines import DEMO, TestEngine, random_ids
from interrupts import in_the_middle_of_a_pass


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that sends signals")
def test_ctrl_c_stops_a_pass_in_the_middle_and_the_model_goes_on() -> None:
    prompt, after = random_ids(512, 600), random_ids(512, 5, seed=2)
    engine = TestEngine(DEMO, chunk=1024)  # the whole prompt in one pass
    begun = engine.native.new_state()
    expected = engine.logits(after, begun)
    states = []

    def work() -> None:
        states.append(begun.fork())
        engine.native.forward(states[-1], prompt)

    with pytest.raises(KeyboardInterrupt):
        in_the_middle_of_a_pass(engine.native, work, lambda: signal.raise_signal(signal.SIGINT))
    *whole, state = states
    assert all(other.position == len(after) + len(prompt) for other in whole)
    assert state.position == len(after)  # the pass did not end
    fresh = engine.native.new_state()
    assert np.array_equal(engine.logits(after, fresh), expected)
    assert np.array_equal(engine.logits(after, state), engine.logits(after, fresh))
