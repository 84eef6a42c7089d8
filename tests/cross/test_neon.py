"""The NEON kernels compute what the portable ones do, on processors with and without each feature.

tests/native/kernels_test.cpp is compiled for arm64 by zig and run by qemu's user mode: no such
machine is needed. The kernels of the machine that runs this are compared with numpy by test_ops.py.
"""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "src/flashmoe_native"
QEMU = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
FLAGS = ["-target", "aarch64-linux-musl", "-std=c++20", "-O1", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Wextra", "-Werror"]
FEATURES = {
    "kernels_neon_dotprod.cpp": ["-mcpu=generic+dotprod"],
    "kernels_neon_i8mm.cpp": ["-mcpu=generic+dotprod+i8mm"],
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("ziglang", reason="zig compiles for arm64: pip install ziglang")
    if QEMU is None:
        pytest.skip("qemu-aarch64 runs it: apt install qemu-user")
    directory = tmp_path_factory.mktemp("neon")
    zig = [sys.executable, "-m", "ziglang", "c++", *FLAGS]

    def compile_one(source: Path) -> Path:
        out = directory / (source.name + ".o")
        features = FEATURES.get(source.name, [])
        command = [*zig, *features, f"-I{NATIVE}", "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True, timeout=600, cwd=directory)
        return out

    sources = [
        ROOT / "tests/native/kernels_test.cpp",
        *sorted((NATIVE / "backend/cpu").glob("*.cpp")),
        NATIVE / "core/memory.cpp",
        NATIVE / "core/thread_pool.cpp",
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    out = directory / "kernels_test"
    subprocess.run(
        [*zig, *map(str, objects), "-o", str(out)], check=True, timeout=600, cwd=directory
    )
    return out


@pytest.mark.parametrize(
    ("processor", "tables"),
    [
        ("cortex-a53", ["neon"]),
        ("neoverse-n1", ["neon", "neon-dotprod"]),
        ("max", ["neon", "neon-dotprod", "neon-i8mm"]),
    ],
)
def test_every_table_agrees_with_the_portable_one(
    program: Path, processor: str, tables: list[str]
) -> None:
    assert QEMU is not None
    command = [QEMU, "-cpu", processor, str(program), *tables]
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
