"""Packs in processes that are killed at one step after the other; for test_pack.py.

    python kill_pack.py SOURCE SCRATCH WHOLE

WHOLE is a pack of SOURCE that nothing disturbed. Prints how many moments were tried. It is a
program of its own because it forks, which pytest's process, full of threads, must not.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.errors import CheckpointError
from flashmoe.pack.pack import pack

PWRITE, RENAME = os.pwrite, os.rename


def run(source: Path, directory: Path, moment: int | None) -> tuple[bool, bytes]:
    """Packs, killed at step `moment`; whether it was, and a letter for every step done: w for a
    write, r for a rename. A write that the kill meets is half done."""
    read, write = os.pipe()
    if not (child := os.fork()):
        done = 0

        def step(kind: bytes, call: Callable[[], Any], half: Callable[[], Any]) -> Any:
            nonlocal done
            if done == moment:
                half()
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            os.write(write, kind)
            return call()

        def pwrite(file: int, data: memoryview, at: int) -> Any:
            half = data[: len(data) // 2]
            return step(b"w", lambda: PWRITE(file, data, at), lambda: PWRITE(file, half, at))

        def rename(path: Path, target: Path) -> Any:
            return step(b"r", lambda: RENAME(path, target), lambda: None)

        os.pwrite, os.rename = pwrite, rename  # type: ignore[assignment]
        pack(source, directory, threads=1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        steps = pipe.read()
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL, steps


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def check(directory: Path, expected: dict[str, bytes]) -> None:
    """What a kill leaves does not open, or is whole."""
    try:
        Checkpoint.open(directory)
    except CheckpointError:
        return
    assert content(directory) == expected


def main(source: Path, scratch: Path, whole: Path) -> None:
    os.fsync = lambda descriptor: None  # a kill loses nothing that the system was given
    expected = content(whole)
    killed, steps = run(source, scratch / "undisturbed", None)
    assert not killed and content(scratch / "undisturbed") == expected

    renames = {i for i, kind in enumerate(steps) if kind == ord("r")}
    moments = sorted({*renames, *(i + 1 for i in renames), *range(0, len(steps), 12)})
    for moment in moments:
        directory = scratch / str(moment)
        killed, _ = run(source, directory, moment)
        assert killed == (moment < len(steps))
        check(directory, expected)
        pack(source, directory, threads=1)
        assert content(directory) == expected, moment

    # Killed at the same step again and again, it ends: files that are complete are kept.
    kills = 0
    while run(source, scratch / "again", len(steps) * 3 // 4)[0]:
        check(scratch / "again", expected)
        kills += 1
    assert content(scratch / "again") == expected and kills
    print(len(moments))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
