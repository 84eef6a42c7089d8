"""The avx-vnni table, which few machines that run these tests can: what it is compiled to, and its
results where another encoding of the same instruction runs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "src/flashmoe_native"
SOURCE = NATIVE / "backend/cpu/kernels_avx_vnni.cpp"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wno-psabi", f"-I{NATIVE}"]
VECTORS = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
FEATURES = {
    "kernels_avx2.cpp": VECTORS,
    # AVX-512's vpdpbusd on 256 bits in place of AVX-VNNI's: the same operation, encoded by EVEX.
    "kernels_avx_vnni.cpp": [
        *VECTORS,
        "-mavx512vl",
        "-mavx512vnni",
        "-U__AVX512F__",
        "-D__AVXVNNI__",
        "-D_mm256_dpbusd_avx_epi32=_mm256_dpbusd_epi32",
    ],
}
SELECT = """
#include <cstdlib>
#include <string>
#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/kernels.h"
namespace flashmoe {
const Kernels* portable_kernels();
const Kernels* avx_vnni_kernels();
std::vector<const Kernels*> available_kernels() { return {portable_kernels(), avx_vnni_kernels()}; }
const Kernels& select_kernels() {
  return *available_kernels()[std::string(std::getenv("FLASHMOE_ISA")) == "avx-vnni"];
}
std::string cpu_kernels() { return select_kernels().name; }
}  // namespace flashmoe
"""


def compile_one(source: Path, out: Path, features: list[str]) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    command = [COMPILER, *FLAGS, *features, "-c", str(source), "-o", str(out)]
    built = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    if "-m" in built.stderr and "unrecognized" in built.stderr:
        pytest.skip("the compiler does not know AVX-VNNI, or compiles for another processor")
    assert built.returncode == 0, built.stderr
    return out


def test_it_needs_no_avx512(tmp_path: Path) -> None:
    if (objdump := shutil.which("objdump")) is None:
        pytest.skip("no objdump")
    compiled = compile_one(SOURCE, tmp_path / "kernels.o", [*VECTORS, "-mavxvnni"])
    command = [objdump, "-d", str(compiled)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # A VEX prefix of three bytes: c4; one of EVEX would begin with 62.
    codes = re.findall(r"^\s*[0-9a-f]+:\s+((?:[0-9a-f]{2} )+).*vpdpbusd", text, re.MULTILINE)
    assert len(codes) > 100
    assert {code.split()[0] for code in codes} == {"c4"}
    assert not re.search(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b", text)


def test_it_agrees_with_the_portable_table(tmp_path: Path) -> None:
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or "avx512_vnni" not in cpu.read_text():
        pytest.skip("this processor has no AVX-512 VNNI")
    select = tmp_path / "select.cpp"
    select.write_text(SELECT)
    names = ["kernels_portable", "kernels_avx_vnni", "cpu_backend", "scratch", "int8_inputs"]
    sources = [NATIVE / f"backend/cpu/{name}.cpp" for name in names]
    sources += [NATIVE / "core/memory.cpp", NATIVE / "core/thread_pool.cpp", select]
    sources += [ROOT / "tests/native/kernels_test.cpp"]
    objects = [
        compile_one(source, tmp_path / f"{source.stem}.o", FEATURES.get(source.name, []))
        for source in sources
    ]
    program = tmp_path / "kernels_test"
    command = [str(COMPILER), *map(str, objects), "-pthread", "-o", str(program)]
    subprocess.run(command, check=True, timeout=300)
    run = subprocess.run(
        [program, "avx-vnni"], check=False, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout + run.stderr
