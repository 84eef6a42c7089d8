"""The architecture of a checkpoint, as config.json and generation_config.json give it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flashmoe.checkpoint.metadata import Metadata
from flashmoe.errors import ArgumentError, CheckpointError

ExpertsPerToken = int | Literal["auto"] | None
"""How many experts to run for a token: a number, "auto", or None for the model's own."""

MODEL_TYPES = ("qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next")
LAYER_TYPES = ("linear_attention", "full_attention")
BITS = (2, 4, 8)
GROUPS = (32, 64, 128)

_ROPE_TYPES = ("default", "mrope")  # of text mRoPE is plain RoPE
_ROPE_KEYS = (
    "rope_theta",
    "partial_rotary_factor",
    "rope_type",
    "type",
    "mrope_section",
    "mrope_interleaved",
    "rope_parameters",
    "rope_scaling",
)
_ROPE_KEY = re.compile("m?rope|rotary")

# The modules of the text model under every prefix, of which alone the quantization matters.
_OF_TEXT = re.compile(
    r"((model\.)?language_model\.)?(model\.)?"
    r"(lm_head|embed_tokens|layers\.\d+\.(self_attn|linear_attn|mlp)\..+)"
)


@dataclass(frozen=True)
class Quantization:
    """What config.json says of MLX's affine format; shapes decide, since it is wrong at times.

    `bits` and `group` are None where it does not say. `exceptions` maps the path of a module as the
    config spells it (its tensors' names less `.weight`, `.scales` or `.biases`) to (bits, group),
    or to None where it is not quantized.
    """

    bits: int | None
    group: int | None
    exceptions: Mapping[str, tuple[int | None, int | None] | None]


@dataclass(frozen=True)
class ModelConfig:
    """The constants of a forward pass, by the names of the published config.json.

    `rotary_dim` is head_dim times partial_rotary_factor; `layer_types` holds one of LAYER_TYPES a
    layer.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    layer_types: tuple[str, ...]
    rms_norm_eps: float
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    shared_expert_intermediate_size: int
    norm_topk_prob: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None

    @property
    def key_width(self) -> int:
        """Width of GatedDeltaNet's q, and of its k."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_width(self) -> int:
        """Width of GatedDeltaNet's v, and of its z."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_channels(self) -> int:
        return 2 * self.key_width + self.value_width

    @property
    def default_experts_per_token(self) -> int:
        """What `experts_per_token="auto"` means: 4 for Qwen3.5-397B-A17B, for which the original
        engine showed that it suffices (docs/quality.md), else the model's own number."""
        is_397b = self.model_type == "qwen3_5_moe" and (
            self.hidden_size,
            len(self.layer_types),
            self.num_experts,
        ) == (4096, 60, 512)
        return min(4, self.num_experts_per_tok) if is_397b else self.num_experts_per_tok

    def experts_in_force(self, asked: ExpertsPerToken) -> int:
        """The number of experts that run for a token: at most the model's own.

        Raises:
            ArgumentError: `asked` is not "auto", None (the model's own) or a number from 1 on.
        """
        if asked == "auto":
            return self.default_experts_per_token
        if asked is None:
            return self.num_experts_per_tok
        if type(asked) is not int or asked < 1:
            raise ArgumentError(
                "experts_per_token must be 'auto', None for the model's own number, or a whole "
                f"number, at least 1; got {asked!r}"
            )
        return min(asked, self.num_experts_per_tok)

    @staticmethod
    def of(metadata: Metadata) -> "ModelConfig":
        """From config.json, and generation_config.json where there is one.

        Raises:
            CheckpointError: a file is missing or damaged, a value is absurd or contradicts another,
                or the model is of a kind that flashmoe does not run; the message names the key.
        """
        top = _Section(metadata.directory / "config.json", "", metadata.config)
        text = top.section("text_config") or top
        _refuse_unsupported(top, text)
        _refuse_modelopt(metadata)

        layers = text.integer("num_hidden_layers", 1, 1000)
        heads = text.integer("num_attention_heads", 1, 4096)
        kv_heads = text.integer("num_key_value_heads", 1, 4096)
        key_heads = text.integer("linear_num_key_heads", 1, 4096)
        value_heads = text.integer("linear_num_value_heads", 1, 4096)
        experts = text.integer("num_experts", 1, 65536)
        head_dim = text.integer("head_dim", 2, 4096)
        vocab = text.integer("vocab_size", 1, 1 << 24)
        if heads % kv_heads:
            raise text.error(
                "num_attention_heads", heads, f"a multiple of num_key_value_heads, {kv_heads}"
            )
        if value_heads % key_heads:
            raise text.error(
                "linear_num_value_heads",
                value_heads,
                f"a multiple of linear_num_key_heads, {key_heads}",
            )
        rope_theta, rotary_factor = _rope(top, text)
        rotary_dim = int(head_dim * rotary_factor)
        if rotary_dim < 2 or rotary_dim % 2:
            raise text.error(
                "partial_rotary_factor",
                rotary_factor,
                f"one that takes an even number of head_dim's {head_dim} dimensions",
            )
        tied = (top if "tie_word_embeddings" in top.values else text).boolean(
            "tie_word_embeddings", False
        )
        return ModelConfig(
            model_type=top.values["model_type"],
            hidden_size=text.integer("hidden_size", 1, 1 << 20),
            vocab_size=vocab,
            layer_types=_layer_types(text, layers),
            rms_norm_eps=text.number("rms_norm_eps", 0.0, 1.0, 1e-6),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=rotary_dim,
            rope_theta=rope_theta,
            linear_num_key_heads=key_heads,
            linear_num_value_heads=value_heads,
            linear_key_head_dim=text.integer("linear_key_head_dim", 1, 4096),
            linear_value_head_dim=text.integer("linear_value_head_dim", 1, 4096),
            # A kernel of 1 could not be told apart in MLX's conv1d layout and in Hugging Face's.
            linear_conv_kernel_dim=text.integer("linear_conv_kernel_dim", 2, 16),
            num_experts=experts,
            num_experts_per_tok=text.integer("num_experts_per_tok", 1, experts),
            moe_intermediate_size=text.integer("moe_intermediate_size", 1, 1 << 20),
            shared_expert_intermediate_size=text.integer(
                "shared_expert_intermediate_size", 1, 1 << 20
            ),
            norm_topk_prob=text.boolean("norm_topk_prob", True),
            tie_word_embeddings=tied,
            max_position_embeddings=text.integer("max_position_embeddings", 1, 1 << 30, 32768),
            eos_token_ids=_eos_token_ids(metadata, top, text, vocab),
            quantization=_quantization(top, text),
        )


