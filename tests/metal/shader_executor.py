"""Runs the Metal kernels of metal/ on the CPU, through tests/metal/executor.

    executor = Executor(build(directory))
    executor.run("rms_norm", (tokens,), 1024, {0: x, 1: weight, 2: out, 3: arguments})

Arrays are passed in guarded memory, so that a read or write past their end fails, and what the
kernel wrote is copied back into them.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests" / "metal" / "executor"
SHADERS = ROOT / "metal"
BUFFERS, CONSTANTS = 31, 16
_PATTERN = "-ftrivial-auto-var-init=pattern"


class DispatchError(Exception):
    """What the executor found wrong with a dispatch."""


def compiler() -> str | None:
    """A C++ compiler of this machine."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    return None


def build(directory: Path, shaders: Path = SHADERS, flags: Sequence[str] = ()) -> Path:
    """Compiles executor and shaders into one library in `directory`; returns its path.

    Misaligned accesses trap, and locals without a value hold a pattern where the compiler can do
    that. Raises CalledProcessError with the compiler's words in `stderr`.
    """
    library = directory / "libexecutor.so"
    cxx = compiler()
    assert cxx
    command = [cxx, "-std=c++17", "-O2", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", *flags]
    if (
        subprocess.run(
            [cxx, _PATTERN, "-xc++", "-fsyntax-only", os.devnull], check=False, capture_output=True
        ).returncode
        == 0
    ):
        command.append(_PATTERN)
    command += ["-I", str(SOURCES / "include"), "-I", str(shaders)]
    command += [*map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


class _Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("length", ctypes.c_uint64)]


class _Dispatch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("threadgroups", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("buffers", _Buffer * BUFFERS),
        ("constants", ctypes.c_uint32 * CONSTANTS),
        ("constants_set", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
        ("used_buffers", ctypes.c_uint32),
        ("used_constants", ctypes.c_uint32),
    ]


class Executor:
    """The kernels of one library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.executor_run.argtypes = [ctypes.POINTER(_Dispatch)]
        self._library.executor_run.restype = ctypes.c_char_p
        self._library.executor_allocate.argtypes = [ctypes.c_uint64]
        self._library.executor_allocate.restype = ctypes.c_void_p
        self._library.executor_free.argtypes = [ctypes.c_void_p]
        self._library.executor_free.restype = ctypes.c_char_p

    def run(
        self,
        kernel: str,
        grid: Sequence[int],
        threads: int,
        buffers: Mapping[int, np.ndarray | bytes],
        constants: Mapping[int, int] | None = None,
        *,
        seed: int = 1,
    ) -> set[int]:
        """Runs `kernel` over `grid` threadgroups and returns the indices that it read.

        buffers: what is bound, by index; arrays receive what the kernel writes to them, an array
        that is bound twice is one buffer. Raises DispatchError.
        """
        dispatch = _Dispatch(kernel=kernel.encode(), seed=seed)
        dispatch.threadgroups[:] = (*grid, 1, 1)[:3]
        dispatch.threads[:] = (threads, 1, 1)
        for index, value in (constants or {}).items():
            dispatch.constants[index] = value
            dispatch.constants_set |= 1 << index
        guarded: dict[int, int] = {}
        problems: list[str] = []
        try:
            for index, array in buffers.items():
                size = array.nbytes if isinstance(array, np.ndarray) else len(array)
                if id(array) not in guarded:
                    guarded[id(array)] = self._library.executor_allocate(size)
                    data = array.tobytes() if isinstance(array, np.ndarray) else array
                    ctypes.memmove(guarded[id(array)], data, size)
                dispatch.buffers[index] = _Buffer(guarded[id(array)], size)
            error = self._library.executor_run(ctypes.byref(dispatch))
            if error:
                problems.append(error.decode())
            for array in buffers.values():
                if isinstance(array, np.ndarray) and array.flags.writeable:
                    ctypes.memmove(array.ctypes.data, guarded[id(array)], array.nbytes)
        finally:
            for data in guarded.values():
                error = self._library.executor_free(data)
                if error:
                    problems.append(error.decode())
        if problems:
            raise DispatchError("; ".join(problems))
        return {index for index in range(BUFFERS) if dispatch.used_buffers >> index & 1}
