"""A backend's kernels at the shapes of published models: right by numpy, and how fast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe.checkpoint.architecture import HEAD, Kind, weights_of
from flashmoe.checkpoint.config import ModelConfig
from flashmoe.measure import reference
from flashmoe.measure.family import FAMILY
from flashmoe.measure.reference import Array
from flashmoe.measure.specialised import BITS

EXACT, HALF = 1e-4, 2e-2
"""Largest error allowed, as a share of the largest value: in float32, and where keys are bfloat16
and may be multiplied as such."""
QUICK_ROWS, TALL = 40, 8256
"""Rows of a matrix where shapes are cut down, and so many that a GPU has another kernel for them.
"""
CHECKED_ROWS = 64
"""Of a matrix: numpy multiplies so many, spread over it."""


@dataclass(frozen=True)
class Check:
    """One operation on one shape.

    Attributes:
        error: the largest, as a share of the largest value; None where it could not run.
        bound: what is allowed.
        seconds: the device's own time where it tells, else the host's; the median of repeats.
        nbytes: what must be read and written once, weights and states.
        operations: multiplications and additions.
        failure: why it could not run.
    """

    name: str
    error: float | None
    bound: float
    seconds: float = 0.0
    nbytes: int = 0
    operations: int = 0
    failure: str | None = None

    @property
    def good(self) -> bool:
        return self.error is not None and self.error <= self.bound

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds if self.seconds else 0.0

    @property
    def speed(self) -> float:
        """Operations a second."""
        return self.operations / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Case:
    """What a check runs: `run` on the backend, compared with `expected`."""

    name: str
    run: Callable[[], Any]
    expected: Callable[[Any], list[tuple[Array, Array]]]
    nbytes: int
    operations: int = 0
    bound: float = EXACT


def check(backend: Any, case: Case, repeats: int) -> Check:
    """Runs a case; what the backend raises is its failure."""
    try:
        seconds = []
        for _ in range(1 + repeats):
            start = time.perf_counter()
            result = case.run()
            host = time.perf_counter() - start
            times = backend.times()
            seconds.append(times["ended"] - times["began"] or host)
        pairs = case.expected(result)
    except Exception as error:  # a report names every failure and goes on
        return Check(case.name, None, case.bound, failure=str(error))
    worst = 0.0
    for found, expected in pairs:
        difference = np.abs(np.asarray(found, np.float64) - expected).max(initial=0.0)
        worst = max(worst, float(difference / np.abs(expected).max(initial=1e-30)))
    return Check(
        case.name,
        worst if np.isfinite(worst) else float("inf"),
        case.bound,
        statistics.median(seconds[1:]),
        case.nbytes,
        case.operations,
    )


def cases(backend: Any, quick: bool) -> Iterator[Case]:
    """Every operation at the shapes and in the formats of the published models.

    Few rows of each matrix, fewer keys and tokens where `quick`. Either way every kernel runs that
    a GPU needs for these models (measure/specialised.py).
    """
    seen = set()
    for case in _cases(backend, quick):
        if case.name not in seen:
            seen.add(case.name)
            yield case


def _cases(backend: Any, quick: bool) -> Iterator[Case]:
    make = _Maker(backend, quick)
    configs = list({id(model.config): model.config for model in FAMILY}.values())
    yield from make.products(configs)
    yield from make.formats()
    for c in configs:
        yield from make.experts(c)
    yield from make.specialised()
    for value_heads in sorted({c.linear_num_value_heads for c in configs}):
        for n in (1, 8):
            yield make.gated_delta(16, value_heads, n)
    for channels in sorted({c.conv_channels for c in configs}):
        yield make.causal_conv(channels, 8)
    for heads in sorted({c.num_attention_heads for c in configs}):
        for dtype, n in (("BF16", 1), ("F32", 1), ("BF16", 8)):
            yield make.attention(heads, dtype, n)
    for experts, count in sorted({(c.num_experts, k) for c in configs for k in _counts(c)}):
        yield make.route(experts, count)
    for width in sorted({c.hidden_size for c in configs}):
        yield make.rms_norm(width, 1)
        yield make.combine(width)
        yield make.all_finite(width)
        for bits in BITS:
            yield make.embed(width, bits)


def copy_rate(backend: Any, quick: bool) -> float:
    """Bytes a second that a kernel reads and writes with next to no arithmetic: an RMS norm."""
    case = _Maker(backend, quick).rms_norm(4096, 64 if quick else 8192)
    return check(backend, case, 5).rate


def _counts(c: ModelConfig) -> set[int]:
    return {c.num_experts_per_tok, c.default_experts_per_token}


class _Maker:
    """Makes cases of seeded random numbers for one backend."""

    def __init__(self, backend: Any, quick: bool) -> None:
        self.backend = backend
        self.quick = quick
        self.rng = np.random.default_rng(0)

    def products(self, configs: list[ModelConfig]) -> Iterator[Case]:
        """Of resident matrices; in a model's order, no shape twice."""
        seen = set()
        for model in FAMILY:
            if model.config not in configs:
                continue
            for weight in weights_of(model.config):
                if weight.kind is not Kind.MATRIX or (self.quick and weight.role == HEAD):
                    continue
                format = model.format_of(weight)
                rows = min(format.rows, QUICK_ROWS) if self.quick else format.rows
                shape = (rows, format.cols, format.bits)
                if shape in seen or weight.name == "embed_tokens":
                    continue
                seen.add(shape)
                yield self.product(*shape, 64, "BF16", 1)

    def formats(self) -> Iterator[Case]:
        """Every format that checkpoints come in, with one token and with many."""
        for bits in BITS:
            for group in (32, 64, 128):
                for n in (1, 32):
                    yield self.product(1024, 4096, bits, group, "BF16", n)
            yield self.product(1024, 4096, bits, 64, "F16", 1)
        for dtype in ("BF16", "F16", "F32"):
            for n in (1, 32):
                yield self.product(1024, 4096, 0, 0, dtype, n)

    def product(self, rows: int, cols: int, bits: int, group: int, dtype: str, n: int) -> Case:
        rows = min(rows, QUICK_ROWS) if self.quick and rows != TALL else rows
        native, values, nbytes = self.matrix(rows, cols, bits, group, dtype)
        x = self.draw(n, cols)
        some = np.unique(np.linspace(0, rows - 1, CHECKED_ROWS).astype(int))
        tokens = f", {n} tokens" if n > 1 else ""
        return Case(
            f"product {rows} x {cols}, {_spell(bits, group, dtype)}{tokens}",
            lambda: self.backend.matmul(x, [native])[0],
            lambda out: [(out[:, some], x @ values(some).T)],
            nbytes,
            2 * rows * cols * n,
        )

    def experts(self, c: ModelConfig) -> Iterator[Case]:
        """A layer's routed experts of one token."""
        width = min(c.moe_intermediate_size, 128) if self.quick else c.moe_intermediate_size
        hidden = c.hidden_size
        # Those of several layers, in turns, so that no cache serves them.
        layers = 1 if self.quick else 4
        kinds = {(4, count) for count in _counts(c)}
        if not self.quick:
            kinds |= {(bits, min(_counts(c))) for bits in BITS}
        for bits, count in sorted(kinds):
            yield self.layer_of_experts("", hidden, width, bits, count, 1, layers)

    def specialised(self) -> Iterator[Case]:
        """Small shapes, for kernels that no shape above needs in every format, and that a GPU takes
        for more rows, more tokens, or fewer experts at a time."""
        for bits in BITS:
            yield self.product(TALL, 128, bits, 64, "BF16", 1)
            for count, n in ((1, 1), (8, 4), (2, 8)):
                yield self.layer_of_experts("small ", 320, 192, bits, count, n, 1)

    def layer_of_experts(
        self, kind: str, hidden: int, width: int, bits: int, count: int, n: int, layers: int
    ) -> Case:
        """Experts of which each takes all of n tokens."""
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        experts = [
            [[self.matrix(*shape, bits, 64, "BF16") for shape in shapes] for _ in range(count)]
            for _ in range(layers)
        ]
        x, tokens, turn = self.draw(n, hidden), np.arange(n, dtype=np.int32), [0]

        def run() -> tuple[int, Array]:
            turn[0] = (turn[0] + 1) % layers
            calls = [
                (*(m[0] for m in expert), tokens, tokens + np.int32(n * j))
                for j, expert in enumerate(experts[turn[0]])
            ]
            return turn[0], self.backend.experts(x, calls, n * count)

        def expected(result: tuple[int, Array]) -> list[tuple[Array, Array]]:
            at, out = result
            pairs = []
            for found, expert in zip(np.split(out, count), experts[at], strict=True):
                gate, up, down = (m[1](None) for m in expert)
                inner = reference.silu(x @ gate.T) * (x @ up.T)
                pairs.append((found, inner @ down.T))
            return pairs

        several = f", {n} tokens" if n > 1 else ""
        return Case(
            f"{count} {kind}expert{'s' if count > 1 else ''} {hidden} x {width}, "
            f"{_spell(bits, 64, 'BF16')}{several}",
            run,
            expected,
            count * sum(m[2] for m in experts[0][0]),
            6 * hidden * width * count * n,
        )

    def gated_delta(self, key_heads: int, heads: int, n: int) -> Case:
        dk = dv = 128
        inputs: dict[str, Any] = {
            "qkv": self.draw(n, 2 * key_heads * dk + heads * dv),
            "z": self.draw(n, heads * dv),
            "a": self.draw(n, heads),
            "b": self.draw(n, heads),
            "a_log": np.log(self.rng.uniform(0.1, 8, heads)).astype(np.float32),
            "dt_bias": self.draw(heads),
            "norm": self.draw(dv),
            "state": self.draw(heads, dk, dv),
            "key_heads": key_heads,
            "eps": 1e-6,
        }
        return Case(
            f"gated delta, {heads} heads, {n} token{'s' if n > 1 else ''}",
            lambda: self.backend.gated_delta(**inputs),
            lambda out: list(zip(out, reference.gated_delta(**inputs), strict=True)),
            2 * 4 * heads * dk * dv,
            8 * heads * dk * dv * n,
        )

    def causal_conv(self, channels: int, n: int) -> Case:
        x, weight, state = self.draw(n, channels), self.draw(4, channels), self.draw(3, channels)
        return Case(
            f"convolution, {channels} channels, {n} tokens",
            lambda: self.backend.causal_conv(x, weight, state),
            lambda out: list(zip(out, reference.causal_conv(x, weight, state), strict=True)),
            4 * channels * (2 * n + 10),
        )

    def attention(self, heads: int, dtype: str, n: int) -> Case:
        position, dim, kv = 500 if self.quick else 4096, 256, 2
        cache = [self.draw(kv, position + n, dim) for _ in range(2)]
        if dtype == "BF16":
            cache = [reference.to_bf16(c) for c in cache]
        inputs: dict[str, Any] = {
            "q_gate": self.draw(n, heads, 2 * dim),
            "k": self.draw(n, kv, dim),
            "v": self.draw(n, kv, dim),
            "q_norm": self.draw(dim),
            "k_norm": self.draw(dim),
            "keys": cache[0],
            "values": cache[1],
            "position": position,
            "rotary_dim": 64,
            "rope_theta": 1e7,
            "eps": 1e-6,
        }
        before = {name: inputs[name].copy() for name in ("keys", "values")}
        return Case(
            f"attention, {heads} heads, {n} token{'s' if n > 1 else ''} at {position}, "
            f"{dtype.lower()} cache",
            lambda: self.backend.attention(**inputs),
            lambda out: [(out, reference.attention(**(inputs | before))[0])],
            2 * kv * (position + n) * dim * cache[0].itemsize,
            4 * heads * dim * position * n,
            HALF if dtype == "BF16" else EXACT,
        )

    def route(self, experts: int, count: int) -> Case:
        logits = self.draw(3, experts)
        return Case(
            f"route, {count} of {experts}",
            lambda: self.backend.route(logits, count, True),
            lambda out: list(zip(out, reference.route(logits, count), strict=True)),
            logits.nbytes,
        )

    def all_finite(self, width: int) -> Case:
        x = self.draw(4, width)
        x[1, -1], x[2, 0] = np.inf, np.nan
        return Case(
            f"finite, {width}",
            lambda: self.backend.all_finite(x),
            lambda out: [(out, np.array([np.isfinite(row).all() for row in x]))],
            x.nbytes,
        )

    def rms_norm(self, width: int, n: int) -> Case:
        x, weight = self.draw(n, width), self.draw(width)
        return Case(
            f"norm of {width}",
            lambda: self.backend.rms_norm(x, weight, 1e-6),
            lambda out: [(out, reference.rms_norm(x, weight, 1e-6))],
            2 * x.nbytes,
        )

    def combine(self, width: int) -> Case:
        arrays = [
            self.draw(1, width),
            self.draw(10, width),
            self.draw(1, 10),
            self.draw(1, width),
            self.draw(1),
        ]
        return Case(
            f"combine, 10 experts of {width}",
            lambda: self.backend.combine(*arrays),
            lambda out: [(out, reference.combine(*arrays))],
            sum(a.nbytes for a in arrays) + 4 * width,
        )

    def embed(self, width: int, bits: int) -> Case:
        native, values, nbytes = self.matrix(48, width, bits, 64, "BF16")
        ids = np.array([3, 0, 47], np.int32)
        return Case(
            f"embed {width}, {_spell(bits, 64, 'BF16')}",
            lambda: self.backend.embed(native, ids),
            lambda out: [(out, values(ids))],
            3 * (nbytes // 48 + 4 * width),
        )

    def draw(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape, np.float32)

    def matrix(
        self, rows: int, cols: int, bits: int, group: int, dtype: str
    ) -> tuple[Any, Callable[[Array | None], Array], int]:
        """A native matrix where the backend computes, the float64 values of some of its rows (None:
        of all), and its bytes."""
        from flashmoe import _native  # noqa: PLC0415

        if not bits:
            stored, _ = reference.store(self.draw(rows, cols) / np.sqrt(cols), dtype)
            parts = [stored]
        else:
            words = self.rng.integers(0, 2**32, (rows, cols * bits // 32), dtype=np.uint32)
            step = self.draw(rows, cols // group) / np.sqrt(cols) / 2 ** (bits - 1)
            offset = -step * 2 ** (bits - 1) * self.rng.uniform(0.5, 1.5, step.shape)
            parts = [words, *(reference.store(p, dtype)[0] for p in (step, offset))]

        def values(some: Array | None) -> Array:
            chosen = [part if some is None else part[some] for part in parts]
            floats = [reference.from_bf16(p) if p.dtype == np.uint16 else p for p in chosen]
            if not bits:
                return floats[0].astype(np.float64)
            shifts = np.arange(32 // bits, dtype=np.uint32) * bits
            q = (chosen[0][..., None] >> shifts & (2**bits - 1)).reshape(len(chosen[0]), -1)
            scales, biases = (np.repeat(p.astype(np.float64), group, 1) for p in floats[1:])
            return np.asarray(q * scales + biases)

        native = _native.ops.Matrix(rows, cols, dtype, parts, bits, group)
        return self.backend.place(native), values, sum(part.nbytes for part in parts)


def _spell(bits: int, group: int, dtype: str) -> str:
    if not bits:
        return dtype.lower()
    return f"{bits}-bit, group {group}" + ("" if dtype == "BF16" else f", {dtype.lower()} scales")
