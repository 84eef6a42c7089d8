"""States that share keys and values: each reads its own, whoever writes."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from engines import TestEngine, random_ids

import flashmoe
from flashmoe import _native
from flashmoe.errors import StoppedError

PROMPT = random_ids(512, 300)
ONE, TWO = random_ids(512, 40, seed=2), random_ids(512, 40, seed=3)


@pytest.fixture(scope="module")
def engine() -> _native.Engine:
    return TestEngine(Path(flashmoe.__file__).parent / "demo_model").native


def alone(engine: _native.Engine, *parts: np.ndarray) -> np.ndarray:
    return engine.forward(engine.new_state(), np.concatenate(parts))


def test_a_fork_shares_keys_and_values_until_both_have_written(engine) -> None:
    state = engine.new_state()
    engine.forward(state, PROMPT)
    early, fork = state.fork(), state.fork()
    assert state.shared == early.shared == fork.shared
    recurrent = state.nbytes - state.shared[1]
    assert 0 < recurrent < state.nbytes

    one = engine.forward(state, ONE)  # writes behind the common end
    assert state.shared == fork.shared
    two = engine.forward(fork, TWO)  # finds it written, and gets a copy
    assert fork.shared[0] != state.shared[0] == early.shared[0]
    assert np.array_equal(one, alone(engine, PROMPT, ONE))
    assert np.array_equal(two, alone(engine, PROMPT, TWO))
    # Both go on where they are, and the third still holds the prompt alone.
    for going, ids in ((state, ONE), (fork, TWO)):
        assert np.array_equal(engine.forward(going, PROMPT), alone(engine, PROMPT, ids, PROMPT))
    assert early.position == len(PROMPT)
    assert np.array_equal(engine.forward(early, TWO), two)


def test_shared_caches_grow_for_all_who_share_them(engine) -> None:
    state = engine.new_state()
    engine.forward(state, PROMPT)
    forks = [state.fork()]
    for _ in range(4):
        engine.forward(state, PROMPT)
        forks.append(state.fork())
    assert {fork.shared for fork in forks} == {state.shared}
    for i, fork in enumerate(forks):
        expected = alone(engine, *[PROMPT] * (i + 1), ONE)
        assert np.array_equal(engine.forward(fork, ONE), expected)


def test_keys_and_values_are_written_again_in_place_when_nobody_else_has_them(engine) -> None:
    early = engine.new_state()
    engine.forward(early, PROMPT)
    late = early.fork()
    engine.forward(late, ONE)
    shared = early.shared
    del late
    assert np.array_equal(engine.forward(early, TWO), alone(engine, PROMPT, TWO))
    assert early.shared == shared


def test_a_cancelled_pass_leaves_its_state_and_those_that_share_with_it(engine) -> None:
    state = engine.new_state()
    engine.forward(state, PROMPT)
    fork = state.fork()
    request = _native.Request()
    timer = threading.Timer(0.05, request.cancel)
    timer.start()
    with pytest.raises(StoppedError):
        for _ in range(1000):
            engine.forward(state.fork(), PROMPT, request=request)
    timer.join()
    with pytest.raises(StoppedError):
        engine.forward(state, ONE, request=request)
    assert state.position == fork.position == len(PROMPT)
    for going in (state, fork):
        assert np.array_equal(engine.forward(going, TWO), alone(engine, PROMPT, TWO))


def test_a_fork_waits_for_no_turn_but_not_for_a_state_in_use(engine) -> None:
    begun = engine.new_state()
    engine.forward(begun, PROMPT)
    state = engine.new_state()
    request = _native.Request()

    def work() -> None:
        with pytest.raises(StoppedError):
            while True:
                engine.forward(state, PROMPT[:50], request=request)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert begun.fork().position == len(PROMPT)
        end, refused = time.monotonic() + 30, False
        while not refused and time.monotonic() < end:
            try:
                state.fork()
            except flashmoe.StateError as error:
                refused = "in use" in str(error)
        assert refused
    finally:
        request.cancel()
        thread.join()


def test_rows_passed_to_forward_are_counted(engine) -> None:
    before = engine.stats()["rows"]
    state = engine.new_state()
    engine.forward(state, PROMPT)
    engine.forward(state, ONE[:1])
    assert engine.stats()["rows"] - before == len(PROMPT) + 1
