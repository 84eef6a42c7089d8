"""Small random checkpoints in every layout that flashmoe reads, made by numpy.

    make(directory, "ratio-4")     # a checkpoint directory, always the same for one name
    weights("ratio-4")             # its tensors by transformers' names

tests/reference holds that these are the files that transformers and mlx-lm write of these weights.

Weights are scaled so that nothing hides: routing is diverse, GatedDeltaNet remembers for tens of
tokens, no two norms are alike, and logits spread by a few units.
"""

import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tensors import Tensor, quantize, save_shards, stored

_LINEAR, _FULL = "linear_attention", "full_attention"

_BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 4096,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "layer_types": [_LINEAR, _LINEAR, _LINEAR, _FULL],
}
_ROPE = {"rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25}


@dataclass(frozen=True)
class Variant:
    """`form` is how Hugging Face stores it: "separate" (a tensor per expert, as save_pretrained
    does), "fused" (gate_up_proj), or "nested" (fused, as Qwen publishes: prefixed, with vision and
    multi-token prediction). `mlx` is (bits, group) of mlx-lm's conversion; bits 16 keeps it dense.
    """

    config: dict[str, Any] = field(default_factory=dict)
    qwen3_next: bool = False
    dtype: str = "F32"
    form: str = "separate"
    shard_bytes: int | None = None
    mlx: tuple[int, int] | None = None


# Shapes for parity with transformers: V/K head ratio 1, 2, 4; 1, 2, 4 KV heads; irregular layers.
_RATIO_1 = {
    "linear_num_key_heads": 4,
    "num_key_value_heads": 1,
    "layer_types": [_LINEAR, _FULL, _FULL, _LINEAR, _LINEAR],
    "num_hidden_layers": 5,
}
_RATIO_4 = {
    "linear_num_value_heads": 8,
    "num_key_value_heads": 4,
    "linear_value_head_dim": 16,
}
_ODD = {
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
    "hidden_size": 96,
    "vocab_size": 333,
}

VARIANTS: dict[str, Variant] = {
    "base": Variant(),
    "ratio-1": Variant(_RATIO_1),
    "ratio-4": Variant(_RATIO_4),
    "odd": Variant(_ODD),
    "tied": Variant({"tie_word_embeddings": True}),
    "attention-only": Variant({"layer_types": [_FULL, _FULL], "num_hidden_layers": 2}),
    "heads-of-48": Variant({"head_dim": 48}),  # which no Metal kernel is for
    "next": Variant(qwen3_next=True),
    "next-ratio-4": Variant(_RATIO_4, qwen3_next=True),
    "bf16": Variant(dtype="BF16"),
    "f16": Variant(dtype="F16", form="fused"),
    "fused": Variant(form="fused"),
    "nested": Variant(_RATIO_1, form="nested"),
    "nested-bf16-sharded": Variant(dtype="BF16", form="nested", shard_bytes=300_000),
    "sharded": Variant(shard_bytes=300_000),
    "mlx-2": Variant(dtype="BF16", form="nested", mlx=(2, 64)),
    "mlx-4": Variant(dtype="BF16", form="nested", mlx=(4, 64)),
    "mlx-4-group-32": Variant(
        {"moe_intermediate_size": 96}, dtype="BF16", form="nested", mlx=(4, 32)
    ),
    "mlx-4-group-128": Variant(
        {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128},
        dtype="BF16",
        form="nested",
        mlx=(4, 128),
    ),
    # Columns of shared and routed down_proj that groups of 64 do not divide stay dense.
    "mlx-4-partly-dense": Variant(
        {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 96},
        form="nested",
        mlx=(4, 64),
    ),
    "mlx-8": Variant(dtype="F16", form="nested", mlx=(8, 64)),
    "mlx-tied": Variant({"tie_word_embeddings": True}, form="nested", mlx=(4, 64)),
    "mlx-dense": Variant(dtype="BF16", form="nested", mlx=(16, 0)),
    "mlx-next": Variant(_RATIO_4, dtype="BF16", qwen3_next=True, mlx=(4, 64)),
}

PARITY = ("base", "ratio-1", "ratio-4", "odd", "tied", "attention-only", "next", "next-ratio-4")
FORMS = ("bf16", "f16", "fused", "nested", "nested-bf16-sharded", "sharded")
HUGGING_FACE = tuple(name for name, variant in VARIANTS.items() if variant.mlx is None)
MLX = tuple(name for name, variant in VARIANTS.items() if variant.mlx is not None)


def text_config(name: str) -> dict[str, Any]:
    """The values of a variant's config.json that shape its weights and its forward pass."""
    return {**_BASE, **VARIANTS[name].config, "rope_parameters": {"rope_type": "default", **_ROPE}}


def weights(name: str) -> dict[str, Tensor]:
    """Every tensor of a variant by transformers' names, experts fused, rounded to its dtype."""
    variant = VARIANTS[name]
    result = {}
    for key, shape in _shapes(text_config(name), variant.qwen3_next).items():
        values = _random(key, shape)
        if key == "model.embed_tokens.weight" and variant.config.get("tie_word_embeddings"):
            values *= 0.25  # or else every token would predict itself
        result[key] = stored(values, variant.dtype)
    return result


def twin(name: str) -> str:
    """The first variant of the same weights and forward pass, however it stores them."""
    own = VARIANTS[name]
    return next(
        other
        for other, variant in VARIANTS.items()
        if (variant.config, variant.qwen3_next, variant.dtype, variant.mlx)
        == (own.config, own.qwen3_next, own.dtype, own.mlx)
    )


def make(directory: Path, name: str) -> Path:
    """Writes the checkpoint of a variant to `directory`, which must not exist, and returns it."""
    variant = VARIANTS[name]
    directory.mkdir()
    if variant.mlx is not None:
        config, tensors = _as_mlx(name)
    else:
        config, tensors = _as_hugging_face(name)
        (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_shards(tensors, directory, variant.shard_bytes, index=variant.mlx is not None)
    return directory


def _shapes(c: dict[str, Any], qwen3_next: bool) -> dict[str, tuple[int, ...]]:
    h, experts = c["hidden_size"], c["num_experts"]
    inner, shared = c["moe_intermediate_size"], c["shared_expert_intermediate_size"]
    heads, kv = (c[key] * c["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    value_heads = c["linear_num_value_heads"]
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    values = value_heads * c["linear_value_head_dim"]
    attention: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (2 * heads, h),
        "k_proj.weight": (kv, h),
        "v_proj.weight": (kv, h),
        "o_proj.weight": (h, heads),
        "q_norm.weight": (c["head_dim"],),
        "k_norm.weight": (c["head_dim"],),
    }
    linear: dict[str, tuple[int, ...]] = {
        "dt_bias": (value_heads,),
        "A_log": (value_heads,),
        "conv1d.weight": (2 * keys + values, 1, c["linear_conv_kernel_dim"]),
        "norm.weight": (c["linear_value_head_dim"],),
        "out_proj.weight": (h, values),
    }
    if qwen3_next:
        linear["in_proj_qkvz.weight"] = (2 * keys + 2 * values, h)
        linear["in_proj_ba.weight"] = (2 * value_heads, h)
    else:
        linear["in_proj_qkv.weight"] = (2 * keys + values, h)
        linear["in_proj_z.weight"] = (values, h)
        linear["in_proj_b.weight"] = linear["in_proj_a.weight"] = (value_heads, h)
    block: dict[str, tuple[int, ...]] = {
        "mlp.gate.weight": (experts, h),
        "mlp.experts.gate_up_proj": (experts, 2 * inner, h),
        "mlp.experts.down_proj": (experts, h, inner),
        "mlp.shared_expert.gate_proj.weight": (shared, h),
        "mlp.shared_expert.up_proj.weight": (shared, h),
        "mlp.shared_expert.down_proj.weight": (h, shared),
        "mlp.shared_expert_gate.weight": (1, h),
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
    }
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], h)}
    for layer, kind in enumerate(c["layer_types"]):
        mixer, parts = ("self_attn", attention) if kind == _FULL else ("linear_attn", linear)
        result |= {f"model.layers.{layer}.{mixer}.{key}": shape for key, shape in parts.items()}
        result |= {f"model.layers.{layer}.{key}": shape for key, shape in block.items()}
    result["model.norm.weight"] = (h,)
    if not c["tie_word_embeddings"]:
        result["lm_head.weight"] = (c["vocab_size"], h)
    return result


