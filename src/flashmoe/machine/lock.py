"""A lock for a few instructions that signal handlers and forked children may come upon."""

from __future__ import annotations

import os
import threading


class Lock:
    """Keeps threads apart, and nobody else waiting for ever.

    A signal handler that runs in the thread that holds it goes on. In a child that was forked while
    another thread held it, it is free.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if self._process != (process := os.getpid()):
            self._process, self._lock = process, threading.RLock()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
