"""The shaders hold to Metal's types and address spaces, as clang sees them (PyPI libclang)."""

import re
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
    options = [*MODES[mode], "-D__METAL_VERSION__=240", f"-I{SHIM}", f"-I{shader.parent}", *extra]
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
    assert sorted(listed) == sorted(re.findall(r"kernel void (\w+)\(", sources))


def check_indices(shaders: Path) -> None:
    """An argument without [[...]] would compile in Metal and take whatever index is next."""
    for name in FILES:
        source = (shaders / name).read_text()
        for kernel, arguments in re.findall(r"kernel void (\w+)\((.*?)\)\s*\{", source, re.DOTALL):
            indices = re.findall(r"\[\[buffer\((\w+)\)\]\]", arguments)
            assert len(indices) == len(set(indices)), kernel
            for argument in arguments.split(","):
                bound = "[[" in argument or argument.strip().endswith("_ARGUMENTS")
                assert bound, f"{kernel}: {argument.strip()}"


def test_every_argument_of_a_kernel_is_bound_to_an_index_of_its_own() -> None:
    check_indices(SHADERS)
