"""Configs as models are published with them, and what the headers of their files list.

Written from the published metadata (the 397B's config is the real one), apart from flashmoe's own
table of weights.
"""

from collections.abc import Iterator
from typing import Any

from flashmoe.checkpoint.config import ModelConfig

Named = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""

# Qwen3.5-397B-A17B's, less what no text model reads.
QWEN35_397B: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5_moe",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 15,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 64,
        "linear_value_head_dim": 128,
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_moe_text",
        "moe_intermediate_size": 1024,
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 60,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "shared_expert_intermediate_size": 1024,
        "vocab_size": 248320,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "default",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
        },
    },
    "tie_word_embeddings": False,
    "vision_config": {"depth": 27, "hidden_size": 1152},
}


def qwen35(
    hidden: int, layers: int, heads: int, value_heads: int, experts: int, chosen: int, width: int
) -> dict[str, Any]:
    """The config of another Qwen3.5 or Qwen3.6 MoE, nested like the 397B's."""
    text = QWEN35_397B["text_config"] | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4),
        "num_attention_heads": heads,
        "linear_num_value_heads": value_heads,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width,
    }
    return QWEN35_397B | {"text_config": text}


QWEN35_122B = qwen35(3072, 48, 32, 64, 256, 8, 1024)
QWEN35_35B = qwen35(2048, 40, 16, 32, 256, 8, 512)

# Qwen3-Next-80B-A3B's: flat, RoPE at top level, an interval for layer types.
QWEN3_NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_CODER_NEXT = QWEN3_NEXT | {"rope_theta": 5000000, "head_dim": 256}


def hugging_face_tensors(c: ModelConfig) -> Iterator[Named]:
    """What the bf16 edition holds: Qwen3.5's nested and fused, Qwen3-Next's a tensor an expert."""
    next_ = c.model_type == "qwen3_next"
    prefix = "model." if next_ else "model.language_model."
    h, e, inner = c.hidden_size, c.num_experts, c.moe_intermediate_size
    heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    values = c.linear_num_value_heads * c.linear_value_head_dim
    keys = c.linear_num_key_heads * c.linear_key_head_dim

    def tensor(name: str, *shape: int, dtype: str = "BF16") -> Named:
        return name, dtype, shape

    def block(layer: str) -> Iterator[Named]:
        yield tensor(f"{layer}.mlp.gate.weight", e, h)
        yield tensor(f"{layer}.mlp.shared_expert_gate.weight", 1, h)
        shared = c.shared_expert_intermediate_size
        for kind in ("gate", "up"):
            yield tensor(f"{layer}.mlp.shared_expert.{kind}_proj.weight", shared, h)
        yield tensor(f"{layer}.mlp.shared_expert.down_proj.weight", h, shared)
        if not next_:
            yield tensor(f"{layer}.mlp.experts.gate_up_proj", e, 2 * inner, h)
            yield tensor(f"{layer}.mlp.experts.down_proj", e, h, inner)
        for number in range(e if next_ else 0):
            for kind in ("gate", "up"):
                yield tensor(f"{layer}.mlp.experts.{number}.{kind}_proj.weight", inner, h)
            yield tensor(f"{layer}.mlp.experts.{number}.down_proj.weight", h, inner)

    def attention(layer: str) -> Iterator[Named]:
        for kind, rows in (("q", 2 * heads), ("k", kv), ("v", kv)):
            yield tensor(f"{layer}.self_attn.{kind}_proj.weight", rows, h)
        yield tensor(f"{layer}.self_attn.o_proj.weight", h, heads)
        for kind in ("q", "k"):
            yield tensor(f"{layer}.self_attn.{kind}_norm.weight", c.head_dim)

    def norms(layer: str) -> Iterator[Named]:
        for kind in ("input", "post_attention"):
            yield tensor(f"{layer}.{kind}_layernorm.weight", h)

    yield tensor(f"{prefix}embed_tokens.weight", c.vocab_size, h)
    yield tensor(f"{prefix}norm.weight", h)
    yield tensor("lm_head.weight", c.vocab_size, h)
    for i, kind in enumerate(c.layer_types):
        layer = f"{prefix}layers.{i}"
        yield from norms(layer)
        yield from block(layer)
        if kind == "full_attention":
            yield from attention(layer)
            continue
        mixer = f"{layer}.linear_attn"
        if next_:
            yield tensor(f"{mixer}.in_proj_qkvz.weight", 2 * keys + 2 * values, h)
            yield tensor(f"{mixer}.in_proj_ba.weight", 2 * c.linear_num_value_heads, h)
        else:
            yield tensor(f"{mixer}.in_proj_qkv.weight", 2 * keys + values, h)
            yield tensor(f"{mixer}.in_proj_z.weight", values, h)
            for letter in "ab":
                yield tensor(f"{mixer}.in_proj_{letter}.weight", c.linear_num_value_heads, h)
        yield tensor(f"{mixer}.out_proj.weight", h, values)
        yield tensor(f"{mixer}.conv1d.weight", 2 * keys + values, 1, c.linear_conv_kernel_dim)
        yield tensor(f"{mixer}.A_log", c.linear_num_value_heads, dtype="BF16" if next_ else "F32")
        yield tensor(f"{mixer}.dt_bias", c.linear_num_value_heads)
        yield tensor(
            f"{mixer}.norm.weight", c.linear_value_head_dim, dtype="BF16" if next_ else "F32"
        )
    yield tensor("mtp.fc.weight", h, 2 * h)
    yield from norms("mtp.layers.0")
    yield from block("mtp.layers.0")
    yield from attention("mtp.layers.0")
    if not next_:
        yield tensor("model.visual.patch_embed.proj.weight", 1152, 3, 2, 16, 16)
        yield tensor("model.visual.merger.linear_fc2.weight", h, 4608)


