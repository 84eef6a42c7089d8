"""The thread pool under ThreadSanitizer: tests/native/thread_pool_test.cpp, compiled here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "src/flashmoe_native"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


def test_every_task_runs_once_without_a_race(tmp_path: Path) -> None:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "thread_pool_test"
    sources = [ROOT / "tests/native/thread_pool_test.cpp", NATIVE / "core/thread_pool.cpp"]
    command = [COMPILER, "-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", "-Wall"]
    command += ["-Wextra", "-Werror", f"-I{NATIVE}", *map(str, sources), "-o", str(program)]
    built = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if "cannot find" in built.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([program], check=False, capture_output=True, text=True, timeout=300)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("this kernel's address space layout is too random for ThreadSanitizer")
    assert run.returncode == 0, run.stdout + run.stderr
