"""How fast a model runs here: medians over several runs, from counts that the engine keeps."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.errors import ArgumentError
from flashmoe.machine import probe
from flashmoe.measure.info import summarise

if TYPE_CHECKING:
    from flashmoe.generate.model import Model
    from flashmoe.generate.stats import Stats

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

PARTS = ("mixer", "router", "wait", "experts", "combine")
"""Of a layer's time, as `Model.layer_times` has them."""


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
    Raises:
        ArgumentError: the context does not hold so many tokens.
    Returns:
        "median" of every number in MEASURED (None where unknown), "runs" (`Stats.to_dict` of each),
        "decode": where the time of a token goes and how near the machine's limits that is (see
        `_decode_breakdown`), and what was asked for.
    """
    if prompt_tokens + tokens > model.context:
        raise ArgumentError(
            f"a prompt of {prompt_tokens} tokens and {tokens} more; the context holds "
            f"{model.context}"
        )
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, prompt_tokens).tolist()
    results: list[dict[str, Any]] = []
    decodes: list[dict[str, Any]] = []
    memory_rates, disk_rates = [], []
    checkpoint = model.checkpoint
    largest = max(layer.expert_bytes for layer in checkpoint.experts)
    for count in range(1, runs + 1):
        memory_rates.append(probe.memory_rate(model.threads))
        disk_rates.append(probe.disk_rate(checkpoint.files, largest, seconds=1))
        prompted: tuple[Stats, list[dict[str, float]]] | None = None
        for _token in model.generate(
            ids,
            max_tokens=tokens,
            ignore_eos=True,
            temperature=0,
            repetition_penalty=1,
            presence_penalty=0,
        ):
            prompted = prompted or (model.stats, model.layer_times())
        results.append(model.stats.to_dict())
        assert prompted is not None
        decodes.append(_decode_breakdown(*prompted, model.stats, model.layer_times(), tokens - 1))
        done(count, results[-1])

    def median(name: str) -> float | None:
        values = [run[name] for run in results if run[name] is not None]
        return statistics.median(values) if values else None

    order = sorted(range(runs), key=lambda i: decodes[i]["seconds"])
    middle = order[runs // 2]
    decode = decodes[middle] | {
        "layer_types": list(model.config.layer_types),
        "bytes_touched": bytes_touched(checkpoint, model.experts_per_token),
        "memory_rate": memory_rates[middle],
        "disk_rate": disk_rates[middle],
    }
    return {
        "source": model.source,
        "prompt_tokens": prompt_tokens,
        "tokens": tokens,
        "median": {name: median(name) for name in MEASURED},
        "decode": decode,
        "runs": results,
    }


def _decode_breakdown(
    before: Stats,
    layers_before: list[dict[str, float]],
    after: Stats,
    layers_after: list[dict[str, float]],
    tokens: int,
) -> dict[str, Any]:
    """Per token of one run's decode: seconds, head_seconds, bytes_read, for each layer the seconds
    of its PARTS; and what share of the threads' time they computed, in its prompt and in decode."""
    return {
        "prompt_busy": before.busy_seconds / before.threads / before.forward_seconds,
        "busy": (after.busy_seconds - before.busy_seconds)
        / after.threads
        / (after.forward_seconds - before.forward_seconds),
        "seconds": (after.forward_seconds - before.forward_seconds) / tokens,
        "head_seconds": (after.head_seconds - before.head_seconds) / tokens,
        "bytes_read": (after.bytes_read - before.bytes_read) / tokens,
        "layers": [
            {part: (now[part] - then[part]) / tokens for part in PARTS}
            for then, now in zip(layers_before, layers_after, strict=True)
        ],
    }


def bytes_touched(checkpoint: Checkpoint, experts_per_token: int) -> int:
    """Bytes that a token cannot do without: weights, but for the other rows of the embedding, and
    the recurrent states, which are read and written. Not the keys and values of its context."""
    summary = summarise(checkpoint, experts_per_token)
    embedding = checkpoint.matrices["embed_tokens"].format.nbytes
    resident = summary.resident - (0 if checkpoint.config.tie_word_embeddings else embedding)
    return resident + summary.read_per_token + 2 * summary.state_fixed
