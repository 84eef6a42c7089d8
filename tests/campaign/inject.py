"""Faults of the system at every Nth call, Ctrl-C at any moment, and kills.

Needs shim.so loaded before everything else (LD_PRELOAD); run.py sees to it.
"""

import ctypes
import errno
import gc
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from damage import MESSAGES, WORDS, Bases, greedy
from workers import Case, WrongError

import flashmoe
from flashmoe import _native
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.pack.pack import pack

# In the order of shim.c.
OPERATIONS = ["open", "read", "pread", "fstat", "stat", "map", "write", "fsync", "rename"]
OPERATIONS += ["unlink", "mkdir", "truncate", "lock", "thread", "seek", "statvfs", "list"]
OPERATIONS += ["close", "new", "chmod"]
MODES = ["once", "always", "short", "end", "interrupted"]

SHIM = ctypes.CDLL(None)

# nanobind's own table of objects ends the program where it cannot grow (it does so outside of any
# call that could fail); it is grown here, and no fault falls into it.
_KEPT = [_native.Format(1, 1, "F32") for _ in range(2000)]

Step = Callable[[], None]


def arm(operation: str, nth: int, mode: str, code: int, prefix: Path) -> None:
    SHIM.shim_arm(
        OPERATIONS.index(operation),
        ctypes.c_long(nth),
        MODES.index(mode),
        code,
        os.fsencode(prefix),
    )


def disarm() -> bool:
    """Whether anything failed."""
    return bool(SHIM.shim_disarm())


class NotReachedError(Exception):
    """There is no Nth call: a sweep is over."""


