"""How fast a model runs here: medians over several runs, from counts that the engine keeps."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe.sampling import Sampler, Sampling

if TYPE_CHECKING:
    from flashmoe.model import Model

MEASURED = (
    "prefill_rate",
    "decode_rate",
    "first_token_seconds",
    "bytes_read",
    "bytes_from_page_cache",
    "hit_rate",
    "read_seconds",
    "wait_seconds",
    "peak_memory",
)


def run_bench(
    model: Model,
    *,
    prompt_tokens: int = 256,
    tokens: int = 64,
    runs: int = 3,
    seed: int = 0,
    done: Callable[[int, dict[str, Any]], None] = lambda count, run: None,
) -> dict[str, Any]:
    """Prefill and decode, `runs` times, each from an empty state.

    The prompt is the same random ids in each run (of `seed`): their routing is at least as diverse
    as a text's. Nothing is dropped from the caches in between, so that the first run may be slower.

    Args:
        tokens: to generate, greedily; the end of a sequence does not end it.
        done: called after each run with its number, from 1, and its statistics.
    Returns:
        "median" of every number in MEASURED (None where unknown), "runs" (`Stats.to_dict` of each),
        and what was asked for.
    """
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, prompt_tokens).tolist()
    results = []
    for count in range(1, runs + 1):
        sampler = Sampler(Sampling(), None)
        for _token in model._steps(
            ids, model.new_state(), sampler, None, tokens, frozenset(), None
        ):
            pass
        results.append(model.stats.to_dict())
        done(count, results[-1])

    def median(name: str) -> float | None:
        values = [run[name] for run in results if run[name] is not None]
        return statistics.median(values) if values else None

    return {
        "source": model.source,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "median": {name: median(name) for name in MEASURED},
        "runs": results,
    }
