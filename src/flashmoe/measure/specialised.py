"""The kernels of a GPU that the published models need, each with what it is specialised for.

The native core plans every operation of a pass; nothing is computed, and no GPU is needed.
"""

from __future__ import annotations

from typing import Any

from flashmoe.checkpoint.architecture import Kind, weights_of
from flashmoe.checkpoint.table import Format
from flashmoe.measure.family import FAMILY, Published

BITS = (2, 4, 8)
DTYPES = {"F32": 0, "F16": 1, "BF16": 2}
"""As the native core numbers them."""
TOGETHER = (  # matrices of one input
    ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b",
     "linear_attn.in_proj_a"),
    ("linear_attn.out_proj",),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate", "mlp.shared_expert_gate"),
    ("lm_head",),
)  # fmt: skip
TOKENS = (1, 4, 5, 2048)
"""Of a pass, or of an expert in it: a matrix is read once a token, or once for all of them."""
POSITION = 4096


def needed() -> set[str]:
    """By every published model in 2, 4 and 8 bits, with its own experts per token or fewer."""
    configs = {id(model.config): model.config for model in FAMILY}.values()
    models = [Published("", config, bits, bits) for config in configs for bits in BITS]
    return {str(plan) for model in models for plan in plans_of(model)}


def plans_of(model: Published) -> list[Any]:
    """What is launched for every operation of the model, on different numbers of tokens."""
    from flashmoe import _native  # noqa: PLC0415

    at = 1 << 12  # where everything lies: nothing is read
    plans: Any = _native.GpuPlans(scratch=lambda *_: at, stage=lambda _: at)
    c = model.config
    formats: dict[str, Format] = {}  # of one layer's matrices of each kind
    for weight in weights_of(c):
        if weight.kind in (Kind.MATRIX, Kind.EXPERTS):
            name = weight.name
            formats[name.split(".", 2)[-1] if name.startswith("layers.") else name] = (
                model.format_of(weight)
            )

    def matrix(name: str) -> tuple[int, ...]:
        f = formats[name]
        return f.rows, f.cols, DTYPES[f.dtype], f.bits, f.group, at, at, at

    def experts(block: str, count: int, tokens: int) -> list[tuple[Any, ...]]:
        parts = [matrix(f"mlp.{block}.{part}_proj") for part in ("gate", "up", "down")]
        return [(parts, [0] * tokens, [0] * tokens, at)] * count

    heads = (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rotary_dim)
    delta = (c.linear_num_key_heads, c.linear_num_value_heads)
    dims = (c.linear_key_head_dim, c.linear_value_head_dim)
    for n in TOKENS:
        plans.embed(matrix("embed_tokens"), [0] * n, at)
        plans.rms_norm(n, c.hidden_size, at, at, c.rms_norm_eps, at)
        for names in TOGETHER:
            plans.matmul(n, at, [(matrix(name), at, False) for name in names])
        plans.causal_conv(n, c.conv_channels, c.linear_conv_kernel_dim, at, at, at, at)
        plans.gated_delta(n, (*delta, *dims), c.rms_norm_eps, [at] * 10)
        for dtype in ("F32", "BF16"):
            capacity = POSITION + n
            plans.attention(
                n, heads, c.rope_theta, c.rms_norm_eps, POSITION, capacity, DTYPES[dtype], [at] * 8
            )
        plans.route(n, c.num_experts, c.num_experts_per_tok, c.norm_topk_prob, at, at, at, at)
        plans.combine(n, c.hidden_size, c.num_experts_per_tok, [at] * 7, c.rms_norm_eps)
        plans.all_finite(n, c.hidden_size, at, at)
        # The shared expert and those that are in a slot; then some that have landed, in a prompt as
        # many as a dispatch takes.
        for count in (*range(c.num_experts_per_tok + 1), 32):
            shared = experts("shared_expert", 1, n)
            plans.experts(n, at, shared + experts("experts", count, n))
            plans.experts(n, at, experts("experts", count, n))
    return list(plans.take())
