"""Checkpoint.open finds the very bytes that transformers and mlx-lm find in what they write."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import libraries
import mlx.core as mx
import numpy as np
import pytest
import torch
from checkpoints import HUGGING_FACE, MLX
from libraries import MLX_DTYPES, TORCH_DTYPES, transformers_model
from table_reader import read

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.table import Extents, Format

Get = Callable[[str], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """As in tests/conftest.py, but written by the libraries."""
    root = tmp_path_factory.mktemp("libraries")

    def get(name: str) -> Path:
        directory = root / name
        return directory if directory.exists() else libraries.make(directory, name)

    return get


def read_dense(checkpoint: Checkpoint, extents: Extents, dtype: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(read(checkpoint, extents)), dtype=TORCH_DTYPES[dtype]).float()


def dequantized(checkpoint: Checkpoint, format: Format, parts: list[Extents]) -> np.ndarray:
    """float32 [rows, cols], by mlx."""
    if not format.bits:
        return (
            read_dense(checkpoint, parts[0], format.dtype).reshape(format.rows, format.cols).numpy()
        )
    words = np.frombuffer(read(checkpoint, parts[0]), np.uint32).reshape(format.rows, -1)
    scales, biases = (
        mx.array(np.frombuffer(read(checkpoint, part), np.uint8))
        .view(MLX_DTYPES[format.dtype])
        .reshape(format.rows, -1)
        for part in parts[1:]
    )
    weight = mx.dequantize(mx.array(words), scales, biases, format.group, format.bits)
    return np.array(weight.astype(mx.float32))


def expected_matrices(model: Any, config: Any) -> dict[str, torch.Tensor]:
    """transformers' matrices by canonical name, Qwen3-Next's taken apart by transformers itself."""
    result = {}
    for name, weight in model.state_dict().items():
        key = name.removeprefix("model.").removesuffix(".weight")
        if key.endswith(("in_proj_qkvz", "in_proj_ba")) or ".mlp.experts." in key:
            continue
        if weight.ndim == 2 and not (key == "lm_head" and config.tie_word_embeddings):
            result[key] = weight
    for name, module in model.named_modules():
        if hasattr(module, "in_proj_qkvz"):
            # It takes [batch, tokens, rows]: let the columns of the weights be the tokens.
            q, k, v, z, b, a = module.fix_query_key_value_ordering(
                module.in_proj_qkvz.weight.T[None], module.in_proj_ba.weight.T[None]
            )
            key = name.removeprefix("model.")
            q, k, v, z = (x.flatten(2)[0].T for x in (q, k, v, z))
            result[f"{key}.in_proj_qkv"] = torch.cat([q, k, v])
            result[f"{key}.in_proj_z"] = z
            result[f"{key}.in_proj_b"], result[f"{key}.in_proj_a"] = b[0].T, a[0].T
    return result


@pytest.mark.parametrize("name", HUGGING_FACE)
@torch.no_grad()
def test_hugging_face_weights_are_those_of_transformers(checkpoint: Get, name: str) -> None:
    stored = Checkpoint.open(checkpoint(name))
    model = transformers_model(name)
    expected = expected_matrices(model, stored.config)
    assert stored.matrices.keys() == expected.keys()
    for key, matrix in stored.matrices.items():
        weight = read_dense(stored, matrix.parts[0], matrix.format.dtype)
        shape = (matrix.format.rows, matrix.format.cols)
        assert torch.equal(weight.reshape(shape), expected[key]), key
        assert len(matrix.parts) == matrix.format.parts == 1

    state = model.state_dict()
    for key, vector in stored.vectors.items():
        weight = state.get(f"model.{key}.weight", state.get(f"model.{key}"))
        found = read_dense(stored, vector.extents, vector.dtype)
        assert torch.equal(found, weight.flatten()), key
        assert vector.length == weight.numel()
        zero_centred = "norm" in key and not key.endswith("linear_attn.norm")
        assert vector.plus_one == zero_centred, key
    assert len(stored.vectors) == sum(
        weight.ndim != 2 and ".experts." not in key for key, weight in state.items()
    )

    assert len(stored.experts) == len(stored.config.layer_types)
    for layer, experts in enumerate(stored.experts):
        block = model.model.layers[layer].mlp.experts
        extents = experts.extents.reshape(stored.config.num_experts, experts.parts, 3)
        for expert in range(stored.config.num_experts):
            gate, up = block.gate_up_proj[expert].chunk(2)
            for part, weight in enumerate((gate, up, block.down_proj[expert])):
                dtype = (experts.gate, experts.up, experts.down)[part].dtype
                found = read_dense(stored, extents[expert, part : part + 1], dtype)
                assert torch.equal(found.reshape(weight.shape), weight), (layer, expert, part)


@pytest.mark.parametrize("name", MLX)
def test_mlx_weights_are_those_of_mlx_lm(checkpoint: Get, name: str) -> None:
    from mlx_lm import utils  # noqa: PLC0415

    directory = checkpoint(name)
    stored = Checkpoint.open(directory)
    model, _ = utils.load_model(directory)
    inner = getattr(model, "language_model", model)
    modules = dict(inner.named_modules())

    def expected(path: str) -> np.ndarray:
        module = modules[path]
        weight = module.weight
        if hasattr(module, "scales"):
            weight = mx.dequantize(
                weight, module.scales, module.biases, module.group_size, module.bits
            )
        return np.array(weight.astype(mx.float32))

    for key, matrix in stored.matrices.items():
        found = dequantized(stored, matrix.format, list(matrix.parts))
        path = key if key == "lm_head" else f"model.{key}"
        if "in_proj_" in key and path not in modules:
            weight = by_key_head(expected, path, stored)
        else:
            weight = expected(path)
        assert np.array_equal(found, weight), key

    assert not any(vector.plus_one for vector in stored.vectors.values())
    for layer, experts in enumerate(stored.experts):
        extents = experts.extents.reshape(stored.config.num_experts, experts.parts, 1, 3)
        first = 0
        for projection in ("gate", "up", "down"):
            format: Format = getattr(experts, projection)
            weights = expected(f"model.layers.{layer}.mlp.switch_mlp.{projection}_proj")
            for expert, weight in enumerate(weights):
                parts = list(extents[expert, first : first + format.parts])
                assert np.array_equal(dequantized(stored, format, parts), weight)
            first += format.parts


def by_key_head(expected: Callable[[str], np.ndarray], path: str, stored: Checkpoint) -> np.ndarray:
    """A de-interleaved projection of Qwen3-Next, by the arithmetic of mlx-lm's qwen3_next."""
    config = stored.config
    base, _, wanted = path.rpartition("in_proj_")
    heads, ratio = (
        config.linear_num_key_heads,
        config.linear_num_value_heads // config.linear_num_key_heads,
    )
    if wanted in ("a", "b"):
        grouped = expected(f"{base}in_proj_ba").reshape(heads, 2 * ratio, -1)
        b, a = np.split(grouped, 2, axis=1)
        return (a if wanted == "a" else b).reshape(heads * ratio, -1)
    k, v = config.linear_key_head_dim, ratio * config.linear_value_head_dim
    grouped = expected(f"{base}in_proj_qkvz").reshape(heads, 2 * (k + v), -1)
    q, key, value, z = np.split(grouped, [k, 2 * k, 2 * k + v], axis=1)
    fields = [z] if wanted == "z" else [q, key, value]
    return np.concatenate([x.reshape(-1, x.shape[-1]) for x in fields])
