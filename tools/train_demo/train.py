"""Train the demo model: transformers' Qwen3_5MoeForCausalLM on one GPU, resumable.

    python train.py DATA STATE --minutes 14

DATA holds what prepare.py wrote; STATE gets `state.pt` (everything a later run resumes from, once
a minute), `log.jsonl`, and once a minute a snapshot of the bf16 weights, STATE/SECONDS/weights-*,
which export.py averages. The schedule follows the clock, not the step count: constant after a
warm-up, then linear to zero, over `--minutes` of training, whatever the machine's speed and however
often the run is interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import math
import os
import time
from pathlib import Path
from typing import Any

import fast_ops
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

SEQUENCE = 1024
# Share of the rows of a batch that each stream of prepare.py gives.
MIX = {"literature": 0.28, "manual": 0.48, "dialogue": 0.24}
BALANCE = 0.01  # weight of the load-balancing loss


def model_config(vocab: int, tiny: bool = False) -> Qwen3_5MoeTextConfig:
    """The proportions of Qwen3.5-397B-A17B at 1/16 of its width; every width a multiple of 64."""
    return Qwen3_5MoeTextConfig(
        vocab_size=vocab,
        hidden_size=64 if tiny else 256,
        num_hidden_layers=4 if tiny else 8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=8,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=16 if tiny else 48,
        num_experts_per_tok=10,
        max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
        },
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        use_cache=False,
    )


def build(config: Qwen3_5MoeTextConfig) -> Qwen3_5MoeForCausalLM:
    model = Qwen3_5MoeForCausalLM._from_config(config, attn_implementation="sdpa")
    model.config._experts_implementation_internal = "sorted"  # the setter admits built-in ones
    for name, p in model.named_parameters():
        if name.endswith("dt_bias"):  # decay rates as in Mamba: steps of 0.001 to 0.1
            step = torch.exp(torch.empty_like(p).uniform_(math.log(1e-3), math.log(0.1)))
            p.data = step + torch.log(-torch.expm1(-step))
        elif name.endswith("A_log"):
            p.data = torch.empty_like(p).uniform_(1, 16).log()
        elif name.endswith(("o_proj.weight", "out_proj.weight", "down_proj", "down_proj.weight")):
            p.data *= (2 * config.num_hidden_layers) ** -0.5
    return model


def watch_balance(model: Qwen3_5MoeForCausalLM) -> list[nn.Module]:
    """Make every router keep its load-balancing loss (Switch Transformer, eq. 4), per layer:
    1.0 when all experts are used alike. Returns the routers."""
    gates = [layer.mlp.gate for layer in model.model.layers]

    def hook(gate: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _, index = output
        chance = logits.float().softmax(-1).mean(0)
        experts = torch.arange(gate.num_experts, device=index.device)
        used = (index.reshape(-1, 1) == experts).sum(0) / index.numel()
        gate.balance = gate.num_experts * (chance * used).sum()
        gate.peak = used.max() * gate.num_experts

    for gate in gates:
        gate.register_forward_hook(hook)
    return gates


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan 2024), at AdamW's update size (Liu et al. 2025)."""

    def __init__(self, params: list[nn.Parameter], lr: float, decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,) = self.param_groups
        batches: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor, bool]]] = {}
        for p in group["params"]:
            momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
            momentum.lerp_(p.grad, 0.05)
            update = p.grad.lerp(momentum, 0.95).reshape(-1, *p.shape[-2:])
            if p.dim() == 3 and p.shape[-2] == 2 * 64:  # gate and up, two matrices
                update = update.unflatten(1, (2, -1)).flatten(0, 1)
            tall = update.shape[-2] > update.shape[-1]
            update = update.mT if tall else update
            batches.setdefault(update.shape[-2:], []).append((p, update, tall))
        for shape, members in batches.items():
            x = torch.cat([update for _, update, _ in members]).to(torch.bfloat16)
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            x = x.float() * (0.2 * max(shape) ** 0.5)
            for (p, _, tall), part in zip(
                members, x.split([u.shape[0] for _, u, _ in members]), strict=True
            ):
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_((part.mT if tall else part).reshape(p.shape), alpha=-group["lr"])


def optimisers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    matrices, rest = [], []
    for name, p in model.named_parameters():
        small = any(s in name for s in ("conv1d", "in_proj_a", "in_proj_b", "gate.weight"))
        inner = "layers." in name and p.dim() >= 2 and not small
        (matrices if inner else rest).append(p)
    fused = next(model.parameters()).is_cuda
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=fused)
    return [Muon(matrices, lr), adam]


def schedule(progress: float) -> float:
    """Factor on the learning rate: warm-up over 1 %, constant, linear to zero from 40 %."""
    return min(1.0, progress / 0.01 + 0.02, max(0.0, (1 - progress) / 0.6))


