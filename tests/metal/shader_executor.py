"""Runs the Metal kernels of metal/ on the CPU, through tests/metal/executor: a Device of
gpu_plans.py.

    executor = Executor(build(directory))
    run_on(executor, rms_norm(x, weight, 1e-6, out))

Arrays lie in guarded memory, so that a read or write past their end fails.
"""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests" / "metal" / "executor"
SHADERS = ROOT / "metal"
CONSTANTS = 16
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


class _Dispatch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("threadgroups", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32 * 3),
        ("arguments", ctypes.c_char_p),
        ("arguments_length", ctypes.c_uint64),
        ("constants", ctypes.c_uint32 * CONSTANTS),
        ("constants_set", ctypes.c_uint32),
        ("seed", ctypes.c_uint32),
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

    def allocate(self, size: int) -> int:
        return int(self._library.executor_allocate(size))

    def upload(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, array.nbytes)

    def download(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def free(self, address: int) -> None:
        """Raises DispatchError where bytes just past the end were written."""
        error = self._library.executor_free(address)
        if error:
            raise DispatchError(error.decode())

    def launch(self, plan: Any, seed: int) -> None:
        """Raises DispatchError."""
        self.dispatch(plan.kernel, plan.grid, plan.threads, plan.arguments, plan.constants, seed)

    def dispatch(
        self,
        kernel: str,
        grid: Sequence[int],
        threads: int,
        arguments: bytes,
        constants: Sequence[int] = (),
        seed: int = 1,
    ) -> None:
        """As launch(). `constants` are the first of all; those beyond have no value."""
        dispatch = _Dispatch(kernel=kernel.encode(), seed=seed, arguments_length=len(arguments))
        dispatch.threadgroups[:] = grid
        dispatch.threads[:] = (threads, 1, 1)
        # (the executor takes no address for nothing; a c_char_p keeps every byte)
        dispatch.arguments = arguments or None
        for index, value in enumerate(constants):
            dispatch.constants[index] = value
            dispatch.constants_set |= 1 << index
        error = self._library.executor_run(ctypes.byref(dispatch))
        if error:
            raise DispatchError(error.decode())

    def synchronize(self) -> None:
        """(a launch returns when it is done)"""
