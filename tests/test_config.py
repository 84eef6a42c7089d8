"""ModelConfig reads every way that configs are published, and refuses what it cannot run."""

import json
from pathlib import Path
from typing import Any

import pytest
from published import QWEN35_397B

from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.errors import CheckpointError

TEXT = QWEN35_397B["text_config"]
DELETE = object()


def load(directory: Path, config: Any, generation: Any = None) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.of(Metadata(directory))


def with_changes(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = {**config, **changes}
    return {key: value for key, value in merged.items() if value is not DELETE}


def test_the_published_config_of_qwen35_397b(tmp_path: Path) -> None:
    config = load(tmp_path, QWEN35_397B, {"eos_token_id": [248046, 248044]})
    assert config.layer_types.count("full_attention") == 15
    assert config.layer_types[:4] == ("linear_attention",) * 3 + ("full_attention",)
    assert (config.head_dim, config.rotary_dim, config.rope_theta) == (256, 64, 1e7)
    assert (config.num_experts, config.num_experts_per_tok) == (512, 10)
    assert (config.key_width, config.value_width, config.conv_channels) == (2048, 8192, 12288)
    assert config.eos_token_ids == (248046, 248044)
    assert config.norm_topk_prob
    assert not config.tie_word_embeddings
    assert config.quantization is None


def test_a_flat_config_is_the_same_as_a_nested_one(tmp_path: Path) -> None:
    nested = load(tmp_path, QWEN35_397B)
    flat = load(tmp_path, TEXT)
    assert flat.model_type == "qwen3_5_moe_text"
    assert {**vars(flat), "model_type": ""} == {**vars(nested), "model_type": ""}


def test_qwen3_next_keeps_rope_at_top_level_and_an_interval_for_layer_types(
    tmp_path: Path,
) -> None:
    changes = {
        "model_type": "qwen3_next",
        "rope_parameters": DELETE,
        "layer_types": DELETE,
        "rope_theta": 5000000,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        "full_attention_interval": 3,
        "norm_topk_prob": False,
    }
    config = load(tmp_path, with_changes(TEXT, changes))
    assert (config.rope_theta, config.rotary_dim) == (5e6, 128)
    assert config.layer_types[:3] == ("linear_attention",) * 2 + ("full_attention",)
    assert len(config.layer_types) == 60
    assert not config.norm_topk_prob


def test_eos_is_what_any_of_the_configs_says(tmp_path: Path) -> None:
    assert load(tmp_path, QWEN35_397B).eos_token_ids == (248044,)
    assert load(tmp_path, QWEN35_397B, {"temperature": 1}).eos_token_ids == (248044,)
    assert load(tmp_path, QWEN35_397B, {"eos_token_id": 7}).eos_token_ids == (7, 248044)
    both = load(tmp_path, {**QWEN35_397B, "eos_token_id": [5, 248044]}, {"eos_token_id": [6]})
    assert both.eos_token_ids == (6, 5, 248044)


def test_rope_of_every_spelling_is_read_and_of_no_spelling_ignored(tmp_path: Path) -> None:
    old = {"rope_parameters": DELETE, "rope_theta": 3e6, "partial_rotary_factor": 0.5}
    for changes in (
        {"rope_parameters": {"rope_theta": 3e6, "type": "mrope", "partial_rotary_factor": 0.5}},
        old,
        old | {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [8]}},
        old | {"rope_parameters": {"rope_theta": None}},
    ):
        config = load(tmp_path, with_changes(TEXT, changes))
        assert (config.rope_theta, config.rotary_dim) == (3e6, 128)
    above = {**QWEN35_397B, "text_config": with_changes(TEXT, {"rope_parameters": DELETE})}
    assert load(tmp_path, above | {"rope_theta": 3e6}).rope_theta == 3e6
    for key, value in (
        ("rope_parameters", {"theta": 1e7}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e7}}),
        ("rope_scaling", {"rope_type": "default", "factor": 4.0}),
        ("rotary_emb_base", 1e7),
        ("rope_base", 1e7),
    ):
        with pytest.raises(CheckpointError, match="expected no such key: flashmoe knows rope_"):
            load(tmp_path, with_changes(TEXT, {key: value}))


