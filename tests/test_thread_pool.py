"""What threads share, under ThreadSanitizer: programs of tests/native, compiled here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "src/flashmoe_native"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.parametrize("subject", ["thread_pool", "turn"])
def test_threads_share_it_without_a_race(tmp_path: Path, subject: str) -> None:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / f"{subject}_test"
    sources = [ROOT / f"tests/native/{subject}_test.cpp", NATIVE / f"core/{subject}.cpp"]
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
