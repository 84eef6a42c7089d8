"""Small random checkpoints, made by the libraries whose formats flashmoe reads.

    make(directory, "ratio-4")     # a checkpoint directory, always the same for one name
    reference("ratio-4")           # the transformers model, float32, of the same weights

Weights are scaled so that nothing hides: routing is diverse, GatedDeltaNet remembers for tens of
tokens, no two norms are alike, and logits spread by a few units.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

_LINEAR, _FULL = "linear_attention", "full_attention"

_BASE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
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
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
    },
}


@dataclass(frozen=True)
class Variant:
    """`form` is how Hugging Face stores it: "separate" (a tensor per expert, as save_pretrained
    does), "fused" (gate_up_proj), or "nested" (fused, as Qwen publishes: prefixed, with vision and
    multi-token prediction). `mlx` is (bits, group) of mlx-lm's conversion; bits 16 keeps it dense.
    """

    config: dict[str, Any] = field(default_factory=dict)
    qwen3_next: bool = False
    dtype: torch.dtype = torch.float32
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
_BF16, _F16 = torch.bfloat16, torch.float16

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
    "bf16": Variant(dtype=_BF16),
    "f16": Variant(dtype=_F16, form="fused"),
    "fused": Variant(form="fused"),
    "nested": Variant(_RATIO_1, form="nested"),
    "nested-bf16-sharded": Variant(dtype=_BF16, form="nested", shard_bytes=300_000),
    "sharded": Variant(shard_bytes=300_000),
    "mlx-2": Variant(dtype=_BF16, form="nested", mlx=(2, 64)),
    "mlx-4": Variant(dtype=_BF16, form="nested", mlx=(4, 64)),
    "mlx-4-group-32": Variant(
        {"moe_intermediate_size": 96}, dtype=_BF16, form="nested", mlx=(4, 32)
    ),
    "mlx-4-group-128": Variant(
        {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128},
        dtype=_BF16,
        form="nested",
        mlx=(4, 128),
    ),
    # Columns of shared and routed down_proj that groups of 64 do not divide stay dense.
    "mlx-4-partly-dense": Variant(
        {"moe_intermediate_size": 96, "shared_expert_intermediate_size": 96},
        form="nested",
        mlx=(4, 64),
    ),
    "mlx-8": Variant(dtype=_F16, form="nested", mlx=(8, 64)),
    "mlx-tied": Variant({"tie_word_embeddings": True}, form="nested", mlx=(4, 64)),
    "mlx-dense": Variant(dtype=_BF16, form="nested", mlx=(16, 0)),
    "mlx-next": Variant(_RATIO_4, dtype=_BF16, qwen3_next=True, mlx=(4, 64)),
}

PARITY = ("base", "ratio-1", "ratio-4", "odd", "tied", "attention-only", "next", "next-ratio-4")


def reference(name: str) -> transformers.PreTrainedModel:
    """The transformers model of a variant: its weights rounded to the stored dtype, in float32."""
    variant = VARIANTS[name]
    model = _build(variant)
    with torch.no_grad():
        for parameter in model.parameters():  # and not buffers, such as RoPE's frequencies
            parameter.copy_(parameter.to(variant.dtype))
    return model


def make(directory: Path, name: str) -> Path:
    """Writes the checkpoint of a variant to `directory`, which must not exist, and returns it."""
    variant = VARIANTS[name]
    if variant.mlx is not None:
        source = directory.with_name(directory.name + "-source")
        _make_hugging_face(source, variant)
        _convert_with_mlx(source, directory, *variant.mlx)
    else:
        _make_hugging_face(directory, variant)
    return directory


def _build(variant: Variant) -> transformers.PreTrainedModel:
    values = {**_BASE, **variant.config}
    if variant.qwen3_next:
        model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**values))
    else:
        config = transformers.Qwen3_5MoeTextConfig(**values)
        model = transformers.Qwen3_5MoeForCausalLM(config)
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_random(name, parameter.shape, generator))
        if model.config.tie_word_embeddings:  # or else every token would predict itself
            model.get_input_embeddings().weight.mul_(0.25)
    return model.eval()


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    if name.endswith("A_log"):
        return (0.01 + 15.99 * uniform).log()
    if name.endswith("dt_bias"):
        # softplus(dt_bias) log-uniform in [0.001, 0.1], as Mamba begins: memory of many tokens.
        step = torch.exp(math.log(0.001) + uniform * math.log(100.0))
        return torch.log(torch.expm1(step))
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.2 * normal
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        return 0.5 + 0.3 * normal  # queries long enough for attention to be picky
    if name.endswith("norm.weight") or name.endswith("layernorm.weight"):
        return 0.2 * normal
    if name.endswith("embed_tokens.weight"):
        return normal
    gain = {"mlp.gate.weight": 2.0, "lm_head.weight": 3.0}
    scale = next((g for suffix, g in gain.items() if name.endswith(suffix)), 1.0)
    return scale * normal / math.sqrt(shape[-1])


def _make_hugging_face(directory: Path, variant: Variant) -> None:
    model = _build(variant).to(variant.dtype)
    shard_bytes = 1 << 30 if variant.shard_bytes is None else variant.shard_bytes
    if variant.form != "nested":
        model.save_pretrained(
            directory,
            save_original_format=variant.form == "separate",
            max_shard_size=shard_bytes,
        )
        if variant.qwen3_next:
            _publish_rope_as_qwen3_next_does(directory / "config.json")
        return
    model.save_pretrained(directory, save_original_format=False)
    tensors = {
        name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: t
        for name, t in load_file(directory / "model.safetensors").items()
    }
    tensors["model.visual.blocks.0.attn.qkv.weight"] = torch.ones(24, 8, dtype=variant.dtype)
    tensors["model.visual.patch_embed.proj.weight"] = torch.ones(8, 3, 2, 4, 4)
    # More than shard_bytes: with the one after it, a shard that generating text does not need.
    tensors["mtp.fc.weight"] = torch.ones(512, 300, dtype=variant.dtype)
    tensors["mtp.layers.0.self_attn.q_proj.weight"] = torch.ones(8, 8, dtype=variant.dtype)
    (directory / "model.safetensors").unlink()
    _save_shards(directory, tensors, shard_bytes)
    path = directory / "config.json"
    text = json.loads(path.read_text())
    nested = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": {"model_type": "qwen3_5_moe", "hidden_size": 8, "depth": 1},
    }
    path.write_text(json.dumps(nested, indent=2))


def _publish_rope_as_qwen3_next_does(path: Path) -> None:
    """At top level, as before transformers 5; mlx-lm reads nothing else."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
    config["rope_scaling"] = None
    path.write_text(json.dumps(config, indent=2))


def _save_shards(directory: Path, tensors: dict[str, torch.Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _convert_with_mlx(source: Path, directory: Path, bits: int, group: int) -> None:
    """What `mlx_lm.convert` does, less the tokenizer, which these checkpoints do not have."""
    from mlx_lm import utils  # noqa: PLC0415

    model, config = utils.load_model(source)
    if bits != 16:
        model, config = utils.quantize_model(model, config, group, bits)
    utils.save_model(directory, model)
    utils.save_config(config, directory / "config.json")
