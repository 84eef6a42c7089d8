"""The libraries whose formats flashmoe reads, on the random weights of tests/checkpoints.py.

transformers_model("ratio-4")     # transformers' model of a variant, in float32
make(directory, "ratio-4")        # the checkpoint, written by transformers and mlx-lm
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
import transformers
from checkpoints import VARIANTS, Variant, text_config, weights
from engines import Logits
from mlx.utils import tree_map
from mlx_lm import utils
from safetensors.torch import load_file, save_file

TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MLX_DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def transformers_model(name: str) -> transformers.PreTrainedModel:
    """The transformers model of a variant: its weights, as rounded to its dtype, in float32."""
    values = text_config(name)
    if VARIANTS[name].qwen3_next:
        model = transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**values))
    else:
        model = transformers.Qwen3_5MoeForCausalLM(transformers.Qwen3_5MoeTextConfig(**values))
    state = {key: torch.from_numpy(tensor.floats()) for key, tensor in weights(name).items()}
    tied = {"lm_head.weight"} if values["tie_word_embeddings"] else set()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (set(missing), unexpected) == (tied, [])
    return model.eval()


def transformers_logits(model: torch.nn.Module, ids: np.ndarray) -> Logits:
    """float32 [len(ids), vocab]."""
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()


def mlx_logits(directory: Path, ids: np.ndarray) -> Logits:
    """mlx-lm's forward pass over an MLX checkpoint, dequantized, in float32."""
    model, config = utils.load_model(directory)
    # In float32 before it dequantizes: in bfloat16 each weight would be rounded to 8 bits again.
    model.update(
        tree_map(
            lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
            model.parameters(),
        )
    )
    if "quantization" in config:
        model = utils.dequantize_model(model)
    return np.array(model(mx.array(ids[None])).astype(mx.float32))[0]


def make(directory: Path, name: str) -> Path:
    """The checkpoint of a variant as the libraries write it; `directory` must not exist."""
    variant = VARIANTS[name]
    if variant.mlx is not None:
        source = directory.with_name(directory.name + "-source")
        _save(source, name, variant)
        _convert(source, directory, *variant.mlx)
    else:
        _save(directory, name, variant)
    return directory


def _save(directory: Path, name: str, variant: Variant) -> None:
    """By transformers; nested as Qwen publishes, which transformers does not write."""
    model = transformers_model(name).to(TORCH_DTYPES[variant.dtype])
    nested = variant.form == "nested"
    model.save_pretrained(
        directory,
        save_original_format=variant.form == "separate",
        max_shard_size=1 << 30 if nested or not variant.shard_bytes else variant.shard_bytes,
    )
    path = directory / "config.json"
    config = json.loads(path.read_text())
    if variant.qwen3_next:  # at top level, as before transformers 5; mlx-lm reads nothing else
        rope = config.pop("rope_parameters")
        config |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor")}
        config["rope_scaling"] = None
    if nested:
        config = {
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "model_type": "qwen3_5_moe",
            "text_config": config,
            "tie_word_embeddings": config["tie_word_embeddings"],
        }
        tensors = {
            key.replace("model.", "model.language_model.", 1)
            if key.startswith("model.")
            else key: t
            for key, t in load_file(directory / "model.safetensors").items()
        }
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path.write_text(json.dumps(config))


def _convert(source: Path, directory: Path, bits: int, group: int) -> None:
    """What `mlx_lm.convert` does, less the tokenizer, which these checkpoints do not have."""
    model, config = utils.load_model(source)
    if bits != 16:
        model, config = utils.quantize_model(model, config, group, bits)
    utils.save_model(directory, model)
    utils.save_config(config, directory / "config.json")


def demo_in_transformers(directory: Path) -> Any:
    """transformers' model in float32 with an MLX checkpoint's weights, dequantized by mlx."""
    config = json.loads((directory / "config.json").read_text())
    stored = mx.load(str(directory / "model.safetensors"))
    found: dict[str, torch.Tensor] = {}
    for name, array in stored.items():
        module, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        whole = array
        if module + ".scales" in stored:
            form = config["quantization"].get(module) or config["quantization"]
            scales, biases = (
                stored[f"{module}.{x}"].astype(mx.float32) for x in ("scales", "biases")
            )
            whole = mx.dequantize(array, scales, biases, form["group_size"], form["bits"])
        tensor = torch.from_numpy(np.array(whole.astype(mx.float32)))
        if module.endswith("conv1d"):
            tensor = tensor.transpose(1, 2)
        if module.endswith(("layernorm", "q_norm", "k_norm", "model.norm")):
            tensor -= 1  # MLX stores 1 + w
        found[name.removeprefix("language_model.")] = tensor
    for i in range(config["text_config"]["num_hidden_layers"]):
        switch, experts = f"model.layers.{i}.mlp.switch_mlp.", f"model.layers.{i}.mlp.experts."
        halves = [found.pop(f"{switch}{x}_proj.weight") for x in ("gate", "up")]
        found[experts + "gate_up_proj"] = torch.cat(halves, dim=1)
        found[experts + "down_proj"] = found.pop(switch + "down_proj.weight")
    model = transformers.Qwen3_5MoeForCausalLM(
        transformers.Qwen3_5MoeTextConfig(**config["text_config"])
    )
    model.load_state_dict(found)
    return model.float().eval()
