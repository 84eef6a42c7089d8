"""Kernels compiled by Apple's own compiler give the right results in the executor: it is a GPU as
Apple's compiler understands one. They are MLX's, from its wheel for macOS:

    pip download --no-deps --only-binary=:all: --platform macosx_14_0_arm64 -d . mlx-metal==0.32.4
    FLASHMOE_MLX_METAL=. pytest tests/metal/test_apple.py
"""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import test_kernels as ours
from apple_kernels import build, missing_tools
from gpu_plans import Memory, matmul, rms_norm
from gpu_references import F32, Array, random_weight, rms_norm_reference
from shader_executor import DispatchError, Executor
from test_kernels import assert_close, empty, normal, rng

executor = ours.executor  # our kernels

MATVEC = "affine_qmv_fast_float_gs_64_b_4_batch_0_pr_0_hgs_0_r_4"
NORM = "rmsfloat32"
SOFTMAX = "block_softmax_float32"


@pytest.fixture(scope="module")
def apple(tmp_path_factory: pytest.TempPathFactory) -> Executor:
    wheels = sorted(Path(os.environ.get("FLASHMOE_MLX_METAL", "/nowhere")).glob("mlx_metal-*.whl"))
    if not wheels:  # tests download nothing; .ci/run does
        pytest.skip("needs MLX's wheel for macOS; see the top of this file")
    if missing_tools():
        pytest.skip(f"needs {' and '.join(missing_tools())}")
    library = zipfile.ZipFile(wheels[-1]).read("mlx/lib/mlx.metallib")
    return Executor(build(tmp_path_factory.mktemp("apple"), library, [MATVEC, NORM, SOFTMAX]))


def int32(value: int) -> Array:
    return np.array([value], np.int32)


def run(
    apple: Executor,
    kernel: str,
    groups: tuple[int, int],
    threads: int,
    buffers: list[Array],
    seed: int,
) -> None:
    """Runs a kernel whose buffers are bound at the indices 0, 1, ..."""
    memory = Memory(apple)
    try:
        table = np.array([memory.place(array) for array in buffers], np.uint64)
        apple.dispatch(kernel, (*groups, 1), threads, table.tobytes(), seed=seed)
        memory.download()
    finally:
        memory.free()


@pytest.mark.parametrize("seed", ours.SEEDS)
def test_matrix_times_vector(apple: Executor, executor: Executor, seed: int) -> None:
    r = rng()
    rows, columns = 24, 1024
    x, weight = normal(r, 1, columns), random_weight(r, rows, columns, 4, 64, F32)
    found, own = empty(1, rows), empty(1, rows)
    buffers = [*weight.arrays, x, found, int32(columns), int32(rows)]
    run(apple, MATVEC, (1, rows // 8), 64, buffers, seed)
    ours.runner(executor)(matmul(x, [weight], [own], [0]), seed)
    assert_close(found, x @ weight.values().T, 1e-6)
    assert_close(found, own, 1e-6)


@pytest.mark.parametrize("seed", ours.SEEDS)
@pytest.mark.parametrize("width", [96, 1030])
def test_rms_norm(apple: Executor, executor: Executor, width: int, seed: int) -> None:
    """Threadgroup memory and barriers."""
    r = rng()
    x, weight = normal(r, 3, width), normal(r, width)
    found, own = empty(3, width), empty(3, width)
    buffers = [x, weight, found, np.array([1e-6], np.float32), int32(width), int32(1)]
    run(apple, NORM, (3, 1), -(-width // 128) * 32, buffers, seed)
    ours.runner(executor)(rms_norm(x, weight, 1e-6, own), seed)
    assert_close(found, rms_norm_reference(x, weight, 1e-6), 1e-6)
    assert_close(found, own, 1e-6)


@pytest.mark.parametrize("seed", ours.SEEDS)
def test_softmax(apple: Executor, seed: int) -> None:
    x, found = normal(rng(), 2, 517) * 3, empty(2, 517)
    run(apple, SOFTMAX, (2, 1), 160, [x, found, int32(517)], seed)
    expected = np.exp(x.astype(np.float64))
    assert_close(found, expected / expected.sum(-1, keepdims=True), 1e-6)


def test_an_input_that_is_too_short(apple: Executor) -> None:
    x, found = normal(rng(), 1, 508), empty(1, 512)
    with pytest.raises(DispatchError, match="past the end"):
        run(apple, SOFTMAX, (1, 1), 128, [x, found, int32(512)], 1)
