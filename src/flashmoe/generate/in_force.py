"""What is in force when a model runs, in one line."""

from __future__ import annotations

from flashmoe.checkpoint.config import ModelConfig
from flashmoe.generate.setting import Setting
from flashmoe.machine import probe


def runs_fewer(config: ModelConfig, setting: Setting) -> bool:
    """Whether fewer experts run for a token than the model was made for."""
    return setting.experts_per_token < config.num_experts_per_tok


def in_force(config: ModelConfig, setting: Setting, backend: str, context: int) -> str:
    """Experts per token, device, kernels, precision, cache and context.

    Args:
        backend: the one that computes, which `setting` may have left open.
        context: most tokens of a sequence.
    """
    own = f"the model's own: {config.num_experts_per_tok}"
    if runs_fewer(config, setting):
        # docs/quality.md, 16 bits
        own += "; fewer are faster but less exact: 4 of 10 change one token in five of the demo's"
    parts = [
        f"{setting.experts_per_token} of {config.num_experts} experts per token ({own})",
        f"{backend} on {probe.processor() or 'an unknown processor'}",
    ]
    if backend == "cpu":
        parts.append(f"{setting.threads} threads with {kernels_of(backend)} kernels")
    int8 = setting.precision == "int8"
    inputs = "int8" if int8 and backend == "cpu" and config.quantization else "float32"
    parts.append(f"{inputs} activations and {'bfloat16' if int8 else 'float32'} keys and values")
    cache = setting.cache_bytes
    parts.append(f"a cache of {cache / 1e9:.2f} GB for experts" if cache else "no cache of its own")
    parts.append(f"a context of {context} tokens")
    return ", ".join(parts)


def kernels_of(backend: str) -> str:
    """The kernels that a backend computes with on this machine."""
    from flashmoe import _native  # noqa: PLC0415

    return _native.cpu_kernels() if backend == "cpu" else backend
