"""What fewer experts per token and fewer bits cost, and which experts a text uses.

    pip install . matplotlib
    python benchmarks/quality.py MODEL WORK

measures on the held-out text and prompts in tests/data, through the engine, and writes
docs/quality.json, docs/quality.svg, docs/routing.svg and the tables of docs/quality.md. MODEL is
what the recipe of the demo model exports: MODEL/bf16 and MODEL/mlx-4bit
(tools/train_demo/MODEL_CARD.md). WORK keeps what is done: stopped, the same command goes on.
Activations are float32 throughout, so that only weights and routing differ.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from tables import fill, table

import flashmoe
from flashmoe.machine import probe
from flashmoe.measure import evaluate
from flashmoe.pack.pack import pack

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests/data"
EXPERTS = (10, 8, 6, 5, 4, 3, 2, 1)
BITS = {
    "16": "16 bits",
    "8": "8 bits",
    "4": "4 bits",
    "2": "2 bits",
    "2of4": "2 bits, made from 4",
}
NBYTES = 100_000  # of the text
PROMPTS = 40  # with a schema, and as many that want a tool call
ANSWER = 256  # tokens; the longest right answer has fewer


def checkpoints(model: Path, work: Path) -> dict[str, Path]:
    """The model at each width. 4 bits is as mlx-lm quantized it, which is what the package ships."""
    bf16, mlx = model / "bf16", model / "mlx-4bit"
    packs = {"8": (bf16, 8), "2": (bf16, 2), "2of4": (mlx, 2)}
    for name, (source, bits) in packs.items():
        if not (work / name / "config.json").exists():
            pack(source, work / name, bits=bits)
    return {name: work / name for name in packs} | {"16": bf16, "4": mlx}


class Remembered:
    """What the reference predicts after each window of the text, computed once."""

    def __init__(self, path: Path) -> None:
        self.windows = np.load(path, mmap_mode="r")
        self.at = 0

    def logits(self, ids: Any, /) -> Any:
        part = self.windows[self.at : self.at + len(ids)]
        self.at += len(ids)
        return np.array(part)


def remember(model: flashmoe.Model, text: str, path: Path) -> None:
    ids = model.tokenizer.encode(text).ids
    starts = range(0, len(ids) - 1, evaluate.WINDOW)
    parts = [model.logits(ids[i : min(i + evaluate.WINDOW, len(ids) - 1)]) for i in starts]
    np.save(path, np.concatenate(parts))


def measure(job: tuple[Path, Path, str, int]) -> None:
    """One setting: bits per byte, KL and agreement on the text, and the prompts."""
    work, checkpoint, bits, experts = job
    out = work / f"result-{bits}-{experts}.json"
    text = evaluate.read_text(DATA / "heldout.txt", NBYTES)
    asked = evaluate.first_of_each(evaluate.read_prompts(DATA / "prompts.jsonl"), PROMPTS)
    options: dict[str, Any] = {"precision": "float32", "threads": 1, "cache": "1GB"}
    with flashmoe.Model(checkpoint, experts_per_token=experts, **options) as model:
        reference = Remembered(work / "reference.npy")
        score = evaluate.score_text(model, text, reference=reference)
        shares = evaluate.answer_prompts(model, asked, max_tokens=ANSWER)
    result = {**score.to_dict(), **{name: vars(share) for name, share in shares.items()}}
    out.write_text(json.dumps({"bits": bits, "experts": experts, **result}))
    print(out.stem, f"{result['bits_per_byte']['value']:.4f}", flush=True)


def routing(checkpoint: Path) -> dict[str, Any]:
    """Which experts the text uses: per layer, from token to token, and in caches of any size."""
    text = evaluate.read_text(DATA / "heldout.txt", NBYTES)
    result: dict[str, Any] = {}
    for experts in (4, 10):
        with flashmoe.Model(checkpoint, experts_per_token=experts, precision="float32") as model:
            ids = model.tokenizer.encode(text).ids
            parts = [ids[i : i + evaluate.WINDOW] for i in range(0, len(ids), evaluate.WINDOW)]
            routed = np.concatenate([model.routing(part) for part in parts])
            count = model.config.num_experts
        result[str(experts)] = summarise(routed, count)
    return result


def summarise(routed: np.ndarray, count: int) -> dict[str, Any]:
    """From int [tokens, layers, k], each token's experts, of `count` in a layer."""
    tokens, layers, k = routed.shape
    used = np.zeros((tokens, layers, count), np.float32)
    np.put_along_axis(used, routed, 1, axis=2)
    share = used.mean(0) / k  # [layers, count], of a layer's choices
    effective = np.exp(-(share * np.log(np.maximum(share, 1e-12))).sum(1))
    overlap = (used[1:] * used[:-1]).sum(2).mean(0) / k
    chance = (used.mean(0) ** 2).sum(1) / k  # were tokens independent, with the same usage
    return {
        "share": np.round(share, 5).tolist(),
        "effective": effective.tolist(),
        "busiest": (share.max(1) * count).tolist(),
        "overlap": overlap.tolist(),
        "chance": chance.tolist(),
        "cache": caches(routed[:8192], count),
    }


def caches(routed: np.ndarray, count: int) -> dict[str, list[float]]:
    """Hit rates against the share of all experts that a cache holds, read token by token.

    "lru" drops what was used longest ago, "fixed" keeps the experts that this text uses most,
    "random" is lru with experts drawn at random: the share itself.
    """
    tokens, layers, _ = routed.shape
    ids = (routed + count * np.arange(layers)[:, None]).reshape(tokens, -1)
    total = layers * count
    frequency = np.sort(np.bincount(ids.ravel(), minlength=total))[::-1].cumsum() / ids.size
    shares = [i / 16 for i in range(2, 17)]
    lru = []
    for share in shares:
        capacity, hits = round(share * total), 0
        held: OrderedDict[int, None] = OrderedDict()
        for expert in ids.ravel().tolist():
            if expert in held:
                hits += 1
                held.move_to_end(expert)
            else:
                held[expert] = None
                if len(held) > capacity:
                    held.popitem(last=False)
        lru.append(hits / ids.size)
    fixed = [float(frequency[round(share * total) - 1]) for share in shares]
    return {"size": shares, "lru": lru, "fixed": fixed}


