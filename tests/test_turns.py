"""Threads on one native engine take turns; a signal handler in the middle of a call is refused."""

import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from engines import DEMO, TestEngine, random_ids
from interrupts import in_the_middle_of_a_pass

import flashmoe
from flashmoe import _native

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="needs a timer that sends signals"
)
PROMPT = random_ids(512, 300)


@pytest.fixture
def engine() -> _native.Engine:
    return TestEngine(DEMO).native


def one_pass(engine: _native.Engine) -> Callable[[], np.ndarray]:
    return lambda: engine.forward(engine.new_state(), PROMPT)


def calls(engine: _native.Engine) -> dict[str, Callable[[], object]]:
    """Everything that uses an engine or a state of it and waits for its turn."""
    state, other = engine.new_state(), engine.new_state()
    tensors = other.export()
    return {
        "stats": engine.stats,
        "layer_times": engine.layer_times,
        "new_state": engine.new_state,
        "forward": lambda: engine.forward(state, PROMPT[:3]),
        "export": other.export,
        "restore": lambda: other.restore(0, tensors),
    }


def test_a_signal_handler_in_the_middle_of_a_pass_is_refused_and_the_pass_goes_on(engine) -> None:
    expected = engine.forward(engine.new_state(), PROMPT)
    refused = []

    def call_all() -> None:
        for name, call in uses.items():
            with pytest.raises(flashmoe.StateError, match="in the middle of a call"):
                call()
            refused.append(name)

    uses = calls(engine)
    assert np.array_equal(in_the_middle_of_a_pass(engine, one_pass(engine), call_all), expected)
    assert refused == list(uses)
    assert np.array_equal(engine.forward(engine.new_state(), PROMPT), expected)


def test_another_thread_waits_for_the_pass_without_the_gil(engine) -> None:
    uses = calls(engine)
    ended: list[str] = []
    threads = [
        threading.Thread(target=lambda name=name, call=call: (call(), ended.append(name)))
        for name, call in uses.items()
    ]

    def start_all() -> None:
        for thread in threads:
            thread.start()
        time.sleep(0.2)  # with the GIL they would hold this thread up for ever
        assert ended == []

    in_the_middle_of_a_pass(engine, one_pass(engine), start_all)
    for thread in threads:
        thread.join()
    assert sorted(ended) == sorted(uses)


def test_a_model_is_closed_after_the_pass_of_another_thread(engine) -> None:
    expected = engine.forward(engine.new_state(), PROMPT)
    closing = threading.Thread(target=engine.close)
    logits = in_the_middle_of_a_pass(engine, one_pass(engine), closing.start)
    assert np.array_equal(logits, expected)
    closing.join()
    with pytest.raises(flashmoe.StateError, match="closed"):
        engine.new_state()
