"""What `flashmoe info` predicts against what `flashmoe bench` then measures, in turns.

    python benchmarks/predictions.py PACKED [PACKED ...] [--runs 5] [--json FILE]

For every checkpoint: in memory with all cores and with one thread, with half of its experts per
token, and with room for 35 % of its experts. Every run predicts and then measures; the medians are
compared. Nothing in the time model is fitted to them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashmoe import Model
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.machine.probe import physical_cores
from flashmoe.measure.bench import run_bench
from flashmoe.measure.fit import Target
from flashmoe.measure.info import describe

ROOM = 0.35


def settings(source: str) -> Iterator[tuple[str, int, int, int]]:
    """(what, threads, experts per token, bytes for experts)."""
    checkpoint = Checkpoint.open(source)
    every = checkpoint.config.num_experts * sum(x.expert_bytes for x in checkpoint.experts)
    own, cores, memory = checkpoint.config.num_experts_per_tok, physical_cores(), int(1.2 * every)
    yield "in memory", cores, own, memory
    yield "in memory", 1, own, memory
    yield "in memory", cores, own // 2, memory
    yield f"room for {ROOM:.0%}", cores, own, int(ROOM * every)
    yield f"room for {ROOM:.0%}", cores, own // 2, int(ROOM * every)


def compare(source: str, setting: tuple[str, int, int, int], runs: int) -> dict[str, Any]:
    """Predicts and measures in turns."""
    what, threads, experts, cache = setting
    target = Target(threads=threads, cache=cache)
    said, measured = [], []
    with Model(source, experts_per_token=experts, threads=threads, cache=cache) as model:
        warm = min(1024, model.context - 64)  # fills the cache
        run_bench(model, prompt_tokens=warm, tokens=2, runs=1)
        for _ in range(runs):
            fit = describe(source, experts_per_token=experts, target=target).fit
            said.append(fit.prediction.tokens_per_second)
            result = run_bench(model, prompt_tokens=16, tokens=24, runs=1)
            measured.append(result["decode"]["seconds"] ** -1)
    return {
        "source": Path(source).name,
        "what": what,
        "threads": threads,
        "experts_per_token": experts,
        "said": said,
        "measured": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", nargs="+")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for source in arguments.packed:
        for setting in settings(source):
            result = compare(source, setting, arguments.runs)
            results.append(result)
            said, measured = (statistics.median(result[x]) for x in ("said", "measured"))
            print(
                f"{result['source']:16} {result['what']:14} {result['threads']:2} threads, "
                f"K = {result['experts_per_token']:2}: said {said:6.1f}, measured {measured:6.1f}: "
                f"{said / measured:.2f}",
                flush=True,
            )
            if arguments.json:
                arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