def mlx_tensors(c: ModelConfig, prefix: str = "language_model.") -> Iterator[Named]:
    """Name, dtype and shape of what mlx-lm's 4-bit conversion of such a model holds."""

    def quantized(name: str, *shape: int, bits: int = 4) -> Iterator[Named]:
        *rows, cols = shape
        yield f"{name}.weight", "U32", (*rows, cols * bits // 32)
        yield f"{name}.scales", "BF16", (*rows, cols // 64)
        yield f"{name}.biases", "BF16", (*rows, cols // 64)

    h, e = c.hidden_size, c.num_experts
    yield from quantized(f"{prefix}model.embed_tokens", c.vocab_size, h)
    yield from quantized(f"{prefix}lm_head", c.vocab_size, h)
    yield f"{prefix}model.norm.weight", "BF16", (h,)
    for i, kind in enumerate(c.layer_types):
        layer = f"{prefix}model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", "BF16", (h,)
        yield f"{layer}.post_attention_layernorm.weight", "BF16", (h,)
        if kind == "full_attention":
            heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
            yield from quantized(f"{layer}.self_attn.q_proj", 2 * heads, h)
            yield from quantized(f"{layer}.self_attn.k_proj", kv, h)
            yield from quantized(f"{layer}.self_attn.v_proj", kv, h)
            yield from quantized(f"{layer}.self_attn.o_proj", h, heads)
            yield f"{layer}.self_attn.q_norm.weight", "BF16", (c.head_dim,)
            yield f"{layer}.self_attn.k_norm.weight", "BF16", (c.head_dim,)
        else:
            mixer, heads = f"{layer}.linear_attn", c.linear_num_value_heads
            values = heads * c.linear_value_head_dim
            channels = values + 2 * c.linear_num_key_heads * c.linear_key_head_dim
            yield from quantized(f"{mixer}.in_proj_qkv", channels, h)
            yield from quantized(f"{mixer}.in_proj_z", values, h)
            yield from quantized(f"{mixer}.in_proj_b", heads, h)
            yield from quantized(f"{mixer}.in_proj_a", heads, h)
            yield from quantized(f"{mixer}.out_proj", h, values)
            yield f"{mixer}.conv1d.weight", "BF16", (channels, c.linear_conv_kernel_dim, 1)
            yield f"{mixer}.A_log", "F32", (heads,)
            yield f"{mixer}.dt_bias", "BF16", (heads,)
            yield f"{mixer}.norm.weight", "F32", (c.linear_value_head_dim,)
        yield from quantized(f"{layer}.mlp.gate", e, h, bits=8)
        yield from quantized(f"{layer}.mlp.shared_expert_gate", 1, h, bits=8)
        for name, width, experts in (
            ("shared_expert", c.shared_expert_intermediate_size, ()),
            ("switch_mlp", c.moe_intermediate_size, (e,)),
        ):
            yield from quantized(f"{layer}.mlp.{name}.gate_proj", *experts, width, h)
            yield from quantized(f"{layer}.mlp.{name}.up_proj", *experts, width, h)
            yield from quantized(f"{layer}.mlp.{name}.down_proj", *experts, h, width)