class _Section:
    """One object of a JSON file, whose values are taken with their types and bounds checked."""

    def __init__(self, path: Path, name: str, values: dict[str, Any]) -> None:
        self.path = path
        self.name = name
        self.values = values

    def error(self, key: str, found: Any, expected: str) -> CheckpointError:
        text = repr(found)
        if len(text) > 80:
            text = text[:77] + "..."
        return CheckpointError(f"{self.path}: {self.name}{key} is {text}, expected {expected}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(f"{self.path}: {self.name}{key} is missing")
        return default

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.error(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, above: float, most: float, default: float) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not above < value <= most:
            raise self.error(key, value, f"a number above {above:g}, at most {most:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, value, "true or false")
        return value

    def section(self, key: str) -> "_Section | None":
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, value, "an object")
        return _Section(self.path, f"{self.name}{key}.", value)


def _refuse_unsupported(top: _Section, text: _Section) -> None:
    model_type = top.values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise top.error("model_type", model_type, f"one that flashmoe runs: {_one_of(MODEL_TYPES)}")
    supported: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attn_output_gate": (True,),
        "mlp_only_layers": ([],),
        "decoder_sparse_step": (1,),
    }
    # transformers renormalises the routing of Qwen3.5 whatever its config says.
    if model_type != "qwen3_next":
        supported["norm_topk_prob"] = (True,)
    for key, accepted in supported.items():
        value = text.values.get(key)
        if value is not None and value not in accepted:
            raise text.error(key, value, f"{_one_of(accepted)}: nothing else is supported")


def _one_of(values: tuple[Any, ...]) -> str:
    return ", ".join(str(value) for value in values)


def _layer_types(text: _Section, layers: int) -> tuple[str, ...]:
    value = text.values.get("layer_types")
    if value is None:
        interval = text.integer("full_attention_interval", 1, 1000, 4)
        return tuple(LAYER_TYPES[(i + 1) % interval == 0] for i in range(layers))
    if not isinstance(value, list) or not all(kind in LAYER_TYPES for kind in value):
        raise text.error("layer_types", value, f"a list of {_one_of(LAYER_TYPES)}")
    if len(value) != layers:
        raise text.error(
            "layer_types", value, f"{layers} entries, as num_hidden_layers says, not {len(value)}"
        )
    return tuple(value)