class Streams:
    """Random windows of the token streams, the same for the same step and seed."""

    def __init__(self, data: Path, device: str, rows: int) -> None:
        self.rows, self.device = rows, device
        self.tokens = {}
        for name in [*MIX, "valid"]:
            with lzma.open(data / f"{name}.npy.xz") as file:
                self.tokens[name] = torch.from_numpy(np.load(file).astype(np.int32)).to(device)
        counts = [round(rows * share) for share in MIX.values()]
        counts[0] += rows - sum(counts)
        self.counts = dict(zip(MIX, counts, strict=True))

    def batch(self, step: int) -> Tensor:
        """[rows, SEQUENCE + 1] token ids."""
        generator = torch.Generator(self.device).manual_seed(step)
        window = torch.arange(SEQUENCE + 1, device=self.device)
        parts = []
        for name, count in self.counts.items():
            tokens = self.tokens[name]
            start = torch.randint(
                len(tokens) - SEQUENCE - 1, (count, 1), generator=generator, device=self.device
            )
            parts.append(tokens[start + window])
        return torch.cat(parts).long()

    def valid(self) -> Tensor:
        tokens = self.tokens["valid"]
        rows = min(len(tokens) // (SEQUENCE + 1), 128)
        return tokens[: rows * (SEQUENCE + 1)].view(rows, -1).long()


class Trainer:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        fast_ops.install()
        self.meta = json.loads((args.data / "meta.json").read_text())
        self.model = build(model_config(self.meta["vocab"], args.tiny)).to(self.device)
        self.gates = watch_balance(self.model)
        self.loss = self.cross_entropy
        if args.compile:
            torch._dynamo.config.recompile_limit = 64
            for layer in self.model.model.layers:
                layer.forward = torch.compile(layer.forward, dynamic=False)
            self.loss = torch.compile(self.cross_entropy, dynamic=False)
        self.optimisers = optimisers(self.model, args.lr)
        self.streams = Streams(args.data, self.device, args.rows)
        self.step, self.elapsed = 0, 0.0
        args.state.mkdir(parents=True, exist_ok=True)
        if (args.state / "state.pt").exists():
            self.restore()

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda"):
            hidden = self.model.model(tokens[:, :-1], use_cache=False).last_hidden_state
            return self.loss(hidden, tokens[:, 1:])

    def train_step(self) -> Tensor:
        tokens = self.streams.batch(self.step)
        micro = tokens.split(self.args.micro or len(tokens))
        total = torch.zeros((), device=self.device)
        for part in micro:
            loss = self.forward(part)
            balance = torch.stack([gate.balance for gate in self.gates]).mean()
            ((loss + BALANCE * balance) / len(micro)).backward()
            total += loss.detach() / len(micro)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        factor = schedule(self.elapsed / (60 * self.args.minutes))
        for optimiser in self.optimisers:
            optimiser.param_groups[0]["lr"] = self.args.lr * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return total

    def validate(self) -> float:
        """Bits per byte on the `valid` split. Gradients stay on: without them every layer would be
        compiled once more, which takes longer than the validation."""
        rows = self.streams.valid()
        size = self.args.micro or self.args.rows
        losses = [self.forward(part).item() for part in rows.split(size) if len(part) == size]
        return sum(losses) / len(losses) * self.meta["valid_tokens_per_byte"] / math.log(2)

    def save(self, final: bool) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "elapsed": self.elapsed,
        }
        torch.save(state, self.args.state / "state.tmp")
        os.replace(self.args.state / "state.tmp", self.args.state / "state.pt")
        shards: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, tensor in self.model.state_dict().items():
            tensor = tensor.to(torch.bfloat16).contiguous()
            if size + tensor.nbytes > 15e6:
                shards.append({})
                size = 0
            shards[-1][name] = tensor
            size += tensor.nbytes
        snapshot = self.args.state / f"{self.elapsed:.0f}"
        snapshot.mkdir(exist_ok=True)
        for i, shard in enumerate(shards):
            save_file(shard, snapshot / f"weights-{i}.safetensors")
        if final:
            (self.args.state / "done").write_text(f"{self.step}\n")

    def restore(self) -> None:
        state = torch.load(self.args.state / "state.pt", map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.elapsed = state["step"], state["elapsed"]

    def log(self, **values: Any) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self.elapsed, 1), **values})
        print(line, flush=True)
        with (self.args.state / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def run(self) -> None:
        budget = 60 * self.args.minutes
        started = time.monotonic()
        self.train_step()  # the first step compiles; its time is not the schedule's
        self.train_step()
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.log(compile_seconds=round(time.monotonic() - started, 1))
        base, mark = self.elapsed, time.monotonic()
        saved = reported = self.elapsed
        first = self.step
        while self.elapsed < budget:
            loss = self.train_step()
            if self.step % 20 == 0:
                value = loss.item()  # waits for the GPU, so the clock below is honest
                self.elapsed = base + time.monotonic() - mark
                if not math.isfinite(value):
                    raise SystemExit(f"loss is {value} at step {self.step}")
                if self.elapsed - reported > self.args.report:
                    reported = self.elapsed
                    tokens = (self.step - first) * self.args.rows * SEQUENCE
                    peak = max(gate.peak.item() for gate in self.gates)
                    self.log(
                        loss=round(value, 4), peak_load=round(peak, 2),
                        tokens_per_second=round(tokens / (self.elapsed - base)),
                    )  # fmt: skip
                if self.elapsed - saved > 60:
                    saved = self.elapsed
                    self.log(valid_bits_per_byte=round(self.validate(), 4))
                    self.save(final=False)
                    self.elapsed = base + time.monotonic() - mark
            elif self.device == "cpu":
                self.elapsed = base + time.monotonic() - mark
        self.log(valid_bits_per_byte=round(self.validate(), 4), final=True)
        self.save(final=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("state", type=Path)
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--rows", type=int, default=64, help="sequences of 1024 a step")
    parser.add_argument("--micro", type=int, default=0, help="sequences a pass, 0: all at once")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--report", type=float, default=10, help="seconds between log lines")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a toy model, to try the loop on a CPU")
    with contextlib.suppress(KeyboardInterrupt):
        Trainer(parser.parse_args()).run()


if __name__ == "__main__":
    main()
