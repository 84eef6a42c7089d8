"""Make the checkpoints from what train.py left: bf16 in the Hugging Face layout, and MLX 4-bit.

    python export.py TOKENIZER OUT STATE/246=0.2 STATE/553=0.4 STATE/810=0.4

averages snapshots with these shares (one snapshot and no share is taken as it is), and writes
OUT/bf16 and OUT/mlx-4bit. The second is what the package ships; its quantizer is mlx-lm's.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from mlx_lm.convert import convert
from safetensors.torch import load_file, save_file
from train import model_config
from transformers import Qwen3_5MoeForCausalLM

EXTRA = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def average(snapshots: list[str]) -> dict[str, torch.Tensor]:
    """The weights of "FOLDER=SHARE" each, averaged in float32 and rounded to bf16."""
    total: dict[str, torch.Tensor] = {}
    for snapshot in snapshots:
        folder, _, share = snapshot.partition("=")
        for shard in sorted(Path(folder).glob("weights-*.safetensors")):
            for name, tensor in load_file(shard).items():
                total[name] = total.get(name, 0) + float(share or 1) * tensor.float()
    return {name: tensor.to(torch.bfloat16) for name, tensor in total.items()}


def export_bf16(weights: dict[str, torch.Tensor], tokenizer: Path, out: Path) -> None:
    vocab = weights["lm_head.weight"].shape[0]
    config = model_config(vocab)
    config.use_cache = True
    config.eos_token_id = [2, 0]  # <|im_end|>, <|endoftext|>
    model = Qwen3_5MoeForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(weights)
    model.save_pretrained(out)
    for name in EXTRA:
        shutil.copy(tokenizer / name, out)


def export_mlx(weights: dict[str, torch.Tensor], source: Path, out: Path) -> None:
    """mlx-lm reads the nested configuration and fused experts: it is given both, then quantizes."""
    nested = out.with_name("nested")
    shutil.rmtree(nested, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    nested.mkdir()
    text = json.loads((source / "config.json").read_text())
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": {**text, "full_attention_interval": 4},
        "eos_token_id": text["eos_token_id"],
        "tie_word_embeddings": False,
    }
    (nested / "config.json").write_text(json.dumps(config))
    save_file(weights, nested / "model.safetensors", {"format": "pt"})
    for name in EXTRA:
        shutil.copy(source / name, nested)
    convert(str(nested), str(out), quantize=True, q_group_size=64, q_bits=4)
    for name in EXTRA:
        shutil.copy(source / name, out)
    for name in ("README.md", "model.safetensors.index.json"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(nested)


if __name__ == "__main__":
    tokenizer, out = map(Path, sys.argv[1:3])
    weights = average(sys.argv[3:])
    export_bf16(weights, tokenizer, out / "bf16")
    export_mlx(weights, out / "bf16", out / "mlx-4bit")
