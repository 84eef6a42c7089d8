"""How long a token takes: bytes, rates, dispatches and latencies, layer by layer.

    part  = bytes / rate of its format + dispatches x dispatch
    layer = mixer + router + experts + wait + what reading takes beyond what it overlaps with
    token = layers + head

Where no rate was measured on the machine itself, the constants below say whose measurement is used.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flashmoe.checkpoint.architecture import (
    ATTENTION,
    DELTA_NET,
    EMBEDDINGS,
    EXPERTS,
    HEAD,
    ROUTER,
    SHARED_EXPERT,
    Kind,
    Weight,
    weights_of,
)
from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.table import Format

# On an Apple GPU. The first two: ml-explore/mlx issue 4521 (M3 Ultra): 3,200 small kernels in a row
# took 7.7 ms in 16 command buffers and 8.8 ms in 64.
GPU_DISPATCH = 2.3e-6
GPU_COMMAND_BUFFER = 20e-6
# From commit to the host's waking, beside the GPU's own work: 150 to 500 us (rlx-metal 0.2.10,
# gpu_time.rs). `flashmoe doctor` measures it.
GPU_WAIT = 200e-6
# Of the memory's bandwidth, what products of 4-bit weights with one token reach: llama.cpp with a
# 3.82 GB model at 35.5 tok/s on an M1 Pro (200 GB/s) and 30.7 on an M3 Pro (150 GB/s), 68 and 78 %
# (its discussion 4167). Fewer, since matrices here are smaller and kernels new.
GPU_PRODUCT = 0.6
# Copies out of a warm page cache by several threads, M3 Max: 29 to 32 GB/s, the original engine.
PAGE_CACHE_RATE = 30e9

TEXT_HITS = ((0.0, 0.0), (16 / 512, 0.49), (32 / 512, 0.59), (64 / 512, 0.68), (128 / 512, 0.71))
"""(share of the experts that memory holds, share of a text's experts found there): the routing of
the 397B with 4 experts per token, least recently used; simulated, published with the original."""


@dataclass(frozen=True)
class Launches:
    """Dispatches (GPU) or parallel loops (CPU) of a decode step's parts."""

    delta: tuple[int, int]  # before and with the output projection
    attention: tuple[int, int]
    router: int
    experts: int  # with the shared one, and what adds them up


CPU_LAUNCHES = Launches((3, 1), (2, 1), 3, 4)
"""One for each operation of model/forward.cpp, two for experts: gate and up, then down."""
METAL_LAUNCHES = Launches((5, 1), (6, 1), 2, 3)
"""11 in a GatedDeltaNet layer, 12 in an attention layer: docs/metal.md."""


@dataclass(frozen=True)
class LayerBytes:
    """What one token asks of a layer's memory: bytes, of weights by format."""

    inputs: Counter[str]  # projections into the mixer, its convolution
    state: int  # recurrent state read and written, keys and values read
    output: Counter[str]  # the projection out of it
    router: Counter[str]
    shared: Counter[str]
    expert: Counter[str]  # one routed expert
    attention: bool


@dataclass(frozen=True)
class TokenBytes:
    """Likewise of a whole model.

    `formats` has a matrix's format for each name in the counts, the one of most bytes first.
    """

    layers: tuple[LayerBytes, ...]
    head: Counter[str]
    formats: Mapping[str, Format]


@dataclass(frozen=True)
class Rates:
    """A machine and an engine on it; bytes a second, seconds.

    Attributes:
        memory: a plain read; no engine can be faster.
        product: of weights multiplied with one token, by format; "" is any other format's.
        dispatch: what one launch costs beside its bytes.
        wait: of the host for a layer's router, beside the GPU's work; 0 on the CPU.
        disk: experts at random places, as many at once as a token lacks in a layer.
        page_cache: copies of experts out of the system's page cache; None where they stay in slots.
        overlap: experts that are there are computed while others are read.
    """

    memory: float
    product: Mapping[str, float]
    dispatch: float
    wait: float
    disk: float
    page_cache: float | None
    overlap: bool
    launches: Launches


@dataclass(frozen=True)
class Prediction:
    """Seconds of one decoded token, by part, and what they come to.

    Attributes:
        reading: for experts, beyond what computing hides.
        limit: tokens a second if the machine did nothing but move these bytes, at its memory's and
            its disk's rate: one after the other where reading does not overlap with computing.
    """

    mixer: float
    router: float
    experts: float
    wait: float
    reading: float
    head: float
    limit: float

    @property
    def seconds(self) -> float:
        return self.mixer + self.router + self.experts + self.wait + self.reading + self.head

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.seconds

    def to_dict(self) -> dict[str, float]:
        """Parts and sums, for JSON."""
        return dataclasses.asdict(self) | {
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


def predict(work: TokenBytes, rates: Rates, experts_per_token: int, hits: float) -> Prediction:
    """One token of decode, where `hits` of the experts it needs are in memory."""
    mixer = router = experts = wait = reading = 0.0
    launches = rates.launches
    for layer in work.layers:
        before, after = launches.attention if layer.attention else launches.delta
        mixer += _seconds(layer.inputs, rates, before) + layer.state / rates.memory
        mixer += _seconds(layer.output, rates, after)
        router += _seconds(layer.router, rates, launches.router)
        one = _seconds(layer.expert, rates, 0)
        computing = _seconds(layer.shared, rates, launches.experts) + experts_per_token * one
        experts += computing
        wait += rates.wait
        read = read_seconds(layer, rates, experts_per_token, hits)
        # The last expert to land is computed when nothing is left to read.
        hidden = max(0.0, computing - one) if rates.overlap else 0.0
        reading += max(0.0, read - hidden)
    head = _seconds(work.head, rates, 1) + rates.wait
    return Prediction(
        mixer, router, experts, wait, reading, head, _limit(work, rates, experts_per_token, hits)
    )


def read_seconds(layer: LayerBytes, rates: Rates, experts_per_token: int, hits: float) -> float:
    """What getting a layer's experts into slots takes: from disk, and from the page cache."""
    needed = experts_per_token * layer.expert.total()
    cached = 0.0 if rates.page_cache is None else hits * needed / rates.page_cache
    return (1 - hits) * needed / rates.disk + cached


def _seconds(amount: Counter[str], rates: Rates, launches: int) -> float:
    product = rates.product
    moving = sum(n / product.get(format, product[""]) for format, n in amount.items())
    return moving + launches * rates.dispatch


def _limit(work: TokenBytes, rates: Rates, experts_per_token: int, hits: float) -> float:
    needed = sum(experts_per_token * layer.expert.total() for layer in work.layers)
    memory = touched(work, experts_per_token) / max(rates.memory, *rates.product.values())
    disk = (1 - hits) * needed / rates.disk
    return 1 / (max(memory, disk) if rates.overlap else memory + disk)


def touched(work: TokenBytes, experts_per_token: int) -> int:
    """Bytes of memory that a token cannot do without, experts included."""
    total = work.head.total()
    for layer in work.layers:
        total += layer.inputs.total() + layer.state + layer.output.total() + layer.router.total()
        total += layer.shared.total() + experts_per_token * layer.expert.total()
    return total


def text_hits(share: float) -> float:
    """Of the experts that a text needs, the share found in memory that holds `share` of them all,
    by TEXT_HITS; never less than if all experts were equally likely."""
    share = min(1.0, share)
    points = (*TEXT_HITS, (1.0, 1.0))
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if share <= x1:
            return max(share, y0 + (share - x0) / (x1 - x0) * (y1 - y0))
    return 1.0


def bytes_of(checkpoint: Checkpoint, context: int = 0) -> TokenBytes:
    """What a checkpoint asks for a token behind `context` others."""

    def format_of(weight: Weight) -> Format:
        if weight.kind is not Kind.EXPERTS:
            return checkpoint.matrices[weight.name].format
        layer = checkpoint.experts[int(weight.name.split(".")[1])]
        return {"gate_proj": layer.gate, "up_proj": layer.up, "down_proj": layer.down}[
            weight.name.rsplit(".", 1)[1]
        ]

    return bytes_by_layer(checkpoint.config, format_of, context)


def bytes_by_layer(
    config: ModelConfig, format_of: Callable[[Weight], Format], context: int = 0
) -> TokenBytes:
    """Likewise for a model of such a configuration whose matrices are stored in such formats."""
    parts: dict[tuple[int, str], Counter[str]] = {}
    head: Counter[str] = Counter()
    total: Counter[str] = Counter()
    examples: dict[str, Format] = {}
    for weight in weights_of(config):
        if weight.kind not in (Kind.MATRIX, Kind.EXPERTS):
            continue
        format = format_of(weight)
        times = config.num_experts_per_tok if weight.kind is Kind.EXPERTS else 1
        if weight.role != EMBEDDINGS or config.tie_word_embeddings:
            total[spell(format)] += times * format.nbytes
            examples.setdefault(spell(format), format)
        if weight.role in (EMBEDDINGS, HEAD):
            if weight.role == HEAD or config.tie_word_embeddings:
                head[spell(format)] += format.nbytes
            continue
        output = weight.name.endswith(("out_proj", "o_proj"))
        part = "output" if output else weight.role
        layer = int(weight.name.split(".")[1])
        parts.setdefault((layer, part), Counter())[spell(format)] += format.nbytes
    c = config
    # The convolution's state and weights, and the recurrent state, which is read and written.
    recurrent = c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
    delta = 2 * 4 * (recurrent + c.conv_channels * c.linear_conv_kernel_dim)
    keys_and_values = context * 2 * 2 * c.num_key_value_heads * c.head_dim  # bfloat16
    layers = []
    for index, kind in enumerate(c.layer_types):
        attention = kind == "full_attention"
        layers.append(
            LayerBytes(
                inputs=parts[index, ATTENTION if attention else DELTA_NET],
                state=keys_and_values if attention else delta,
                output=parts[index, "output"],
                router=parts[index, ROUTER],
                shared=parts[index, SHARED_EXPERT],
                expert=parts[index, EXPERTS],
                attention=attention,
            )
        )
    by_bytes = {name: examples[name] for name, _ in total.most_common()}
    return TokenBytes(tuple(layers), head, by_bytes)


def spell(format: Format) -> str:
    """A format as people name it."""
    if format.bits:
        return f"{format.bits}-bit, group {format.group}"
    return format.dtype.lower()
