"""The shaders hold to Metal's types and address spaces, as clang sees them (PyPI libclang)."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from shader_executor import ROOT, SHADERS

cindex = pytest.importorskip("clang.cindex", reason="needs libclang")

SHIM = ROOT / "tests" / "metal" / "typecheck"
MODES = {
    "opencl": ["-x", "clcpp", "-cl-std=clc++2021", "-cl-no-stdinc", "-target", "spir64"],
    "numbered": ["-x", "c++", "-std=c++14", "-nostdinc"],
}
FILES = sorted(path.name for path in SHADERS.glob("*.metal"))


def problems(shader: Path, mode: str, extra: Sequence[str] = ()) -> list[str]:
    """What clang says against a shader, "file:line: message"."""
    options = [*MODES[mode], "-D__METAL_VERSION__=300", f"-I{SHIM}", f"-I{shader.parent}", *extra]
    options += ["-Wall", "-Wextra", "-Wno-unused-function", "-Wno-unknown-attributes"]
    unit = cindex.Index.create().parse(str(shader), args=options)
    return [
        f"{Path(str(d.location.file)).name}:{d.location.line}: {d.spelling}"
        for d in unit.diagnostics
        if d.severity >= cindex.Diagnostic.Warning
    ]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FILES)
def test_shaders_are_well_typed(name: str, mode: str) -> None:
    assert problems(SHADERS / name, mode) == []


def test_every_kernel_is_listed_once() -> None:
    sources = "".join((SHADERS / name).read_text() for name in FILES)
    header = (SHADERS / "arguments.h").read_text()
    listed = re.findall(
        r"X\((\w+)\)", header.split("#define FLASHMOE_KERNELS(X)")[1].split("//")[0]
    )
    assert sorted(listed) == sorted(re.findall(r"KERNEL\((\w+), ", sources))


def check_arguments(shaders: Path) -> None:
    """A kernel has its struct at index 0, as plans bind it, and nothing without [[...]], which
    would compile in Metal and take whatever index is next.
    """
    for name in FILES:
        source = (shaders / name).read_text()
        for kernel, text in re.findall(r"KERNEL\((\w+), \w+\)\((.*?)\)\s*\{", source, re.DOTALL):
            struct, *places = (" ".join(argument.split()) for argument in text.split(","))
            assert re.fullmatch(r"constant \w+& args \[\[buffer\(0\)\]\]", struct), kernel
            for place in places:
                assert re.fullmatch(r"uint3? \w+ \[\[\w+\]\]", place), f"{kernel}: {place}"


def test_a_kernel_has_one_struct_at_index_0() -> None:
    check_arguments(SHADERS)


def memory_of_threads(shader: Path, out: Path) -> list[str]:
    """Variables that stay in a thread's memory when clang has optimised a shader without unrolling
    a loop that is not told to, and without knowing a function constant: "function: variable".
    """
    options = [*MODES["opencl"], "-D__METAL_VERSION__=300", f"-I{SHIM}", f"-I{shader.parent}"]
    command = ["clang-19", *options, "-w", "-O2", "-fno-unroll-loops", "-S", "-emit-llvm"]
    subprocess.run([*command, str(shader), "-o", str(out)], check=True)
    found, function = [], ""
    for line in out.read_text().splitlines():
        if line.startswith("define "):
            function = line.split("@")[1].split("(")[0]
        if " = alloca " in line:
            found.append(f"{function}: {line.split('alloca ')[1]}")
    return found


@pytest.mark.skipif(not shutil.which("clang-19"), reason="needs clang-19")
@pytest.mark.parametrize("name", FILES)
def test_arrays_of_a_thread_are_in_registers(name: str, tmp_path: Path) -> None:
    """Metal's compiler unrolls no loop by itself whose bound is a function constant, and an array
    that a loop indexes lives in memory then (a report elsewhere: 333 ms in place of 56).
    """
    assert memory_of_threads(SHADERS / name, tmp_path / "out.ll") == []
