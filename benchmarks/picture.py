"""Draws docs/performance.svg from what the benchmarks wrote with --json into docs/performance/.

python benchmarks/picture.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
Spread = tuple[float, float, float]  # median, and down and up from it to the least and most


def load(name: str) -> Any:
    return json.loads((DOCS / "performance" / f"{name}.json").read_text())


def spread(runs: list[dict[str, Any]], what: str) -> Spread:
    values = [run[what] for run in runs]
    middle = statistics.median(values)
    return middle, middle - min(values), max(values) - middle


def engines(runs: dict[str, list[dict[str, Any]]], what: str) -> dict[str, Spread]:
    """Of Flash-MoE and of llama.cpp at its best."""
    names = {"Flash-MoE": "flashmoe", "llama.cpp": list(runs)[1]}
    return {label: spread(runs[name], what) for label, name in names.items()}


def bars(axis: Any, groups: dict[str, dict[str, Spread]]) -> None:
    for i, label in enumerate(("Flash-MoE", "llama.cpp")):
        at = [g + 0.38 * i for g in range(len(groups))]
        middle, down, up = zip(*(group[label] for group in groups.values()), strict=True)
        drawn = axis.bar(at, middle, 0.36, yerr=(down, up), label=label, error_kw={"lw": 0.8})
        axis.bar_label(drawn, [f"{value:.3g}" for value in middle], fontsize=7)
    axis.set_xticks([g + 0.19 for g in range(len(groups))], list(groups))
    axis.set_ylabel("tok/s")


def draw_layers(axis: Any) -> None:
    """Milliseconds of a layer of the 397B, by part."""
    labels, parts = [], []
    for bits in (2, 4):
        for k in (4, 10):
            for cache in ("cached", "cold"):
                decode = load(f"397b-{bits}-{k}-{cache}")["decode"]
                layers = decode["layers"]
                mean = {p: sum(layer[p] for layer in layers) / len(layers) for p in layers[0]}
                labels.append(f"{bits} bits, K = {k}, {cache}")
                parts.append({p: 1e3 * seconds for p, seconds in mean.items()})
    left = [0.0] * len(labels)
    names = {"mixer": "attention or GatedDeltaNet", "router": "router", "experts": "experts"}
    for part, label in {**names, "wait": "waiting for the disk"}.items():
        width = [row[part] for row in parts]
        axis.barh(labels, width, left=left, label=label)
        left = [a + b for a, b in zip(left, width, strict=True)]
    axis.set_xlabel("ms a layer")
    axis.legend(frameon=False, fontsize=7)


def main() -> None:
    import matplotlib  # noqa: PLC0415

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9})
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    memory = {
        "decode": engines(load("memory-decode")["runs"], "decode"),
        "prompt of 512": engines(load("memory-512")["runs"], "prefill"),
        "prompt of 2048": engines(load("memory-2048")["runs"], "prefill"),
    }
    bars(axes[0, 0], memory)
    axes[0, 0].set_title("M1 in memory, 2 threads")
    axes[0, 0].legend(frameon=False)
    rooms = {f"{room} %": engines(load(f"room-{room}")["runs"], "decode") for room in (25, 35, 50)}
    bars(axes[0, 1], rooms)
    axes[0, 1].set_title("decode with room for a part of the experts")
    rows = load("context")
    names = {"else": "experts, router, head", "delta": "GatedDeltaNet", "attention": "attention"}
    axes[1, 0].stackplot(
        [row["context"] for row in rows],
        [[1e3 * row[name] for row in rows] for name in names],
        labels=list(names.values()),
    )
    axes[1, 0].set(title="a token of M1", xlabel="tokens of context", ylabel="ms")
    axes[1, 0].legend(frameon=False, loc="upper left")
    draw_layers(axes[1, 1])
    axes[1, 1].set_title("layers of the 397B")
    figure.savefig(DOCS / "performance.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