def _rope(top: _Section, text: _Section) -> tuple[float, float]:
    """(theta, partial_rotary_factor), from rope_parameters or from the keys it replaced.

    A key that is not known is refused: what it means would otherwise be ignored, and every position
    but the first be wrong.
    """
    sections = []
    for outer in (text, top) if top is not text else (text,):
        found = [outer]
        for key in ("rope_scaling", "rope_parameters"):
            if section := outer.section(key):
                for name in ("rope_type", "type"):
                    kind = section.values.get(name)
                    if kind is not None and kind not in _ROPE_TYPES:
                        raise section.error(name, kind, "default: RoPE scaling is not supported")
                found.insert(0, section)
        for section in found:
            for key, value in section.values.items():
                known = key in _ROPE_KEYS or (section is outer and not _ROPE_KEY.match(key))
                if not known and value is not None:
                    raise section.error(
                        key, value, f"no such key: flashmoe knows {_one_of(_ROPE_KEYS)}"
                    )
        sections += found

    def holder(key: str) -> _Section:
        return next((s for s in sections if s.values.get(key) is not None), text)

    return (
        holder("rope_theta").number("rope_theta", 1.0, 1e15, 10000.0),
        holder("partial_rotary_factor").number("partial_rotary_factor", 0.0, 1.0, 0.25),
    )


def _eos_token_ids(
    metadata: Metadata, top: _Section, text: _Section, vocab: int
) -> tuple[int, ...]:
    """Of all three: conversions keep one and lose another, and each of them ends a text."""
    path = metadata.directory / "generation_config.json"
    found: dict[int, None] = {}
    for section in (_Section(path, "", metadata.generation), top, text):
        value = section.values.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and 0 <= i < vocab for i in ids):
                raise section.error("eos_token_id", value, f"token ids below {vocab}")
            found |= dict.fromkeys(ids)
    return tuple(found)


def _quantization(top: _Section, text: _Section) -> Quantization | None:
    section = None
    for key in ("quantization", "quantization_config"):
        section = section or top.section(key) or text.section(key)
    if section is None:
        return None
    _refuse_other_methods(section)
    exceptions: dict[str, tuple[int | None, int | None] | None] = {}
    for path, value in section.values.items():
        if value is False:
            exceptions[path] = None
        elif isinstance(value, dict) and _OF_TEXT.fullmatch(path):
            exceptions[path] = _affine(_Section(section.path, f"{section.name}{path}.", value))
    bits, group = _affine(section)
    return Quantization(bits, group, exceptions)


def _refuse_other_methods(section: _Section) -> None:
    for key in ("quant_method", "quant_algo", "quant_type"):
        method = section.values.get(key)
        if method is not None and method not in ("mlx", "affine"):
            raise section.error(
                key,
                method,
                "MLX's affine quantization: use the model's bf16 or MLX 4-bit edition"
                " (mlx-community), or quantize the bf16 one with 'flashmoe pack'",
            )


def _refuse_modelopt(metadata: Metadata) -> None:
    """NVIDIA's ModelOpt says in a file of its own how it quantized."""
    path = metadata.directory / "hf_quant_config.json"
    if metadata.modelopt:
        section = _Section(path, "", metadata.modelopt).section("quantization")
        if section is not None:
            _refuse_other_methods(section)


def _affine(section: _Section) -> tuple[int | None, int | None]:
    """Bits and group; None for what the config does not say."""
    mode = section.values.get("mode")
    if mode not in (None, "affine"):
        raise section.error("mode", mode, "affine: no other quantization is supported")
    bits = group = None
    if section.values.get("bits") is not None:
        bits = section.integer("bits", 1, 32)
        if bits not in BITS:
            expected = f"one of {_one_of(BITS)}: {bits} bits are not supported"
            raise section.error("bits", bits, expected)
    if section.values.get("group_size") is not None:
        group = section.integer("group_size", 1, 1 << 20)
        if group not in GROUPS:
            raise section.error("group_size", group, f"one of {_one_of(GROUPS)}")
    return bits, group
