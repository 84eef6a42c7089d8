"""Makes the tables and the picture of docs/performance.md from what the benchmarks wrote with
--json into docs/performance/.

    python benchmarks/performance.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from tables import fill, table

DOCS = Path(__file__).resolve().parents[1] / "docs"
Spread = tuple[float, float, float]  # median, and down and up from it to the least and most


def load(name: str) -> Any:
    return json.loads((DOCS / "performance" / f"{name}.json").read_text())


def spread(runs: list[dict[str, Any]], what: str) -> Spread:
    values = [run[what] for run in runs]
    middle = statistics.median(values)
    return middle, middle - min(values), max(values) - middle


def shown(values: list[float], form: str = ".3g") -> str:
    """Median (least .. most)."""
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:{form}} ({least:{form}} .. {most:{form}})"


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Of runs that took turns."""
    return shown([a / b for a, b in zip(ours, theirs, strict=True)], ".2f")


def peer(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """llama.cpp at its best."""
    return runs[list(runs)[1]]


def memory_table() -> str:
    rows = []
    for name, what, label in (
        ("memory-decode", "decode", "decode, M1 (7.7 GB)"),
        ("memory-decode-11", "decode", "decode, its first 11 layers (5.3 GB)"),
        ("memory-decode-8", "decode", "decode, its first 8 layers (3.9 GB)"),
        ("memory-512", "prefill", "prompt of 512, M1"),
        ("memory-2048", "prefill", "prompt of 2048, M1"),
    ):
        result = load(name)
        ours = [run[what] for run in result["runs"]["flashmoe"]]
        theirs = [run[what] for run in peer(result["runs"])]
        share = ""
        if what == "decode":
            touched = result["touched"]
            pairs = zip(ours, result["memory"], strict=True)
            share = shown([rate * touched / memory for rate, memory in pairs], ".0%")
        speeds = [shown(ours), shown(theirs), ratio(ours, theirs), share]
        rows.append([f"{label}, {len(ours)} runs", *speeds])
    return table(["tok/s", "Flash-MoE", "llama.cpp", "ratio", "of the memory's rate"], rows)


def rooms_table() -> str:
    rows = []
    for name in ("room-25", "room-35", "room-50", "prompt-35"):
        result = load(name)
        runs, others = result["runs"]["flashmoe"], peer(result["runs"])
        decoding = name != "prompt-35"
        what = "decode" if decoding else "prefill"
        ours, theirs = [run[what] for run in runs], [run[what] for run in others]
        label = f"{result['room']:.0%}"
        read = ["", "", ""]
        if decoding:
            tokens = [run["seconds"] * run["decode"] for run in runs]
            rates = [
                n * run["bytes"] / run["seconds"] / 1e9 for n, run in zip(tokens, runs, strict=True)
            ]
            bytes_read = statistics.median(run["bytes"] for run in runs)
            read = [f"{bytes_read / 1e6:.1f} MB", f"{result['lru_bytes'] / 1e6:.1f} MB"]
            read.append(shown(rates, ".2f"))
        else:
            label += f", prompt of {result['prompt']}"
        disk = shown([rate / 1e9 for rate in result["disk"]], ".2f")
        rows.append([label, shown(ours), shown(theirs), ratio(ours, theirs), *read, disk])
    head = ["room for", "Flash-MoE, tok/s", "llama.cpp", "ratio", "read a token", "by LRU"]
    return table([*head, "read, GB/s", "random reads of an expert, GB/s"], rows)


def layer_parts(bits: int, k: int, cache: str) -> dict[str, float]:
    """Milliseconds of a layer of the 397B, by part."""
    layers = load(f"397b-{bits}-{k}-{cache}")["decode"]["layers"]
    return {part: 1e3 * sum(x[part] for x in layers) / len(layers) for part in layers[0]}


def layers_table() -> str:
    rows = []
    for bits in (4, 2):
        for k in (4, 10):
            for cache in ("cold", "cached"):
                mean = layer_parts(bits, k, cache)
                whole = sum(mean.values())
                cells = [f"{mean[p]:.2f}" for p in ("mixer", "router", "wait", "experts")]
                label = f"{bits} bits, K = {k}, {cache}"
                rows.append([label, *cells, f"{whole:.1f}", f"{60 * whole / 1e3:.2g} s"])
    head = ["", "mixer", "router", "waiting", "experts", "a layer"]
    return table([*head, "60 layers, without the head"], rows)


def context_table() -> str:
    rows = []
    for row in load("context"):
        prompt = f"{row['prompt_rate']:.0f}" if row["prompt_rate"] and row["context"] > 32 else ""
        names = ("token", "attention", "reading", "delta", "else")
        rows.append([str(row["context"]), prompt, *(f"{1e3 * row[n]:.1f}" for n in names)])
    head = ["context", "prompt, tok/s", "a token", "attention, 4 layers", "reading"]
    return table([*head, "GatedDeltaNet, 12 layers", "everything else"], rows)


def costs_table() -> str:
    rows = []
    for row in load("costs"):
        runs = row["runs"]
        speeds = [shown([run[what] for run in runs]) for what in ("prefill", "decode")]
        memory = statistics.median(run["memory"] for run in runs) / 1e9
        names = {"threads": "threads", "experts": "experts a token", "chunk": "tokens a chunk"}
        rows.append([f"{row[row['varied']]} {names[row['varied']]}", *speeds, f"{memory:.0f}"])
    return table(["", "prompt of 1024, tok/s", "decode, tok/s", "memory, GB/s"], rows)


def processors_table() -> str:
    result = load("processors")
    rows = []
    for cell in result["cells"]:
        ours, theirs = cell["runs"]["flashmoe"], cell["runs"]["llama.cpp"]
        cells = [cell["table"].split("-")[0].replace("avx", "AVX-").replace("AVX-2", "AVX2")]
        cells.append(f"{cell['threads']}, {len(ours)}")
        for what in ("decode", "prefill"):
            both = [[run[what] for run in runs] for runs in (ours, theirs)]
            cells += [*(f"{statistics.median(speeds):.3g}" for speeds in both), ratio(*both)]
            if what == "decode":
                pairs = zip(both[0], cell["memory"], strict=True)
                cells.append(shown([rate * result["touched"] / m for rate, m in pairs], ".0%"))
        rows.append([*cells, str(cell["prompt"])])
    head = ["", "threads, runs", "decode, tok/s", "llama.cpp", "ratio", "of the memory's rate"]
    return table([*head, "prompt, tok/s", "llama.cpp", "ratio", "its tokens"], rows)


def engines(runs: dict[str, list[dict[str, Any]]], what: str) -> dict[str, Spread]:
    """Of Flash-MoE and of llama.cpp at its best."""
    both = {"Flash-MoE": runs["flashmoe"], "llama.cpp": peer(runs)}
    return {label: spread(found, what) for label, found in both.items()}


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
                labels.append(f"{bits} bits, K = {k}, {cache}")
                parts.append(layer_parts(bits, k, cache))
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
    tables = {
        "memory": memory_table(),
        "processors": processors_table(),
        "rooms": rooms_table(),
        "layers": layers_table(),
        "context": context_table(),
        "costs": costs_table(),
    }
    fill(DOCS / "performance.md", tables)


if __name__ == "__main__":
    main()
