"""What a token costs, against threads, experts per token and the length of a chunk, all in memory.

    python benchmarks/make_checkpoint.py /tmp/m1 --preset m1
    python benchmarks/costs.py /tmp/m1

One engine after the other, each with all experts in its slots; medians over several runs. Memory
is measured between an engine's runs, for where it is shared with others its rate drifts. A chunk
matters to prompts only.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from against_peers import FlashMoe

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.machine.probe import memory_rate, physical_cores


def measure(engine: Any, ids: np.ndarray, tokens: int) -> dict[str, float]:
    """Tokens a second of a prompt of all ids, and of the first few once more one at a time."""
    state, start = engine.new_state(), time.perf_counter()
    engine.forward(state, ids)
    prefill = len(ids) / (time.perf_counter() - start)
    state, start = engine.new_state(), time.perf_counter()
    for i in range(tokens):
        engine.forward(state, ids[i : i + 1])
    decode = tokens / (time.perf_counter() - start)
    return {"prefill": prefill, "decode": decode, "memory": memory_rate(physical_cores())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cache", type=float, default=16.0, help="GB of slots for experts")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()

    config = Checkpoint.open(arguments.checkpoint).config
    own, cores = config.num_experts_per_tok, physical_cores()
    usual = {"threads": cores, "experts": own, "chunk": 512}
    ids = np.random.default_rng(0).integers(0, config.vocab_size, arguments.prompt)
    ids = ids.astype(np.int32)
    rows: list[dict[str, Any]] = []
    for name, values in (
        ("threads", sorted({1, *range(2, cores + 1, 2), cores})),
        ("experts", [k for k in (1, 2, 4, 6, 8, 10) if k <= own]),
        ("chunk", [32, 64, 128, 256, 512, 1024]),
    ):
        rows += [{"varied": name, **usual, name: value} for value in values]
    for row in rows:
        options = {"experts_per_token": row["experts"], "chunk": row["chunk"]}
        options["cache_bytes"] = int(arguments.cache * 1e9)
        engine = FlashMoe(arguments.checkpoint, row["threads"], len(ids), options).native
        engine.forward(engine.new_state(), ids)  # so that every expert is in its slot
        row["runs"] = [measure(engine, ids, arguments.tokens) for _ in range(arguments.runs)]
        engine.close()
        del engine
        gc.collect()
    print(f"{'':16} {'prompt tok/s':>12} {'decode tok/s':>12} {'memory GB/s':>12}")
    for row in rows:
        speeds = [statistics.median(run[what] for run in row["runs"]) for what in row["runs"][0]]
        label = f"{row[row['varied']]} {row['varied']}"
        print(f"{label:16} {speeds[0]:12.1f} {speeds[1]:12.1f} {speeds[2] / 1e9:12.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