def _random(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The same for one name and shape, with every release of numpy: RandomState is frozen."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("A_log"):
        values = np.log(0.01 + 15.99 * random.uniform(size=shape))
    elif name.endswith("dt_bias"):
        # softplus(dt_bias) log-uniform in [0.001, 0.1], as Mamba begins: memory of many tokens.
        step = np.exp(math.log(0.001) + random.uniform(size=shape) * math.log(100.0))
        values = np.log(np.expm1(step))
    else:
        mean, deviation = _normal(name, shape[-1])
        values = mean + deviation * random.standard_normal(shape)
    return values.astype(np.float32)


def _normal(name: str, inputs: int) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's weights."""
    if name.endswith("linear_attn.norm.weight"):
        return 1, 0.2
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.5, 0.3  # queries long enough for attention to be picky
    if name.endswith("norm.weight"):
        return 0, 0.2
    if name.endswith("embed_tokens.weight"):
        return 0, 1
    gain = {"mlp.gate.weight": 2.0, "lm_head.weight": 3.0}
    scale = next((g for suffix, g in gain.items() if name.endswith(suffix)), 1.0)
    return 0, scale / math.sqrt(inputs)


def _as_hugging_face(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    variant = VARIANTS[name]
    config = text_config(name)
    tensors = dict(sorted(weights(name).items()))
    if variant.qwen3_next:  # RoPE at top level, as before transformers 5; mlx-lm reads nothing else
        del config["rope_parameters"]
        config |= {
            "model_type": "qwen3_next",
            "norm_topk_prob": True,
            "rope_scaling": None,
            **_ROPE,
        }
        # mlx-lm wants these too.
        config |= {"intermediate_size": 5632, "decoder_sparse_step": 1, "mlp_only_layers": []}
    else:
        config["model_type"] = "qwen3_5_moe_text"
    if variant.form == "separate":
        tensors = _separate(tensors)
    if variant.form == "nested":
        nested = {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "text_config": config,
            "tie_word_embeddings": config["tie_word_embeddings"],
            "vision_config": {"model_type": "qwen3_5_moe", "hidden_size": 8, "depth": 1},
        }
        return nested, _nested(tensors, variant.dtype)
    return config, tensors


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for key, tensor in tensors.items():
        path, fused, kind = key.partition(".mlp.experts.")
        if not fused:
            result[key] = tensor
            continue
        parts = {"down_proj": tensor.array}
        if kind == "gate_up_proj":
            gate, up = np.split(tensor.array, 2, axis=1)
            parts = {"gate_proj": gate, "up_proj": up}
        for part, array in parts.items():
            for expert, matrix in enumerate(array):
                name = f"{path}.mlp.experts.{expert}.{part}.weight"
                result[name] = Tensor(tensor.dtype, matrix)
    return dict(sorted(result.items()))


def _nested(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    result = {
        key.replace("model.", "model.language_model.", 1) if key.startswith("model.") else key: t
        for key, t in tensors.items()
    }

    def ones(*shape: int) -> Tensor:
        return stored(np.ones(shape, np.float32), dtype)

    result["model.visual.blocks.0.attn.qkv.weight"] = ones(24, 8)
    result["model.visual.patch_embed.proj.weight"] = stored(np.ones((8, 3, 2, 4, 4)), "F32")
    # More than shard_bytes: with the one after it, a shard that generating text does not need.
    result["mtp.fc.weight"] = ones(512, 300)
    result["mtp.layers.0.self_attn.q_proj.weight"] = ones(8, 8)
    return result


_NORMS = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")


def _as_mlx(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `mlx_lm.convert` makes of the variant."""
    variant = VARIANTS[name]
    assert variant.mlx is not None
    bits, group = variant.mlx
    config, _ = _as_hugging_face(name)
    config.pop("vision_config", None)
    prefix = "" if variant.qwen3_next else "language_model."
    tensors: dict[str, Tensor] = {}
    exceptions: dict[str, dict[str, int]] = {}

    def add(path: str, tensor: Tensor) -> None:
        module = prefix + path.removesuffix(".weight")
        router = module.endswith(("mlp.gate", "shared_expert_gate"))
        own_bits, own_group = (8, 64) if router else (bits, group)
        matrix = tensor.array.ndim > 1 and "conv1d" not in path
        if not matrix or bits == 16 or tensor.array.shape[-1] % own_group:
            tensors[prefix + path] = tensor
            return
        if router:
            exceptions[module] = {"group_size": own_group, "bits": own_bits}
        parts = quantize(tensor.floats(), tensor.dtype, own_bits, own_group)
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=True):
            tensors[f"{module}.{suffix}"] = part

    for key, tensor in weights(name).items():
        dtype, array = tensor
        layer, fused, kind = key.partition(".experts.")
        if fused and kind == "gate_up_proj":
            gate, up = np.split(array, 2, axis=1)
            add(f"{layer}.switch_mlp.gate_proj.weight", Tensor(dtype, gate))
            add(f"{layer}.switch_mlp.up_proj.weight", Tensor(dtype, up))
        elif fused:
            add(f"{layer}.switch_mlp.down_proj.weight", tensor)
        elif key.endswith("conv1d.weight"):
            add(key, Tensor(dtype, array.transpose(0, 2, 1)))
        elif key.endswith(_NORMS):
            add(key, stored(tensor.floats() + 1, dtype))  # MLX stores 1 + w
        else:
            add(key, tensor)
    if bits != 16:
        quantization = {"group_size": group, "bits": bits, "mode": "affine", **exceptions}
        config |= {"quantization": quantization, "quantization_config": quantization}
    return config, tensors