class Injection:
    """Scenarios into which a fault falls; `folder` is where a child writes."""

    def __init__(self, bases: Bases, folder: Path) -> None:
        self.bases = bases
        self.folder = folder

    def plan(self) -> list[tuple[str, str, str, int, bool]]:
        """Scenario, operation, mode, errno, and whether the files are those that are written."""
        reads = ["open", "read", "pread", "fstat", "stat", "seek", "close", "list"]
        plan = []
        for scenario in ("open", "open, direct", "open packed"):
            plan += [(scenario, o, "once", errno.EIO, False) for o in (*reads, "map", "thread")]
            plan += [(scenario, "new", "once", 0, False)]
            plan += [(scenario, o, "always", errno.EIO, False) for o in reads]
            plan += [(scenario, o, "end", 0, False) for o in ("read", "pread")]
            plan += [(scenario, o, "short", 0, False) for o in ("read", "pread")]
            plan += [(scenario, "open", "once", e, False) for e in (errno.EMFILE, errno.EACCES)]
            plan += [(scenario, "pread", "interrupted", errno.EINTR, False)]
        for scenario in ("generate", "generate, direct"):
            plan += [(scenario, o, "once", errno.EIO, False) for o in ("pread", "map", "new")]
            plan += [(scenario, "pread", m, errno.EIO, False) for m in ("always", "end", "short")]
            plan += [(scenario, "pread", "once", errno.EAGAIN, False)]
        writes = ["open", "write", "fsync", "rename", "unlink", "close", "chmod", "stat", "fstat"]
        plan += [("save", o, m, errno.ENOSPC, True) for o in writes for m in ("once", "always")]
        plan += [(s, "new", "once", 0, True) for s in ("save", "chat", "pack")]
        plan += [("save", "write", "short", errno.ENOSPC, True)]
        plan += [("save", "write", "interrupted", errno.EINTR, True)]
        plan += [("load", o, "once", errno.EIO, True) for o in (*reads, "map", "new")]
        plan += [("load", "read", m, 0, True) for m in ("short", "end")]
        plan += [("chat", o, "once", errno.EIO, False) for o in reads]
        writes += ["mkdir", "truncate", "lock", "statvfs", "list", "thread"]
        plan += [("pack", o, "once", errno.ENOSPC, True) for o in writes]
        plan += [("pack", o, "once", errno.EIO, True) for o in writes]
        plan += [("pack", "write", m, errno.ENOSPC, True) for m in ("always", "short")]
        plan += [("pack", o, "once", errno.EIO, False) for o in reads]
        plan += [("pack", "pread", m, 0, False) for m in ("short", "end")]
        return plan

    def case(
        self, scenario: str, operation: str, mode: str, code: int, written: bool, nth: int
    ) -> Case:
        function: Callable[[Step], str] = {
            "open": partial(self.open, self.bases.model, 0),
            "open, direct": partial(self.open, self.bases.model, 1),
            "open packed": partial(self.open, self.bases.packed, 0),
            "generate": partial(self.generate, 0),
            "generate, direct": partial(self.generate, 1),
            "save": self.save,
            "load": self.load,
            "chat": self.chat,
            "pack": self.pack,
        }[scenario]
        prefix = self.folder if written else self.bases.directory

        def run() -> str:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            SHIM.shim_watch(os.fsencode(prefix))  # marks what is opened before the fault as well
            begun = _held(self.folder, self.bases.directory)
            result = function(partial(arm, operation, nth, mode, code, prefix))
            gc.collect()
            if (left := _held(self.folder, self.bases.directory)) != begun:
                raise WrongError(f"left behind: {left}, before {begun}")
            return result

        return run

    def attempt(self, begin: Step, call: Callable[[], Any]) -> tuple[Any, str]:
        """What a call gives with the fault in it, or None, and a word for how it ended."""
        begin()
        try:
            result = call()
        except flashmoe.FlashMoeError as error:
            if not disarm():
                raise WrongError(f"fails without a fault: {error}") from error
            return None, type(error).__name__
        finally:
            fired = disarm()
        if not fired:
            raise NotReachedError
        return result, "goes on"

    def open(self, directory: Path, cache: int, begin: Step) -> str:
        def once() -> list[int]:
            with flashmoe.Model(directory, threads=2, cache=cache) as model:
                return greedy(model, [1, 2, 3], 4, None)

        result, word = self.attempt(begin, once)
        expected = self.bases.expected["tokens"] if directory == self.bases.model else once()
        if (result is not None and result != expected) or once() != expected:
            raise WrongError(f"tokens {result}")
        return word

    def generate(self, cache: int, begin: Step) -> str:
        with flashmoe.Model(self.bases.model, threads=2, cache=cache) as model:
            state = model.new_state()
            got: list[int] = []

            def some() -> None:
                options = {"max_tokens": 4, "temperature": 0, "ignore_eos": True}
                for token in model.generate([1, 2, 3], state=state, **options):
                    got.append(token.id)

            _, word = self.attempt(begin, some)
            # A fault before the prompt was taken leaves the state without it.
            prompt = [] if state.position else [1, 2, 3]
            rest = greedy(model, prompt, 4 - len(got), state) if len(got) < 4 else []
            if got + rest != self.bases.expected["tokens"]:
                raise WrongError(f"tokens {got} and then {rest}")
            for _ in range(2):
                if greedy(model, [1, 2, 3], 4, None) != self.bases.expected["tokens"]:
                    raise WrongError("other tokens in a later call")
        return word

    def save(self, begin: Step) -> str:
        path = self.folder / "a.state"
        with flashmoe.Model(self.bases.model, threads=1, cache=0) as model:
            state = model.new_state()
            greedy(model, [1], 1, state)
            state.save(path)
            before = path.read_bytes()
            greedy(model, [2, 3, 4], 1, state)
            result, word = self.attempt(begin, lambda: state.save(path) or True)
            after = path.read_bytes()
            state.save(self.folder / "b.state")
            whole = (self.folder / "b.state").read_bytes()
        if after != (whole if result else before):
            raise WrongError(f"the file is neither the old nor the new one; {word}")
        # Where even removing it fails, the temporary file stays.
        if len(list(self.folder.iterdir())) > (2 if word == "goes on" else 3):
            raise WrongError("files left behind")
        return word

    def load(self, begin: Step) -> str:
        path = self.folder / "a.state"
        shutil.copyfile(self.bases.state, path)
        with flashmoe.Model(self.bases.model, threads=1, cache=0) as model:
            state, word = self.attempt(begin, lambda: flashmoe.State.load(model, path))
            state = state or flashmoe.State.load(model, path)
            if greedy(model, [], 4, state) != self.bases.expected["after"]:
                raise WrongError("other tokens")
        return word

    def chat(self, begin: Step) -> str:
        def once() -> list[int]:
            with flashmoe.Model(self.bases.model, threads=1, cache=0) as model:
                begin()
                answer = model.chat(MESSAGES, max_tokens=2, temperature=0)
                model.generate(WORDS, max_tokens=0)
                return [getattr(piece, "id", 0) for piece in answer]

        result, word = self.attempt(lambda: None, once)
        begin = lambda: None  # noqa: E731
        if result is not None and result != once():
            raise WrongError(f"tokens {result}")
        return word

    def pack(self, begin: Step) -> str:
        out = self.folder / "out"
        expected = {
            path.name: data
            for path, data in self.bases.files.items()
            if path.parent == self.bases.packed
        }

        def once() -> bool:
            pack(self.bases.model, out, bits=4, group_size=32, threads=2)
            return True

        def content() -> dict[str, bytes]:
            return {path.name: path.read_bytes() for path in out.iterdir()}

        result, word = self.attempt(begin, once)
        if result and content() != expected:
            raise WrongError("another pack")
        if out.exists():
            try:
                Checkpoint.open(out)
            except flashmoe.CheckpointError:
                pass
            else:
                if content() != expected:
                    raise WrongError("what is not complete opens")
        once()
        if content() != expected:
            raise WrongError("another pack when it is continued")
        return word

    # Ctrl-C and kills

    def interrupted(self, seed: int) -> str:
        """Ctrl-C while a model generates, a state is saved or loaded, or a pack is written."""
        draw = random.Random(seed)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return (self._stop_generating, self._stop_saving, self._stop_packing)[seed % 3](draw)

    def _stop_generating(self, draw: random.Random) -> str:
        options = {"temperature": 0, "ignore_eos": True}
        with flashmoe.Model(self.bases.model, threads=2, cache=draw.choice((0, 1))) as model:
            state = model.new_state()
            prompt = [1, 2, 3] * draw.choice((1, 40))
            stopped = _interrupting(
                draw.uniform(0.0005, 0.06),
                lambda: list(model.generate(prompt, max_tokens=400, state=state, **options)),
            )
            before = list(state.tokens[len(prompt) :])
            if state.position:
                before += greedy(model, [], 3, state)
                if before != greedy(model, prompt, len(before), None):
                    raise WrongError("other tokens after Ctrl-C")
        return "stopped" if stopped else "was over"

    def _stop_saving(self, draw: random.Random) -> str:
        path = self.folder / "a.state"
        shutil.copyfile(self.bases.state, path)
        before = path.read_bytes()
        with flashmoe.Model(self.bases.model, threads=1, cache=0) as model:
            state = flashmoe.State.load(model, path)
            tokens = state.tokens

            def again() -> None:
                for _ in range(8):
                    state.save(path)
                    flashmoe.State.load(model, path)

            stopped = _interrupting(draw.uniform(0.0002, 0.02), again)
            if path.read_bytes() != before or flashmoe.State.load(model, path).tokens != tokens:
                raise WrongError("the file is another")
        return "stopped" if stopped else "was over"

    def _stop_packing(self, draw: random.Random) -> str:
        out = self.folder / "out"
        stopped = _interrupting(
            draw.uniform(0.001, 0.08),
            lambda: pack(self.bases.model, out, bits=4, group_size=32, threads=1),
        )
        self._check_pack(out)
        return "stopped" if stopped else "was over"

    def killed(self, seed: int) -> str:
        """A process that is killed while it saves or packs; another goes on."""
        draw = random.Random(seed)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        path, out = self.folder / "a.state", self.folder / "out"
        shutil.copyfile(self.bases.state, path)
        saving = seed % 2 == 0
        child = os.fork()
        if child == 0:
            try:
                if saving:
                    with flashmoe.Model(self.bases.model, threads=1, cache=0) as model:
                        state = flashmoe.State.load(model, path)
                        while True:
                            state.save(path)
                pack(self.bases.model, out, bits=4, group_size=32, threads=1)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0.01, 0.25))
        os.kill(child, signal.SIGKILL)
        killed = os.waitpid(child, 0)[1] == signal.SIGKILL
        if saving:
            with flashmoe.Model(self.bases.model, threads=1, cache=0) as model:
                state = flashmoe.State.load(model, path)
                if greedy(model, [], 4, state) != self.bases.expected["after"]:
                    raise WrongError("other tokens")
        else:
            self._check_pack(out)
        return "killed" if killed else "was over"

    def _check_pack(self, out: Path) -> None:
        """What is there does not open or is whole, and the same command finishes it."""
        expected = {
            path.name: data
            for path, data in self.bases.files.items()
            if path.parent == self.bases.packed
        }
        if out.exists():
            try:
                Checkpoint.open(out)
            except flashmoe.CheckpointError:
                pass
            else:
                if {p.name: p.read_bytes() for p in out.iterdir()} != expected:
                    raise WrongError("what is not complete opens")
        pack(self.bases.model, out, bits=4, group_size=32, threads=1)
        if {p.name: p.read_bytes() for p in out.iterdir()} != expected:
            raise WrongError("another pack when it is continued")


def sweep(
    injection: Injection,
    run: Callable[[list[Case]], Iterator[Any]],
    row: Any,
    at: int,
    most: int,
) -> Iterator[Any]:
    """Outcomes of a fault at every Nth call from N = at to most, until there is none."""
    while at <= most:
        batch = range(at, min(at + 32, most + 1))
        for outcome in run([injection.case(*row, nth) for nth in batch]):
            if outcome.kind == "foreign" and outcome.detail.startswith("NotReachedError"):
                return
            yield outcome
        at = batch.stop


def _interrupting(seconds: float, call: Callable[[], Any]) -> bool:
    """Whether Ctrl-C, so many seconds from now, ended the call."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
        return False
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _held(*prefixes: Path) -> tuple[int, int]:
    """Open files below the prefixes, and threads."""
    files = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
        files += any(target.startswith(str(prefix)) for prefix in prefixes)
    return files, len(os.listdir("/proc/self/task"))
