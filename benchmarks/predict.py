"""Makes the tables of docs/metal.md that the time model computes: nothing in them was measured.

    python benchmarks/predict.py

First the original engine, computed beside what its author published; then this one on Macs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from tables import fill, table

from flashmoe.machine.chips import find_chip
from flashmoe.measure.family import FAMILY, Published
from flashmoe.measure.fit import Fit, Target, fit_published
from flashmoe.measure.time_model import (
    GPU_COMMAND_BUFFER,
    GPU_DISPATCH,
    GPU_WAIT,
    METAL_LAUNCHES,
    PAGE_CACHE_RATE,
    TokenBytes,
    bytes_by_layer,
    text_hits,
)

PAGE = Path(__file__).parents[1] / "docs" / "metal.md"
FOUR_BITS, TWO_BITS = FAMILY[0], FAMILY[1]
EXPERTS_IN_2_BITS = dataclasses.replace(FOUR_BITS, expert_bits=2)
MACS = ("M3 Max 48GB", "M4 Pro 48GB")


@dataclass(frozen=True)
class Original:
    """A build of the original engine on an M3 Max with 48 GB, by what its README says of it: two
    command buffers a layer that the host waits for, experts left to a page cache of 35 GB.

    `product` is bytes a second of its matrix kernels. Of the first builds nothing is published;
    llama.cpp's first kernel for the same work took 95 GB/s of an M1 Max's 400 (its pull request
    1642). The README gives its later kernel 12 % less time.
    """

    product: float = 95e9
    experts_per_token: int = 4
    page_cache: float = 35e9

    def milliseconds(self, model: Published) -> tuple[float, float, float]:
        """A layer's attention with the experts of the layer before, projections with routing, and
        reading; the mean over layers."""
        work = bytes_by_layer(model.config, model.format_of)
        inputs = _mean(work, "inputs") + sum(x.state for x in work.layers) / len(work.layers)
        expert, k = _mean(work, "expert"), self.experts_per_token
        # A command buffer of its own for the experts; about 28 dispatches with those of the mixer.
        attention = GPU_WAIT + 2 * GPU_COMMAND_BUFFER + 28 * GPU_DISPATCH
        attention += (inputs + k * expert) / self.product
        routing = GPU_WAIT + GPU_COMMAND_BUFFER + 8 * GPU_DISPATCH
        rest = _mean(work, "output") + _mean(work, "router") + _mean(work, "shared")
        routing += rest / self.product
        hits = text_hits(self.page_cache / model.experts)
        disk = find_chip("M3 Max 48GB").disk
        reading = k * expert * ((1 - hits) / disk + hits / PAGE_CACHE_RATE)
        return 1e3 * attention, 1e3 * routing, 1e3 * reading

    def tokens_per_second(self, model: Published) -> float:
        work = bytes_by_layer(model.config, model.format_of)
        layers = len(work.layers) * sum(self.milliseconds(model)) / 1e3
        return 1 / (layers + work.head.total() / self.product)


FIRST, FASTER = Original(), Original(product=95e9 / 0.88)


def published() -> list[tuple[str, float, float]]:
    """(what, published, computed) of the original: milliseconds a layer, then tokens a second."""
    attention, routing, reading = FIRST.milliseconds(FOUR_BITS)
    return [
        ("attention, ms a layer", 1.22, attention),
        ("projections and routing, ms a layer", 0.55, routing),
        ("reading 4 experts, ms a layer", 2.41, reading),
        ("4 bits, tok/s", 3.90, FIRST.tokens_per_second(FOUR_BITS)),
        ("4 bits, faster kernel, tok/s", 4.36, FASTER.tokens_per_second(FOUR_BITS)),
        ("experts in 2 bits, tok/s", 5.74, FIRST.tokens_per_second(EXPERTS_IN_2_BITS)),
    ]


def _mean(work: TokenBytes, part: str) -> float:
    return sum(getattr(layer, part).total() for layer in work.layers) / len(work.layers)


def _original() -> str:
    rows = [
        [what, f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs - 1:+.0%}"]
        for what, theirs, ours in published()
    ]
    return table(["the original engine, M3 Max, 48 GB", "published", "computed", ""], rows)


def _macs() -> str:
    rows = []
    for machine in MACS:
        for model, bits in ((FOUR_BITS, 4), (TWO_BITS, 2)):
            for k in (4, 10):
                fit = fit_published(Target(machine=machine), model, k)
                rows.append(_row(machine, bits, k, model, fit))
    head = ["", "hits", "mixer", "router", "experts", "wait", "reading", "a layer", "a token"]
    return table([*head, "**tok/s**", "limit", "if all experts are equally likely"], rows)


def _row(machine: str, bits: int, k: int, model: Published, fit: Fit) -> list[str]:
    p, layers = fit.on_text, len(model.config.layer_types)
    parts = [p.mixer, p.router, p.experts, p.wait, p.reading]
    shown = [f"{1e3 * part / layers:.2f}" for part in (*parts, sum(parts))]
    return [
        f"{machine.replace('GB', ' GB')}, {bits} bits, K = {k}",
        f"{text_hits(fit.cached_share):.0%}",
        *shown,
        f"{1e3 * p.seconds:.0f}",
        f"**{p.tokens_per_second:.1f}**",
        f"{p.limit:.1f}",
        f"{fit.prediction.tokens_per_second:.1f}",
    ]


def _arithmetic() -> str:
    """The first row of the table, worked out."""
    fit = fit_published(Target(machine=MACS[0]), FOUR_BITS, 4)
    work = bytes_by_layer(FOUR_BITS.config, FOUR_BITS.format_of)
    mb = {
        part: _mean(work, part) / 1e6 for part in ("inputs", "output", "router", "shared", "expert")
    }
    state = sum(layer.state for layer in work.layers) / len(work.layers) / 1e6
    product, memory = 0.6 * fit.memory_rate / 1e9, fit.memory_rate / 1e9
    before = 0.75 * METAL_LAUNCHES.delta[0] + 0.25 * METAL_LAUNCHES.attention[0]
    hits, disk = text_hits(fit.cached_share), fit.disk_rate / 1e9
    us, launches = 1e6 * GPU_DISPATCH, METAL_LAUNCHES
    return "\n".join(
        (
            f"    mixer    ({mb['inputs']:.1f} + {mb['output']:.1f} MB) / {product:.0f} GB/s"
            f" + {state:.1f} MB / {memory:.0f} GB/s + {before + 1:.2f} dispatches x {us:.1f} us",
            f"    router   {mb['router']:.1f} MB / {product:.0f} GB/s"
            f" + {launches.router} x {us:.1f} us",
            f"    experts  ({mb['shared']:.1f} + 4 x {mb['expert']:.1f} MB) / {product:.0f} GB/s"
            f" + {launches.experts} x {us:.1f} us",
            f"    wait     {1e6 * GPU_WAIT:.0f} us to the host and back,"
            f" {1e6 * GPU_COMMAND_BUFFER:.0f} us a command buffer",
            f"    reading  4 x {mb['expert']:.1f} MB x ({1 - hits:.2f} / {disk:.1f} GB/s"
            f" + {hits:.2f} / {PAGE_CACHE_RATE / 1e9:.0f} GB/s)",
            f"    head     {work.head.total() / 1e6:.0f} MB / {product:.0f} GB/s, once a token",
        )
    )


def main() -> None:
    fill(PAGE, {"original": _original(), "macs": _macs(), "arithmetic": _arithmetic()})


if __name__ == "__main__":
    main()
