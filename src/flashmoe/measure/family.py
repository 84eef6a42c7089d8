"""The published models that flashmoe runs, from their config.json, without a network."""

from __future__ import annotations

from dataclasses import dataclass

from flashmoe.checkpoint.architecture import EXPERTS, ROUTER, Kind, Weight, weights_of
from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.table import FLOAT_BYTES, Format


@dataclass(frozen=True)
class Published:
    """A model as mlx-community and pack store it: groups of 64, routers in 8 bits.

    Attributes:
        name: its id on the hub, or what was done to the one before it.
        bits, expert_bits: of all other matrices, and of the routed experts.
    """

    name: str
    config: ModelConfig
    bits: int = 4
    expert_bits: int = 4

    @property
    def experts_per_token(self) -> int:
        """As experts_per_token="auto" means it."""
        return self.config.default_experts_per_token

    def format_of(self, weight: Weight) -> Format:
        """How a matrix of it is stored."""
        bits = {ROUTER: 8, EXPERTS: self.expert_bits}.get(weight.role, self.bits)
        rows, cols = weight.shape
        return Format(rows, cols, "BF16", bits, 64)

    @property
    def experts(self) -> int:
        """Bytes of all routed experts."""
        return sum(
            self.config.num_experts * self.format_of(weight).nbytes
            for weight in weights_of(self.config)
            if weight.kind is Kind.EXPERTS
        )

    @property
    def resident(self) -> int:
        """Bytes of everything else, vectors in float32."""
        total = 0
        for weight in weights_of(self.config):
            if weight.kind is Kind.MATRIX:
                total += self.format_of(weight).nbytes
            elif weight.kind is not Kind.EXPERTS:
                cells = 1
                for extent in weight.shape:
                    cells *= extent
                total += FLOAT_BYTES["F32"] * cells
        return total

    @property
    def disk(self) -> int:
        """Bytes of its files, nearly: small tensors may be stored in 2 bytes a number."""
        return self.experts + self.resident


def _config(
    model_type: str,
    hidden: int,
    layers: int,
    heads: int,
    value_heads: int,
    experts: tuple[int, int],
    intermediate: int,
    vocab: int,
) -> ModelConfig:
    """What the models have in common, and what they do not."""
    return ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        vocab_size=vocab,
        layer_types=tuple(
            "full_attention" if i % 4 == 3 else "linear_attention" for i in range(layers)
        ),
        rms_norm_eps=1e-6,
        num_attention_heads=heads,
        num_key_value_heads=2,
        head_dim=256,
        rotary_dim=64,
        rope_theta=1e7,
        linear_num_key_heads=16,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_conv_kernel_dim=4,
        num_experts=experts[0],
        num_experts_per_tok=experts[1],
        moe_intermediate_size=intermediate,
        shared_expert_intermediate_size=intermediate,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        max_position_embeddings=262144,
        eos_token_ids=(),
        quantization=None,
    )


_397B = _config("qwen3_5_moe", 4096, 60, 32, 64, (512, 10), 1024, 248320)
_122B = _config("qwen3_5_moe", 3072, 48, 32, 64, (256, 8), 1024, 248320)
_35B = _config("qwen3_5_moe", 2048, 40, 16, 32, (256, 8), 512, 248320)
_NEXT = _config("qwen3_next", 2048, 48, 16, 32, (512, 10), 512, 151936)

FAMILY = (
    Published("mlx-community/Qwen3.5-397B-A17B-4bit", _397B),
    Published("  after 'flashmoe pack --bits 2'", _397B, bits=2, expert_bits=2),
    Published("mlx-community/Qwen3.5-122B-A10B-4bit", _122B),
    Published("mlx-community/Qwen3-Next-80B-A3B-Instruct-4bit", _NEXT),
    Published("mlx-community/Qwen3-Coder-Next-4bit", _NEXT),
    Published("mlx-community/Qwen3.5-35B-A3B-4bit", _35B),
)
