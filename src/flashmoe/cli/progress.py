"""A bar on stderr for what takes long; lines now and then where stderr is no terminal."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SHOW_AFTER = 0.5
LINE_EVERY = 5.0


class Bar:
    """Called with (done, total), it shows how far a job is, once that has taken half a second.

    Args:
        label: what is being done.
        unit: "bytes", shown in GB, or what is counted.
    """

    def __init__(self, label: str, unit: str) -> None:
        self._label = label
        self._unit = unit
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._at = (0, 0)
        self._next_line = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def __call__(self, done: int, total: int) -> None:
        if done >= total:
            self._stop()
            return
        with self._lock:
            self._at = (done, total)
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=done, total=total, note=self._note())
                return
            if not sys.stderr.isatty():
                self._line()
            elif self._timer is None:
                # The bar is drawn by a thread of its own: the next call may be a minute away.
                self._timer = threading.Timer(SHOW_AFTER, self._show)
                self._timer.daemon = True
                self._timer.start()

    def _show(self) -> None:
        from rich.console import Console  # noqa: PLC0415
        from rich.progress import (  # noqa: PLC0415
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        with self._lock:
            if self._timer is None:
                return
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            done, total = self._at
            self._task = self._bar.add_task(
                self._label, completed=done, total=total, note=self._note()
            )
            self._bar.start()

    def _stop(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def _line(self) -> None:
        now = time.monotonic()
        if self._next_line == 0:
            self._next_line = now + LINE_EVERY
        elif now >= self._next_line:
            self._next_line = now + LINE_EVERY
            print(f"{self._label}: {self._note()}", file=sys.stderr, flush=True)

    def _note(self) -> str:
        done, total = self._at
        if self._unit == "bytes":
            return f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"
        return f"{done} of {total} {self._unit}"
