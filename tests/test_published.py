"""`flashmoe info` of the published family: right, or refused by name and with what to do.

The files are sparse, of the true shapes: hundreds of gigabytes that take some megabytes.
"""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from published import (
    QWEN3_CODER_NEXT,
    QWEN3_NEXT,
    QWEN35_35B,
    QWEN35_122B,
    QWEN35_397B,
    Named,
    hugging_face_tensors,
    mlx_tensors,
)

from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.headers import build_header
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.errors import CheckpointError
from flashmoe.measure.fit import Target
from flashmoe.measure.info import Summary, describe

BYTES = {"U32": 4, "F32": 4, "BF16": 2}
TARGET = Target(disk_rate=5e9, memory_rate=1e11, threads=4)

MODELS: dict[str, tuple[dict[str, Any], float, float]] = {
    "Qwen3.5-397B-A17B": (QWEN35_397B, 396.35, 17),
    "Qwen3.5-122B-A10B": (QWEN35_122B, 122.1, 10),
    "Qwen3.5-35B-A3B": (QWEN35_35B, 34.7, 3),
    "Qwen3.6-35B-A3B": (QWEN35_35B | {"language_model_only": False}, 34.7, 3),
    "Qwen3-Next-80B-A3B": (QWEN3_NEXT, 79.7, 3.9),
    "Qwen3-Coder-Next": (QWEN3_CODER_NEXT, 79.7, 3.9),
}
"""Config, and parameters in billions: all, and those that compute a token."""


def write(directory: Path, config: dict[str, Any], tensors: Iterable[Named], shards: int) -> None:
    """Config, headers, index, and files that are all hole."""
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95})
    )
    listed = list(tensors)
    size = -(-len(listed) // shards)
    weight_map = {}
    for number in range(shards):
        part = listed[number * size : (number + 1) * size]
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, _ = build_header(part)
        (directory / name).write_bytes(header)
        nbytes = sum(BYTES[dtype] * math.prod(shape) for _, dtype, shape in part)
        os.truncate(directory / name, len(header) + nbytes)
        weight_map |= dict.fromkeys((tensor[0] for tensor in part), name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def looked(directory: Path) -> Summary:
    return describe(directory, experts_per_token=None, target=TARGET).summary


def read(directory: Path, config: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig.of(Metadata(directory))


@pytest.mark.parametrize("name", MODELS)
def test_the_bf16_edition(tmp_path: Path, name: str) -> None:
    config, total, active = MODELS[name]
    write(tmp_path, config, hugging_face_tensors(read(tmp_path, config)), 11)
    found = looked(tmp_path)
    assert found.parameters / 1e9 == pytest.approx(total, abs=0.06)
    assert found.active_parameters / 1e9 == pytest.approx(active, rel=0.15)
    assert {role.formats for role in found.roles[:-1]} == {("bf16",)}
    assert (
        found.expert
        == 6 * found.hidden_size * config.get("text_config", config)["moe_intermediate_size"]
    )
    assert found.state_per_token == found.attention_layers * 2 * 2 * 256 * 2


@pytest.mark.parametrize("name", MODELS)
def test_the_mlx_4_bit_edition(tmp_path: Path, name: str) -> None:
    config, total, _ = MODELS[name]
    nested = "text_config" in config
    parsed = read(tmp_path, config)
    prefix = "language_model." if nested else ""
    routers = {
        f"{prefix}model.layers.{i}.mlp.{gate}": {"bits": 8, "group_size": 64}
        for i in range(len(parsed.layer_types))
        for gate in ("gate", "shared_expert_gate")
    }
    quantization = {"bits": 4, "group_size": 64, "mode": "affine", **routers}
    both = {"quantization": quantization, "quantization_config": quantization}
    write(tmp_path, config | both, mlx_tensors(parsed, prefix), 7)
    found = looked(tmp_path)
    assert found.parameters / 1e9 == pytest.approx(total, abs=0.06)
    formats = {role.name: role.formats for role in found.roles}
    assert formats["routed experts"] == ("4-bit, group 64",)
    assert formats["router"] == ("8-bit, group 64",)
    assert found.disk == pytest.approx(found.parameters * 4.5 / 8, rel=0.02)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "FP8": (
        {
            "quantization_config": {
                "quant_method": "fp8",
                "activation_scheme": "dynamic",
                "weight_block_size": [128, 128],
                "modules_to_not_convert": ["lm_head"],
            }
        },
        "quantization_config.quant_method is 'fp8'",
    ),
    "GPTQ": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        "quantization_config.quant_method is 'gptq'",
    ),
    "AWQ": (
        {"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}},
        "quantization_config.quant_method is 'awq'",
    ),
    "ModelOpt NVFP4": (
        {"quantization_config": {"quant_algo": "NVFP4", "producer": {"name": "modelopt"}}},
        "quantization_config.quant_algo is 'NVFP4'",
    ),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
        "quantization_config.quant_method is 'compressed-tensors'",
    ),
}


@pytest.mark.parametrize("edition", REFUSED)
@pytest.mark.parametrize("name", MODELS)
def test_another_edition_is_refused_by_name(tmp_path: Path, name: str, edition: str) -> None:
    config, _, _ = MODELS[name]
    changes, words = REFUSED[edition]
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CheckpointError) as error:
        looked(tmp_path)
    message = str(error.value)
    assert words in message and str(tmp_path / "config.json") in message
    assert "use the model's bf16 or MLX 4-bit edition" in message


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_other_bits_of_mlx_are_refused_by_name(tmp_path: Path, bits: int) -> None:
    quantization = {"bits": bits, "group_size": 64, "mode": "affine"}
    (tmp_path / "config.json").write_text(json.dumps(QWEN35_35B | {"quantization": quantization}))
    with pytest.raises(CheckpointError, match=f"{bits} bits are not supported"):
        looked(tmp_path)