def shown(estimate: dict[str, float], form: str) -> str:
    half = (estimate["high"] - estimate["low"]) / 2
    return f"{estimate['value']:{form}} ± {half:{form}}"


def settings_table(results: dict[tuple[str, int], dict[str, Any]]) -> str:
    head = ["weights", "experts", "bits per byte", "KL, nats a token", "same likeliest token"]
    head += ["JSON valid", "follows schema", "has the values", "right tool call"]
    rows = []
    for bits, label in BITS.items():
        for experts in EXPERTS:
            r = results[bits, experts]
            cells = [label, str(experts), shown(r["bits_per_byte"], ".3f"), shown(r["kl"], ".4f")]
            cells.append(shown(r["agreement"], ".1%"))
            for name in ("json_valid", "json_schema", "json_value", "call_right"):
                e = r[name]
                cells.append(f"{e['value']:.0%} ({e['low']:.0%} to {e['high']:.0%})")
            rows.append(cells)
    return table(head, rows)


def routing_table(found: dict[str, Any]) -> str:
    head = ["layer", "effective experts, top 4", "busiest, top 4"]
    head += ["kept from the token before, top 4", "by chance"]
    head += ["effective, top 10", "kept, top 10", "by chance"]
    rows = []
    four, ten = found["4"], found["10"]
    for layer in range(len(four["effective"])):
        cells = [str(layer), f"{four['effective'][layer]:.1f}", f"{four['busiest'][layer]:.1f}"]
        cells += [f"{four['overlap'][layer]:.0%}", f"{four['chance'][layer]:.0%}"]
        cells += [f"{ten['effective'][layer]:.1f}", f"{ten['overlap'][layer]:.0%}"]
        rows.append([*cells, f"{ten['chance'][layer]:.0%}"])
    return table(head, rows)


def draw(results: dict[tuple[str, int], dict[str, Any]], found: dict[str, Any]) -> None:
    import matplotlib  # noqa: PLC0415

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9})
    from matplotlib import pyplot as plt  # noqa: PLC0415

    panels = {
        "bits_per_byte": "bits per byte",
        "kl": "KL from 16 bits, 10 experts (nats a token)",
        "json_schema": "JSON that follows its schema",
        "call_right": "right tool calls",
    }
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.4), layout="constrained")
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
        for i, (bits, label) in enumerate(BITS.items()):
            rows = [results[bits, k][name] for k in EXPERTS]
            middle = np.array([r["value"] for r in rows])
            low, high = (np.array([r[end] for r in rows]) for end in ("low", "high"))
            bars = np.maximum([middle - low, high - middle], 0)
            at = np.array(EXPERTS) + 0.05 * (i - 3)
            axis.errorbar(at, middle, bars, marker=".", lw=1, elinewidth=0.6, label=label)
        axis.set(title=title, xlabel="experts per token")
    axes[0, 1].set_yscale("log")
    axes[0, 0].legend(frameon=False)
    figure.savefig(ROOT / "docs/quality.svg", metadata={"Date": None})

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    share = -np.sort(-np.array(found["4"]["share"]), axis=1)
    for layer, row in enumerate(share):
        left.plot(np.arange(1, len(row) + 1), len(row) * row, lw=1, label=f"layer {layer}")
    left.set(title="use of each expert, top 4 (1 = alike)", xlabel="expert, busiest first")
    left.legend(frameon=False, fontsize=7)
    for k in ("4", "10"):
        cache = found[k]["cache"]
        for kind, style in (("lru", "-"), ("fixed", "--")):
            right.plot(cache["size"], cache[kind], style, lw=1, label=f"{kind}, top {k}")
    right.plot([0, 1], [0, 1], ":", lw=1, label="experts at random")
    right.set(title="hit rate", xlabel="share of all experts that the cache holds")
    right.legend(frameon=False)
    figure.savefig(ROOT / "docs/routing.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    reference = args.model / "bf16"
    with flashmoe.Model(reference, experts_per_token=None, precision="float32") as model:
        work = args.work / model.fingerprint  # what is done is another model's or this one's
        work.mkdir(parents=True, exist_ok=True)
        if not (work / "reference.npy").exists():
            text = evaluate.read_text(DATA / "heldout.txt", NBYTES)
            remember(model, text, work / "reference.npy")
    models = checkpoints(args.model, work)
    jobs = [(work, models[bits], bits, experts) for experts in EXPERTS for bits in BITS]
    todo = [job for job in jobs if not (work / f"result-{job[2]}-{job[3]}.json").exists()]
    with multiprocessing.Pool(probe.physical_cores()) as pool:
        pool.map(measure, todo, chunksize=1)
    rows = [json.loads((work / f"result-{j[2]}-{j[3]}.json").read_text()) for j in jobs]
    results = {(row["bits"], row["experts"]): row for row in rows}
    found = routing(models["4"])
    (ROOT / "docs/quality.json").write_text(
        json.dumps({"settings": rows, "routing": found}, indent=1) + "\n"
    )
    draw(results, found)
    tables = {"settings": settings_table(results), "routing": routing_table(found)}
    fill(ROOT / "docs/quality.md", tables)


if __name__ == "__main__":
    main()
