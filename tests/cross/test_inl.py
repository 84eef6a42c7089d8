"""Every .inl of the CPU's kernels includes what it uses: it compiles alone, by the clang that zig
brings, after what simd.inl says that the including file does."""

import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "src/flashmoe_native"
KERNELS = NATIVE / "backend/cpu"
X86, ARM = ["-target", "x86_64-linux-musl"], ["-target", "aarch64-linux-musl"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512bf16"]
INSTRUCTIONS = {  # by the end of a file's name: lanes, header, flags
    "avx512": (16, "immintrin.h", [*X86, "-mavx2", "-mfma", "-mf16c", *AVX512]),
    "bf16": (16, "immintrin.h", [*X86, "-mavx2", "-mfma", "-mf16c", *AVX512]),
    "avx2": (8, "immintrin.h", [*X86, "-mavx2", "-mfma", "-mf16c", "-mbmi2"]),
    "neon": (4, "arm_neon.h", ARM),
    "portable": (4, "cstdint", X86),
}
PROGRAM = """\
#include <array>
#include <type_traits>
#include <utility>
#include <math.h>
#include <{header}>
#include "backend/cpu/kernels.h"
namespace flashmoe {{
namespace {{
constexpr int kLanes = {lanes};
constexpr const char* kName = "alone";
{define}
#define FLASHMOE_INT8_DOTS "backend/cpu/int8_{dots}.inl"
#include "backend/cpu/{file}"
}}
}}
"""


@pytest.mark.parametrize("file", sorted(path.name for path in KERNELS.glob("*.inl")))
def test_it_compiles_alone(file: str, tmp_path: Path) -> None:
    pytest.importorskip("ziglang", reason="its clang compiles: pip install ziglang")
    end = Path(file).stem.rpartition("_")[2]
    instructions = end if end in INSTRUCTIONS else "portable"
    lanes, header, flags = INSTRUCTIONS[instructions]
    source = tmp_path / "alone.cpp"
    define = "#define FLASHMOE_NEON" if instructions == "neon" else ""
    dots = "avx512" if instructions == "bf16" else instructions
    source.write_text(
        PROGRAM.format(header=header, lanes=lanes, define=define, dots=dots, file=file)
    )
    command = [sys.executable, "-m", "ziglang", "c++", *flags, "-std=c++20", "-Wno-psabi"]
    run = subprocess.run(
        [*command, f"-I{NATIVE}", "-c", str(source), "-o", str(tmp_path / "alone.o")],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
