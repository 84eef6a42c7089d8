"""The checkpoints that numpy makes are those of the libraries: same tensors, same settings."""

from pathlib import Path

import checkpoints
import libraries
import mlx.core as mx
import numpy as np
import pytest
import torch
from tensors import load, stored

from flashmoe.checkpoint.open import Checkpoint

EXTRA = ("model.visual.", "mtp.")  # what Qwen publishes beside the text model


@pytest.mark.parametrize("name", checkpoints.VARIANTS)
def test_numpy_makes_the_files_that_the_libraries_write(name: str, tmp_path: Path) -> None:
    ours = checkpoints.make(tmp_path / "ours", name)
    theirs = libraries.make(tmp_path / "theirs", name)
    assert Checkpoint.open(ours).config == Checkpoint.open(theirs).config
    found, expected = (
        {
            key: tensor
            for file in directory.glob("*.safetensors")
            for key, tensor in load(file).items()
            if not key.startswith(EXTRA)
        }
        for directory in (ours, theirs)
    )
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert np.array_equal(found[key].array, tensor.array), key
    if name in checkpoints.MLX:  # one file has an index too
        assert all((d / "model.safetensors.index.json").exists() for d in (ours, theirs))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_are_rounded_as_torch_and_mlx_round_them(dtype: str) -> None:
    random = np.random.default_rng(0)
    values = (random.standard_normal(100_000) * 10.0 ** random.uniform(-9, 4, 100_000)).astype("f4")
    values = np.append(values, np.float32([0, -0.0, 1.00390625, 1.01171875, 65504]))  # ties
    ours = stored(values, dtype).floats()
    theirs = torch.from_numpy(values).to(libraries.TORCH_DTYPES[dtype]).float().numpy()
    assert np.array_equal(ours, theirs)
    array = mx.array(values).astype(libraries.MLX_DTYPES[dtype]).astype(mx.float32)
    assert np.array_equal(ours, np.array(array))
