"""Every weight of the architecture, said once: its canonical name, its shape and its role.

`weights` finds them in a checkpoint's tensors, the native core asks for them by name, `flashmoe
info` adds them up by role, and the benchmarks' checkpoint maker writes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from flashmoe.checkpoint.config import ModelConfig


class Kind(Enum):
    """How a weight is stored under its name."""

    MATRIX = "matrix"
    """`NAME.weight` [rows, cols], with `.scales` and `.biases` where it is quantized."""
    EXPERTS = "experts"
    """A matrix of each routed expert of a layer."""
    NORM = "norm"
    """`NAME.weight`, zero-centred as Hugging Face stores it, used as 1 + w."""
    VECTOR = "vector"
    """`NAME.weight`, used as it is stored."""
    CONVOLUTION = "convolution"
    """`NAME.weight`, depthwise: [channels, 1, taps], or [channels, taps, 1] in MLX's convention."""
    PARAMETER = "parameter"
    """`NAME` itself, a vector."""


@dataclass(frozen=True)
class Weight:
    """One weight. `shape` is (rows, cols), outputs x inputs, or what Kind says of others."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    role: str


EMBEDDINGS, HEAD = "embeddings", "output head"
DELTA_NET, ATTENTION = "GatedDeltaNet", "attention"
ROUTER, SHARED_EXPERT, EXPERTS = "router", "shared expert", "routed experts"
SMALL = "norms, convolutions"
ROLES = (EMBEDDINGS, HEAD, DELTA_NET, ATTENTION, ROUTER, SHARED_EXPERT, EXPERTS, SMALL)


def weights_of(config: ModelConfig) -> Iterator[Weight]:
    """The weights of a model in the order in which a token meets them.

    A head that is tied to the embedding is not among them.
    """
    c = config
    yield Weight("embed_tokens", (c.vocab_size, c.hidden_size), Kind.MATRIX, EMBEDDINGS)
    for layer, layer_type in enumerate(c.layer_types):
        name = f"layers.{layer}."
        yield _norm(name + "input_layernorm", c.hidden_size)
        if layer_type == "full_attention":
            yield from _attention(name + "self_attn.", c)
        else:
            yield from _gated_delta_net(name + "linear_attn.", c)
        yield _norm(name + "post_attention_layernorm", c.hidden_size)
        yield from _mixture_of_experts(name + "mlp.", c)
    yield _norm("norm", c.hidden_size)
    if not c.tie_word_embeddings:
        yield Weight("lm_head", (c.vocab_size, c.hidden_size), Kind.MATRIX, HEAD)


def _norm(name: str, width: int) -> Weight:
    return Weight(name, (width,), Kind.NORM, SMALL)


def _attention(name: str, c: ModelConfig) -> Iterator[Weight]:
    width, key_values = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    # Of q_proj each head has its query, then its output's gate.
    for projection, rows in (("q_proj", 2 * width), ("k_proj", key_values), ("v_proj", key_values)):
        yield Weight(name + projection, (rows, c.hidden_size), Kind.MATRIX, ATTENTION)
    yield _norm(name + "q_norm", c.head_dim)
    yield _norm(name + "k_norm", c.head_dim)
    yield Weight(name + "o_proj", (c.hidden_size, width), Kind.MATRIX, ATTENTION)


def _gated_delta_net(name: str, c: ModelConfig) -> Iterator[Weight]:
    heads = c.linear_num_value_heads
    for projection, rows in (
        ("in_proj_qkv", c.conv_channels),
        ("in_proj_z", c.value_width),
        ("in_proj_b", heads),
        ("in_proj_a", heads),
    ):
        yield Weight(name + projection, (rows, c.hidden_size), Kind.MATRIX, DELTA_NET)
    taps = (c.conv_channels, c.linear_conv_kernel_dim)
    yield Weight(name + "conv1d", taps, Kind.CONVOLUTION, SMALL)
    yield Weight(name + "A_log", (heads,), Kind.PARAMETER, SMALL)
    yield Weight(name + "dt_bias", (heads,), Kind.PARAMETER, SMALL)
    yield Weight(name + "norm", (c.linear_value_head_dim,), Kind.VECTOR, SMALL)
    yield Weight(name + "out_proj", (c.hidden_size, c.value_width), Kind.MATRIX, DELTA_NET)


def _mixture_of_experts(name: str, c: ModelConfig) -> Iterator[Weight]:
    yield Weight(name + "gate", (c.num_experts, c.hidden_size), Kind.MATRIX, ROUTER)
    yield Weight(name + "shared_expert_gate", (1, c.hidden_size), Kind.MATRIX, ROUTER)
    for block, inner, kind, role in (
        ("shared_expert.", c.shared_expert_intermediate_size, Kind.MATRIX, SHARED_EXPERT),
        ("experts.", c.moe_intermediate_size, Kind.EXPERTS, EXPERTS),
    ):
        yield Weight(f"{name}{block}gate_proj", (inner, c.hidden_size), kind, role)
        yield Weight(f"{name}{block}up_proj", (inner, c.hidden_size), kind, role)
        yield Weight(f"{name}{block}down_proj", (c.hidden_size, inner), kind, role)
