"""Would reading ahead by the next layer's router pay? What it guesses, on the demo model.

    pip install '.[reference]' && python benchmarks/lookahead.py tests/data/heldout.txt

While a layer's experts are computed, the next layer's router is asked about the state before them.
A cache of whole experts (least recently used out first) is replayed with the true routing: of the
reads it needs, how many had been guessed, and how many reads were for nothing. The routing and
the states are those of transformers, in float32.
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flashmoe

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "reference")]
from libraries import demo_in_transformers  # noqa: E402

DEMO = Path(flashmoe.__file__).parent / "demo_model"


def routes(ids: list[int], experts_per_token: int) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each token and layer, and those that the layer before guessed: int
    [tokens, layers, experts_per_token]. Nothing guesses the first layer's: -1."""
    model = demo_in_transformers(DEMO)
    layers = model.model.layers
    for layer in layers:
        layer.mlp.gate.top_k = experts_per_token
    states: list[torch.Tensor] = []

    def keep(_module: Any, inputs: tuple[torch.Tensor]) -> None:
        states.append(inputs[0][0])

    norms = [layer.post_attention_layernorm for layer in layers]
    hooks = [norm.register_forward_pre_hook(keep) for norm in norms]
    with torch.no_grad():
        model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()

        def choose(layer: Any, state: torch.Tensor) -> np.ndarray:
            logits = layer.post_attention_layernorm(state) @ layer.mlp.gate.weight.T
            return logits.topk(experts_per_token, dim=-1).indices.numpy()

        true = [choose(layer, state) for layer, state in zip(layers, states, strict=True)]
        guessed = [choose(layers[i + 1], states[i]) for i in range(len(layers) - 1)]
    return np.stack(true, 1), np.stack([np.full_like(true[0], -1), *guessed], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--experts-per-token", type=int, default=4)
    parser.add_argument("--guesses", type=int, help="of a layer, the likeliest; default: all")
    arguments = parser.parse_args()
    with flashmoe.Model("demo") as model:
        ids = list(model.tokenizer.encode(arguments.text.read_text()).ids)[: arguments.tokens]
        experts = model.config.num_experts
    true, guessed = routes(ids, arguments.experts_per_token)
    hits = (true[:, 1:, :, None] == guessed[:, 1:, None, :]).any(3).mean()
    print(f"of the experts that a layer needs, {hits:.0%} were guessed by the layer before")
    for room in (0.1, 0.25, 0.35, 0.5):
        slots = int(room * experts * true.shape[1])
        cache: OrderedDict[tuple[int, int], None] = OrderedDict()
        needed = found = vain = 0
        for now, before in zip(true, guessed, strict=True):
            for layer in range(1, true.shape[1]):
                guess = before[layer][: arguments.guesses].tolist()
                ahead = {e for e in guess if (layer, e) not in cache}
                missing = {e for e in now[layer].tolist() if (layer, e) not in cache}
                needed += len(missing)
                found += len(missing & ahead)
                vain += len(ahead - missing)
                for e in now[layer].tolist():
                    cache[layer, e] = None
                    cache.move_to_end((layer, e))
                while len(cache) > slots:
                    cache.popitem(last=False)
        print(
            f"room for {room:4.0%}: of the reads needed {found / needed:.0%} guessed, and "
            f"{vain / needed:.0%} as many for nothing"
        )


if __name__ == "__main__":
    main()