def test_quantization_has_a_default_and_exceptions(tmp_path: Path) -> None:
    quantization = {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "language_model.model.layers.0.mlp.gate": {"group_size": 32, "bits": 8},
        "language_model.lm_head": False,
        "language_model.model.embed_tokens": True,
        "vision_tower.blocks.0.attn.qkv": {"group_size": 64, "bits": 6},
        "language_model.mtp.layers.0.mlp.gate": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        "quant_method": "mlx",
    }
    # mlx-lm writes the same object under both names.
    both = {"quantization": quantization, "quantization_config": quantization}
    found = load(tmp_path, {**QWEN35_397B, **both}).quantization
    assert found is not None
    assert (found.bits, found.group) == (4, 64)
    assert load(tmp_path, {**QWEN35_397B, "quantization": {"bits": 4}}).quantization.group is None
    assert found.exceptions == {
        "language_model.model.layers.0.mlp.gate": (8, 32),
        "language_model.lm_head": None,
    }


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("hidden_size", -4096, "an integer from 1"),
        ("hidden_size", 0, "an integer from 1"),
        ("hidden_size", True, "an integer from 1"),
        ("hidden_size", 4096.0, "an integer from 1"),
        ("hidden_size", "4096", "an integer from 1"),
        ("hidden_size", 10**40, "an integer from 1"),
        ("hidden_size", DELETE, "is missing"),
        ("num_hidden_layers", 10**9, "an integer from 1"),
        ("num_experts", 0, "an integer from 1"),
        ("num_experts_per_tok", 513, "from 1 to 512"),
        ("num_attention_heads", 33, "a multiple of num_key_value_heads"),
        ("linear_num_value_heads", 24, "a multiple of linear_num_key_heads"),
        ("linear_conv_kernel_dim", 1, "from 2"),
        ("linear_conv_kernel_dim", 17, "to 16"),
        ("layer_types", ["linear_attention"] * 59, "60 entries"),
        ("layer_types", ["linear_attention", "sliding_attention"] * 30, "full_attention"),
        ("layer_types", "linear_attention", "a list"),
        ("layer_types", [["linear_attention"]] * 60, "a list"),
        ("hidden_act", "gelu", "silu"),
        ("attention_bias", True, "False"),
        ("attn_output_gate", False, "True"),
        ("mlp_only_layers", [0], "nothing else is supported"),
        ("decoder_sparse_step", 2, "nothing else is supported"),
        ("norm_topk_prob", False, "True"),
        ("rms_norm_eps", 0, "a number above 0"),
        ("rms_norm_eps", "1e-6", "a number above 0"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "RoPE scaling"),
        ("rope_parameters", {"rope_theta": -1}, "a number above"),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.013}, "an even number"),
        ("rope_parameters", [], "an object"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "RoPE scaling"),
        ("eos_token_id", 248320, "token ids below"),
        ("eos_token_id", ["</s>"], "token ids below"),
        ("tie_word_embeddings", 1, "true or false"),
    ],
)
def test_absurd_and_unsupported_values_are_refused_by_name(
    tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        load(tmp_path, with_changes(TEXT, {key: value}))
    message = str(error.value)
    assert str(tmp_path / "config.json") in message
    assert key in message or "partial_rotary_factor" in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model_type", "llama", "qwen3_5_moe, qwen3_5_moe_text, qwen3_next"),
        ("model_type", ["qwen3_5_moe"], "qwen3_5_moe, qwen3_5_moe_text, qwen3_next"),
        ("model_type", DELETE, "qwen3_5_moe, qwen3_5_moe_text, qwen3_next"),
        ("text_config", [], "an object"),
        ("quantization", "4-bit", "an object"),
        ("quantization", {"bits": 3, "group_size": 64}, "3 bits are not supported"),
        ("quantization", {"bits": 6, "group_size": 64}, "6 bits are not supported"),
        ("quantization", {"bits": 4, "group_size": 48}, "one of 32, 64, 128"),
        ("quantization", {"bits": 4, "group_size": 32, "mode": "mxfp4"}, "mxfp4.*affine"),
        (
            "quantization",
            {"bits": 4, "group_size": 64, "lm_head": {"bits": 6, "group_size": 64}},
            r"lm_head\.bits.*6 bits are not supported",
        ),
        ("quantization_config", {"quant_method": "fp8"}, "fp8.*bf16 or MLX 4-bit edition"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        (
            "quantization_config",
            {"quant_algo": "NVFP4", "producer": {"name": "modelopt"}},
            "quant_algo is 'NVFP4'.*bf16 or MLX 4-bit edition",
        ),
    ],
)
def test_other_models_and_other_quantizations_are_refused_by_name(
    tmp_path: Path, key: str, value: Any, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason) as error:
        load(tmp_path, with_changes(QWEN35_397B, {key: value}))
    assert str(tmp_path / "config.json") in str(error.value)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[1]", "expected an object"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b'{"model_type": "qwen3_next", "model_type": "llama"}', "more than once"),
        (b'{"hidden_size": NaN}', "NaN is not a JSON value"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_config_that_is_not_json_is_refused(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=reason) as error:
        ModelConfig.of(Metadata(tmp_path))
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_missing_config_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        ModelConfig.of(Metadata(tmp_path))


def test_a_damaged_generation_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: not valid JSON"):
        load(tmp_path, QWEN35_397B)
