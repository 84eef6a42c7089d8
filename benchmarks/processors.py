"""Flash-MoE against llama.cpp by instruction set and number of threads, everything in memory.

    python benchmarks/make_checkpoint.py /dev/shm/m1 --preset m1
    python benchmarks/processors.py /dev/shm/m1 --json docs/performance/processors.json \\
        --pair avx2:DIR --pair avx512-bf16:DIR

A pair is a table of our kernels and the directory of llama.cpp's libraries built for the same
instructions (GGML_NATIVE=OFF and GGML_AVX2, GGML_AVX512, ...). With each number of threads the two
engines take turns; a pair ends when it has its runs or its time is over. Fewer threads get shorter
prompts, 128 tokens a thread up to 512.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from against_peers import Worker, exported, summary

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.machine.probe import memory_rate
from flashmoe.measure.bench import bytes_touched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--pair", action="append", required=True, help="TABLE:DIRECTORY")
    parser.add_argument("--threads", type=int, nargs="+", default=[16, 8, 4, 2, 1])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60, help="after which no run begins")
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    config = json.loads((arguments.checkpoint / "config.json").read_text())
    config = config.get("text_config", config)
    experts = config["num_experts_per_tok"]
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], 512 + arguments.tokens)
    rest = ids[512:].tolist()
    touched = bytes_touched(Checkpoint.open(arguments.checkpoint), experts)
    result: dict[str, Any] = {"tokens": arguments.tokens, "touched": touched, "cells": []}
    common = ["--threads", "1", "--prompt", "512", "--tokens", str(arguments.tokens)]
    options = {"experts_per_token": experts, "cache_bytes": int(16e9)}
    for pair in arguments.pair:
        table, directory = pair.split(":", 1)
        ours = Worker(
            "flashmoe", arguments.checkpoint, common, dict(options), {"FLASHMOE_ISA": table}
        )
        libraries = {"LLAMA_CPP_LIB_PATH": directory}
        theirs = Worker("llama.cpp", exported(arguments.checkpoint), common, {}, libraries)
        for threads in arguments.threads:
            prompt = ids[: min(512, 128 * threads)].tolist()
            for worker in (ours, theirs):  # every expert into memory
                worker.run(ids[:96].tolist(), [], threads)
            cell: dict[str, Any] = {"table": table, "threads": threads, "prompt": len(prompt)}
            cell |= {"memory": [], "runs": {"flashmoe": [], "llama.cpp": []}}
            end = time.monotonic() + arguments.seconds
            while not cell["memory"] or (
                len(cell["memory"]) < arguments.runs and time.monotonic() < end
            ):
                cell["memory"].append(memory_rate(threads))
                for name, worker in (("flashmoe", ours), ("llama.cpp", theirs)):
                    run = worker.run(prompt, rest)
                    del run["logits"]
                    cell["runs"][name].append(run)
            result["cells"].append(cell)
            arguments.json.write_text(json.dumps(result, indent=1))
            for what in ("prefill", "decode"):
                speeds = {n: [r[what] for r in runs] for n, runs in cell["runs"].items()}
                ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
                print(
                    f"{table} {threads} threads {what}: {summary(speeds['flashmoe'])} against "
                    f"{summary(speeds['llama.cpp'])}, ratio {summary(ratios)}",
                    flush=True,
                )
            rates = " ".join(f"{rate / 1e9:.1f}" for rate in cell["memory"])
            print(f"  {len(cell['memory'])} runs, memory {rates} GB/s", flush=True)
        for worker in (ours, theirs):
            worker.process.terminate()
            worker.process.wait()


if __name__ == "__main__":
    main()
