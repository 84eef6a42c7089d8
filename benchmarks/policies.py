"""Which experts a cache should keep: misses of several policies on the routing of a real text.

    python benchmarks/policies.py demo tests/data/heldout.txt

A cache of experts of all layers together is replayed over the routing that the model chose, token
by token as in decode. "decayed counts" throws out the expert whose uses, halved every `half-life`
tokens, are fewest: it knows both how often and how lately. "best possible" knows the future.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flashmoe import Model

Trace = npt.NDArray[np.int64]  # [tokens, experts used], each layer * experts + expert


def lru(trace: Trace, slots: int) -> int:
    cache: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for token in trace.tolist():
        for expert in token:
            if expert in cache:
                cache.move_to_end(expert)
                continue
            misses += 1
            cache[expert] = None
            if len(cache) > slots:
                cache.popitem(last=False)
    return misses


def by_score(trace: Trace, slots: int, half_life: float) -> int:
    """Least frequently used, with uses that fade; an infinite half-life is plain LFU."""
    count = int(trace.max()) + 1
    # log2 of the faded count, as of token 0: fading then moves no score against another.
    score = np.full(count, -np.inf)
    cached = np.zeros(count, bool)
    misses = held = 0
    for time, token in enumerate(trace):
        for expert in token:
            score[expert] = np.logaddexp2(score[expert], time / half_life)
            if cached[expert]:
                continue
            misses += 1
            if held == slots:
                candidates = np.where(cached, score, np.inf)
                candidates[token] = np.where(cached[token], 1e300, np.inf)  # in use now
                cached[int(np.argmin(candidates))] = False
                held -= 1
            cached[expert] = True
            held += 1
    return misses


def best_possible(trace: Trace, slots: int) -> int:
    flat = trace.ravel()
    following = np.full(flat.size, flat.size)
    last: dict[int, int] = {}
    for i in range(flat.size - 1, -1, -1):
        following[i] = last.get(int(flat[i]), flat.size)
        last[int(flat[i])] = i
    next_use = np.full(int(trace.max()) + 1, -1)  # of what is cached; -1: not cached
    misses = held = 0
    for i, expert in enumerate(flat.tolist()):
        if next_use[expert] < 0:
            misses += 1
            if held == slots:
                next_use[int(np.argmax(next_use))] = -1
            else:
                held += 1
        next_use[expert] = following[i]
    return misses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--experts-per-token", type=int, default=4)
    arguments = parser.parse_args()
    with Model(arguments.model, experts_per_token=arguments.experts_per_token) as model:
        ids = list(model.tokenizer.encode(arguments.text.read_text()).ids)[: arguments.tokens]
        length = min(model.context, 1024)
        parts = [model.routing(ids[i : i + length]) for i in range(0, len(ids), length)]
        experts, layers = model.config.num_experts, len(model.config.layer_types)
    routing = np.concatenate(parts).astype(np.int64)
    routing += (np.arange(layers) * experts)[:, None]
    trace = routing.reshape(len(routing), -1)
    print(f"{len(trace)} tokens, {layers} layers of {experts} experts, {routing.shape[2]} a token")
    print("share of the experts needed that must be read, by share of the experts that fits:")
    policies = {"least recently used": lru}
    for half_life in (16, 64, 256):
        policies[f"decayed counts, half-life {half_life}"] = lambda t, s, h=half_life: by_score(
            t, s, h
        )
    policies["least frequently used"] = lambda t, s: by_score(t, s, 1e9)
    policies["best possible"] = best_possible
    rooms = (0.1, 0.25, 0.35, 0.5)
    print(f"  {'':32}" + "".join(f"{room:>8.0%}" for room in rooms))
    for name, policy in policies.items():
        shares = [policy(trace, int(room * layers * experts)) / trace.size for room in rooms]
        print(f"  {name:32}" + "".join(f"{share:8.1%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
