"""Time of a token against the length of the context, and memory over many tokens.

    python benchmarks/make_checkpoint.py /tmp/m1 --preset m1 --layers 8
    python benchmarks/context.py /tmp/m1

A prompt of random ids is taken in up to each length, then a few tokens one at a time, whose time
is shown by kind of layer. GatedDeltaNet layers should stay flat; attention layers should grow by
what reading their keys and values takes, which is shown beside them at the memory's own rate. The
last column is the process's largest resident size so far, less the keys and values.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from against_peers import FlashMoe

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.machine.probe import memory_rate, peak_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--longest", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=32, help="decoded at each length")
    parser.add_argument("--cache", type=float, default=16.0, help="GB of slots for experts")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()

    config = Checkpoint.open(arguments.checkpoint).config
    options = {
        "experts_per_token": config.num_experts_per_tok,
        "cache_bytes": int(arguments.cache * 1e9),
        "chunk": 512,
    }
    engine = FlashMoe(arguments.checkpoint, arguments.threads, arguments.longest, options).native
    kinds = config.layer_types
    full = kinds.count("full_attention")
    key_bytes = full * 2 * config.num_key_value_heads * config.head_dim * 2  # bfloat16, a position
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, config.vocab_size, count).astype(np.int32)

    engine.forward(engine.new_state(), ids(2048))  # so that every expert is in its slot
    state = engine.new_state()
    rate = memory_rate(arguments.threads)
    print(f"memory {rate / 1e9:.1f} GB/s; {full} of {len(kinds)} layers are attention")
    print(
        f"{'context':>8} {'prompt tok/s':>12} {'token ms':>9} {'attention':>10} {'reading it':>10} "
        f"{'GatedDeltaNet':>13} {'else':>8} {'peak GB':>8}"
    )
    rows = []
    length = 1
    while length <= arguments.longest:
        todo, start = length - state.position, time.perf_counter()
        if todo > 0:
            engine.forward(state, ids(todo))
        prompt = todo / (time.perf_counter() - start) if todo > 0 else None
        before, start = engine.layer_times(), time.perf_counter()
        for _ in range(arguments.tokens):
            engine.forward(state, ids(1))
        token = (time.perf_counter() - start) / arguments.tokens
        spent = {"full_attention": 0.0, "linear_attention": 0.0}
        for kind, then, now in zip(kinds, before, engine.layer_times(), strict=True):
            spent[kind] += (now["mixer"] - then["mixer"]) / arguments.tokens
        cache = state.position * key_bytes
        attention, delta = spent["full_attention"], spent["linear_attention"]
        row = {
            "context": length,
            "prompt_rate": prompt,
            "token": token,
            "attention": attention,
            "reading": cache / rate,
            "delta": delta,
            "else": token - attention - delta,
            "peak": peak_memory() - cache,
        }
        rows.append(row)
        print(
            f"{length:8} {prompt or 0:12.1f} {token * 1e3:9.2f} {attention * 1e3:10.2f} "
            f"{row['reading'] * 1e3:10.2f} {delta * 1e3:13.2f} {row['else'] * 1e3:8.2f} "
            f"{row['peak'] / 1e9:8.2f}",
            flush=True,
        )
        length = 2 * length if length >= 1024 else 32 * length
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
