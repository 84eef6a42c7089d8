"""The shaders compile for an NVIDIA GPU, with NVRTC, which needs none (pip install '.[metal]').

benchmarks/metal_on_cuda runs them there, and `FLASHMOE_SHADERS_ON=cuda pytest
tests/metal/test_kernels.py` the tests of every kernel.
"""

import sys

import pytest
from gpu_references import BF16, F16, F32
from shader_executor import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "metal_on_cuda"))
import nvrtc


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    try:
        nvrtc.library()
    except (ImportError, OSError) as error:
        pytest.skip(str(error))  # it is made for Linux on x86-64


@pytest.mark.parametrize("file", sorted({path.name for path, *_ in nvrtc.kernels().values()}))
@pytest.mark.parametrize("form", [(4, 64, BF16), (2, 32, F16), (0, 0, F32)], ids=str)
def test_every_kernel_compiles_for_hopper(file: str, form: tuple[int, int, int]) -> None:
    cubin = nvrtc.compile_kernels(file, (*form, *form, form[2] and BF16, 2), "sm_90")
    for kernel, (path, *_) in nvrtc.kernels().items():
        assert path.name != file or f"cuda_{kernel}".encode() in cubin


def test_a_shader_that_does_not_compile_is_told() -> None:
    with pytest.raises(RuntimeError, match="undefined"):
        nvrtc.compile_source("void f() { undefined(); }", "sm_90")
