"""Signals that certainly arrive while native code computes."""

import signal
import time
from collections.abc import Callable
from typing import TypeVar

import flashmoe
from flashmoe import _native

T = TypeVar("T")


def in_the_middle_of_a_pass(
    engine: _native.Engine, work: Callable[[], T], action: Callable[[], None]
) -> T:
    """Repeats `work`, a pass of the engine, until a signal handler has interrupted it and called
    `action` there, once; what that pass gave, or the exception that `action` raised in it.
    """
    done = False

    def handler(*_: object) -> None:
        nonlocal done
        try:
            engine.stats()
        except flashmoe.StateError:  # else it interrupted what is between two passes
            if not done:
                done = True
                action()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        end = time.monotonic() + 60
        while not done:
            result = work()
            assert time.monotonic() < end, "no handler was refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return result
