"""benchmarks/make_checkpoint.py: checkpoints that open, and whose routing is diverse."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from flashmoe.checkpoint.headers import read_header
from flashmoe.checkpoint.open import Checkpoint


def test_tokens_spread_over_the_experts_of_every_layer(maker: ModuleType, tmp_path: Path) -> None:
    maker.make_checkpoint(tmp_path / "model", maker.PRESETS["tiny"])
    for routing in maker.measure(tmp_path / "model"):
        assert routing.tokens > 512
        assert routing.effective > 0.9 * 32
        assert routing.busiest < 0.3  # each token takes 4 of the 32


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_bias_is_half_the_levels_of_its_scale_exactly(
    maker: ModuleType, tmp_path: Path, bits: int
) -> None:
    maker.make_checkpoint(tmp_path / "model", maker.PRESETS["tiny"], bits=bits)
    (file,) = (tmp_path / "model").glob("*.safetensors")
    header = read_header(file)

    def values(name: str) -> np.ndarray:
        tensor = header[name]
        words = np.fromfile(file, np.uint16, tensor.nbytes // 2, offset=tensor.offset)
        return (words.astype(np.uint32) << 16).view(np.float32)

    path = "language_model.model.layers.0.mlp.switch_mlp.down_proj."
    np.testing.assert_array_equal(
        values(path + "biases"), -values(path + "scales") * 2 ** (bits - 1)
    )


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    maker: ModuleType, tmp_path: Path
) -> None:
    content = []
    for number, seed in enumerate((0, 0, 1)):
        directory = tmp_path / str(number)
        maker.make_checkpoint(directory, maker.PRESETS["tiny"], seed=seed)
        Checkpoint.open(directory)
        content.append([path.read_bytes() for path in sorted(directory.iterdir())])
    assert content[0] == content[1] != content[2]
