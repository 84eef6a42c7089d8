"""Runs cases in child processes: what ends, hangs or fills one is a finding, and the rest goes on.

A child runs one case after another and writes a line for each. Where it dies or is silent too long,
the case that it was at is to blame, and another child takes the next. The parent opens no model, so
that it has no threads when it forks.
"""

import json
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from flashmoe.errors import FlashMoeError

PATIENCE = 90
"""Seconds of silence that are a hang, on a machine that has more to do than this."""
MEMORY = 3 << 30
"""Bytes of address space that a child may add to what it begins with."""

Case = Callable[[], str]
"""Does something; a word for what came of it. May raise FlashMoeError, and nothing else."""


class WrongError(Exception):
    """A case went on, but not as it should: other tokens, another file, something left behind."""


@dataclass(frozen=True)
class Outcome:
    """kind is "ok", "refused", "foreign", "wrong", "crash", "hang"."""

    case: int
    kind: str
    detail: str
    message: str = ""


def run(cases: Sequence[Case]) -> Iterator[Outcome]:
    """The outcome of each case, in order."""
    at = 0
    while at < len(cases):
        for outcome in _child(cases, at):
            yield outcome
            at = outcome.case + 1


def _child(cases: Sequence[Case], at: int) -> Iterator[Outcome]:
    """Outcomes from case `at` on, until a child has gone through them or one is its end."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _work(cases, at, writing)
        finally:
            os._exit(0)
    os.close(writing)
    buffer, verdict = b"", "crash"
    try:
        while True:
            ready, _, _ = select.select([reading], [], [], PATIENCE)
            if not ready:
                verdict = "hang"
                break
            data = os.read(reading, 1 << 16)
            if not data:
                break
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                outcome = Outcome(**json.loads(line))
                at = outcome.case + 1
                yield outcome
    finally:
        os.close(reading)
        if verdict == "hang" or at < len(cases):  # or nobody asks for more
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    if at < len(cases):
        yield Outcome(at, verdict, f"status {status}")


def _work(cases: Sequence[Case], at: int, pipe: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 2)  # Rust says on stderr what panicked
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    if not os.environ.get("ASAN_OPTIONS"):
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))
    for number in range(at, len(cases)):
        os.write(pipe, (json.dumps(_outcome(number, cases[number]).__dict__) + "\n").encode())


def _outcome(number: int, case: Case) -> Outcome:
    try:
        return Outcome(number, "ok", case())
    except WrongError as error:
        return Outcome(number, "wrong", str(error)[:500])
    except FlashMoeError as error:
        message = str(error)
        if not message or len(message) > 4100 or not message.replace("\n", "").isprintable():
            return Outcome(number, "wrong", f"a message that cannot be shown: {message!r:.200}")
        return Outcome(number, "refused", type(error).__name__, message)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in frames][-4:]
        return Outcome(number, "foreign", f"{type(error).__name__}: {error} at {where}"[:500])
