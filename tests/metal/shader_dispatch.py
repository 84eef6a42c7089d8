"""Dispatches of the kernels in metal/, and numpy float64 references of what they compute.

A dispatch is a value; what runs it is the executor (tests) or a GPU (benchmarks/metal_on_cuda).
Activations are float32 arrays, a row a token. Weights are `Weight`s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from shader_arguments import K, S, ceil_div, matvec_block_rows, matvec_quads

Array = np.ndarray[Any, Any]
F32, F16, BF16 = 0, 1, 2
_UNUSED = np.zeros(4, np.float32)


@dataclass
class Dispatch:
    """buffers: arrays, or bytes (setBytes), by index."""

    kernel: str
    grid: tuple[int, ...]
    threads: int
    buffers: dict[int, Array | bytes]
    constants: dict[int, int] = field(default_factory=dict)


# ---- stored elements --------------------------------------------------------------------------


def to_bf16(x: Array) -> Array:
    """uint16 patterns, rounded to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def store(x: Array, dtype: int) -> Array:
    """x in dtype, as the bytes of a checkpoint."""
    return {F32: lambda: x.astype(np.float32), F16: lambda: x.astype(np.float16)}.get(
        dtype, lambda: to_bf16(x)
    )()


def load(stored: Array) -> Array:
    """The float64 values of what `store` made."""
    return (from_bf16(stored) if stored.dtype == np.uint16 else stored).astype(np.float64)


@dataclass
class Weight:
    """A matrix [rows, columns] in a format; bits 0 is dense."""

    rows: int
    columns: int
    bits: int
    group: int
    dtype: int
    weight: Array
    scales: Array = field(default_factory=lambda: _UNUSED)
    biases: Array = field(default_factory=lambda: _UNUSED)

    @property
    def format(self) -> tuple[int, int, int]:
        return self.bits, self.group, self.dtype

    def values(self) -> Array:
        """float64 [rows, columns]"""
        if self.bits == 0:
            return load(self.weight).reshape(self.rows, self.columns)
        shifts = np.arange(0, 32, self.bits, dtype=np.uint32)
        q = self.weight[..., None] >> shifts & (2**self.bits - 1)
        q = q.reshape(self.rows, -1, self.group).astype(np.float64)
        scales, biases = load(self.scales)[..., None], load(self.biases)[..., None]
        return (q * scales + biases).reshape(self.rows, self.columns)


def random_weight(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    bits: int = 4,
    group: int = 64,
    dtype: int = BF16,
) -> Weight:
    """Values of about columns ** -0.5, so that products are about 1; scales of both signs."""
    size = columns**-0.5
    if bits == 0:
        dense = rng.standard_normal((rows, columns), np.float32) * np.float32(size)
        return Weight(rows, columns, 0, 0, dtype, store(dense, dtype))
    words = rng.integers(0, 2**32, (rows, columns * bits // 32), np.uint32)
    sign = np.where(rng.random((rows, columns // group)) < 0.5, -1, 1)
    scale = rng.uniform(0.5, 1.5, sign.shape) * sign * size * 4 / 2**bits
    bias = -scale * (2**bits - 1) / 2 + rng.standard_normal(sign.shape) * size * 0.1
    return Weight(rows, columns, bits, group, dtype, words, store(scale, dtype), store(bias, dtype))


def _format_constants(weight: Weight, first: int = 0) -> dict[int, int]:
    return {first: weight.bits, first + 1: weight.group, first + 2: weight.dtype}


# ---- operations -------------------------------------------------------------------------------


def embed(ids: Array, table: Weight, out: Array) -> Dispatch:
    buffers = {
        K["kEmbedIds"]: ids,
        K["kEmbedWeight"]: table.weight,
        K["kEmbedScales"]: table.scales,
        K["kEmbedBiases"]: table.biases,
        K["kEmbedOut"]: out,
        K["kEmbedArguments"]: bytes(S["EmbedArguments"](table.columns)),
    }
    grid = (ceil_div(table.columns, 256), len(ids))
    return Dispatch("embed", grid, 256, buffers, _format_constants(table))


def rms_norm(x: Array, weight: Array, eps: float, out: Array) -> Dispatch:
    buffers = {
        K["kNormX"]: x,
        K["kNormWeight"]: weight,
        K["kNormOut"]: out,
        K["kNormArguments"]: bytes(S["NormArguments"](x.shape[1], eps)),
    }
    return Dispatch("rms_norm", (len(x),), K["kNormThreads"], buffers)


def rms_norm_reference(x: Array, weight: Array, eps: float) -> Array:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def product(
    kernel: str,
    x: Array,
    weights: Sequence[Weight],
    outs: Sequence[Array],
    add: Sequence[int],
    quads: int = 0,
) -> Dispatch:
    """kernel: "matvec" or "matmul"; outs [tokens, rows], added to where add says so. quads: of a
    simdgroup of matvec, if not as the host chooses.
    """
    tokens, columns = x.shape
    quads = quads or matvec_quads(sum(weight.rows for weight in weights))
    block = matvec_block_rows(quads) if kernel == "matvec" else K["kTileRows"]
    args = S["ProductArguments"](columns, tokens, len(weights))
    buffers: dict[int, Array | bytes] = {K["kProductX"]: x}
    for i in range(K["kMaxProducts"]):
        for name in ("Weight", "Scales", "Biases", "Out"):
            buffers[K[f"kProduct{name}"] + i] = x
        if i >= len(weights):
            continue
        args.rows[i], args.add[i] = weights[i].rows, add[i]
        args.first_block[i + 1] = args.first_block[i] + ceil_div(weights[i].rows, block)
        buffers[K["kProductWeight"] + i] = weights[i].weight
        buffers[K["kProductScales"] + i] = weights[i].scales
        buffers[K["kProductBiases"] + i] = weights[i].biases
        buffers[K["kProductOut"] + i] = outs[i]
    buffers[K["kProductArguments"]] = bytes(args)
    blocks = args.first_block[len(weights)]
    constants = _format_constants(weights[0])
    if kernel == "matvec":
        constants[K["kQuads"]] = quads
        return Dispatch(kernel, (blocks, tokens), K["kMatvecThreads"], buffers, constants)
    grid = (blocks, ceil_div(tokens, K["kTileTokens"]))
    return Dispatch(kernel, grid, K["kTileThreads"], buffers, constants)


def causal_conv(x: Array, weight: Array, state_in: Array, state_out: Array) -> Dispatch:
    tokens, channels = x.shape
    buffers = {
        K["kConvX"]: x,
        K["kConvWeight"]: weight,
        K["kConvStateIn"]: state_in,
        K["kConvStateOut"]: state_out,
        K["kConvArguments"]: bytes(S["ConvArguments"](channels, tokens, len(weight))),
    }
    return Dispatch("causal_conv", (ceil_div(channels, 256),), 256, buffers)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def causal_conv_reference(x: Array, weight: Array, state: Array) -> tuple[Array, Array]:
    """The convolved x and the new state."""
    taps = len(weight)
    padded = np.concatenate([state, x]).astype(np.float64)
    out = sum(weight[k] * padded[k : k + len(x)] for k in range(taps))
    return silu(out), padded[len(x) :]


@dataclass
class Delta:
    """Shapes and inputs of gated_delta, as in DeltaCall of backend.h."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    qkv: Array
    z: Array
    a: Array
    b: Array
    a_log: Array
    dt_bias: Array
    norm: Array
    state: Array
    eps: float = 1e-6


def random_delta(
    rng: np.random.Generator, tokens: int, key_heads: int, value_heads: int, dk: int, dv: int
) -> Delta:
    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    return Delta(
        key_heads,
        value_heads,
        dk,
        dv,
        qkv=normal(tokens, 2 * key_heads * dk + value_heads * dv),
        z=normal(tokens, value_heads * dv),
        a=normal(tokens, value_heads) * 4,
        b=normal(tokens, value_heads),
        a_log=normal(value_heads),
        dt_bias=normal(value_heads) * 8,
        norm=normal(dv),
        state=normal(value_heads, dk, dv),
    )


def gated_delta(d: Delta, state_out: Array, out: Array) -> Dispatch:
    args = S["DeltaArguments"](
        len(d.qkv), d.key_heads, d.value_heads, d.key_dim, d.value_dim, d.eps
    )
    buffers = {
        K["kDeltaQkv"]: d.qkv,
        K["kDeltaZ"]: d.z,
        K["kDeltaA"]: d.a,
        K["kDeltaB"]: d.b,
        K["kDeltaALog"]: d.a_log,
        K["kDeltaDtBias"]: d.dt_bias,
        K["kDeltaNorm"]: d.norm,
        K["kDeltaStateIn"]: d.state,
        K["kDeltaStateOut"]: state_out,
        K["kDeltaOut"]: out,
        K["kDeltaArguments"]: bytes(args),
    }
    threads = K["kDeltaParts"] * 32 * ceil_div(d.value_dim, 32)
    return Dispatch("gated_delta", (d.value_heads,), threads, buffers)


def gated_delta_reference(d: Delta) -> tuple[Array, Array]:
    """The output and the new state."""
    n, hk, hv, dk, dv = len(d.qkv), d.key_heads, d.value_heads, d.key_dim, d.value_dim
    qkv = d.qkv.astype(np.float64)
    q, k, v = np.split(qkv, [hk * dk, 2 * hk * dk], axis=1)
    q, k = (np.repeat(t.reshape(n, hk, dk), hv // hk, axis=1) for t in (q, k))
    v = v.reshape(n, hv, dv)
    q = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6) * dk**-0.5
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    beta = 1 / (1 + np.exp(-d.b.astype(np.float64)))
    decay = np.exp(-np.exp(d.a_log.astype(np.float64)) * np.logaddexp(0, d.a + d.dt_bias))
    state, out = d.state.astype(np.float64), np.empty((n, hv, dv))
    for t in range(n):
        state = state * decay[t, :, None, None]
        change = beta[t, :, None] * (v[t] - np.einsum("hkv,hk->hv", state, k[t]))
        state = state + k[t, :, :, None] * change[:, None, :]
        o = np.einsum("hkv,hk->hv", state, q[t])
        out[t] = rms_norm_reference(o, d.norm, d.eps)
    return out.reshape(n, -1) * silu(d.z.astype(np.float64)), state


@dataclass
class Attention:
    """Shapes and inputs of attention, as in AttentionCall of backend.h; keys and values are the
    cache before the call, [kv_heads, capacity, head_dim], float32 or uint16 (bf16).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    position: int
    q_gate: Array
    k: Array
    v: Array
    q_norm: Array
    k_norm: Array
    keys: Array
    values: Array
    theta: float = 1e7
    eps: float = 1e-6

    @property
    def frequencies(self) -> Array:
        exponent = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        return (np.float32(1) / np.float32(self.theta) ** exponent).astype(np.float32)


def random_attention(
    rng: np.random.Generator,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    position: int,
    dtype: int,
    slack: int = 3,
) -> Attention:
    """A cache with `slack` cells past the last token."""

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    cache = (kv_heads, position + tokens + slack, head_dim)
    return Attention(
        heads,
        kv_heads,
        head_dim,
        rotary_dim,
        position,
        q_gate=normal(tokens, heads, 2, head_dim),
        k=normal(tokens, kv_heads, head_dim),
        v=normal(tokens, kv_heads, head_dim),
        q_norm=normal(head_dim) + 1,
        k_norm=normal(head_dim) + 1,
        keys=store(normal(*cache), dtype),
        values=store(normal(*cache), dtype),
    )


def attention(call: Attention, keys_per_split: int, out: Array) -> list[Dispatch]:
    """append, split, and merge where there are several splits. Writes call.keys and call.values."""
    tokens, heads = len(call.q_gate), call.heads
    splits = ceil_div(call.position + tokens, keys_per_split)
    args = S["AttentionArguments"](
        call.keys.shape[1],
        call.position,
        tokens,
        heads,
        call.kv_heads,
        call.head_dim,
        call.rotary_dim,
        keys_per_split,
        splits,
        call.eps,
    )
    scratch = splits if splits > 1 else 0
    buffers = {
        K["kAttentionArguments"]: bytes(args),
        K["kAttentionQGate"]: call.q_gate,
        K["kAttentionK"]: call.k,
        K["kAttentionV"]: call.v,
        K["kAttentionQNorm"]: call.q_norm,
        K["kAttentionKNorm"]: call.k_norm,
        K["kAttentionFrequencies"]: call.frequencies,
        K["kAttentionQueries"]: np.full((tokens, heads, call.head_dim), np.nan, np.float32),
        K["kAttentionKeys"]: call.keys,
        K["kAttentionValues"]: call.values,
        K["kAttentionPartial"]: np.full((scratch, tokens * heads, call.head_dim), np.nan, "f4"),
        K["kAttentionTotals"]: np.full((scratch, tokens * heads, 2), np.nan, np.float32),
        K["kAttentionOut"]: out,
    }
    constants = {K["kCacheDType"]: F32 if call.keys.dtype == np.float32 else BF16}
    append = (ceil_div(tokens * (heads + call.kv_heads), 4),)
    rows = ceil_div(tokens * heads // call.kv_heads, K["kSplitRows"])
    result = [
        Dispatch("attention_append", append, 128, buffers, constants),
        Dispatch("attention_split", (call.kv_heads, rows, splits), 128, buffers, constants),
    ]
    if splits > 1:
        merge = (ceil_div(tokens * heads, 4),)
        result.append(Dispatch("attention_merge", merge, 128, buffers, constants))
    return result


def attention_reference(call: Attention) -> tuple[Array, Array, Array]:
    """The output, and the cells of keys and values that join the cache, [kv_heads, tokens, dim].

    New keys and values are rounded as the cache rounds them, since the output is computed from it.
    """
    n, group, half = len(call.k), call.heads // call.kv_heads, call.rotary_dim // 2
    position = call.position + np.arange(n)
    # The angle is rounded to float32, as transformers computes it.
    angle = (position.astype(np.float32)[:, None] * call.frequencies).astype(np.float64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def turn(x: Array) -> Array:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)

    q = turn(rms_norm_reference(call.q_gate[:, :, 0], call.q_norm, call.eps))
    new_keys = turn(rms_norm_reference(call.k, call.k_norm, call.eps)).transpose(1, 0, 2)
    new_values = call.v.transpose(1, 0, 2).astype(np.float64)
    dtype = F32 if call.keys.dtype == np.float32 else BF16
    keys = load(call.keys)[:, : call.position]
    values = load(call.values)[:, : call.position]
    keys = np.concatenate([keys, load(store(new_keys, dtype))], 1)
    values = np.concatenate([values, load(store(new_values, dtype))], 1)
    out = np.empty((n, call.heads, call.head_dim))
    for h in range(call.heads):
        scores = q[:, h] @ keys[h // group].T * call.head_dim**-0.5
        scores[np.arange(keys.shape[1]) > position[:, None]] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, h] = p / p.sum(-1, keepdims=True) @ values[h // group]
    gate = 1 / (1 + np.exp(-call.q_gate[:, :, 1].astype(np.float64)))
    return (out * gate).reshape(n, -1), new_keys, new_values


def route(logits: Array, renormalise: bool, ids: Array, weights: Array) -> Dispatch:
    args = S["RouteArguments"](logits.shape[1], ids.shape[1], renormalise)
    buffers = {
        K["kRouteLogits"]: logits,
        K["kRouteIds"]: ids,
        K["kRouteWeights"]: weights,
        K["kRouteArguments"]: bytes(args),
    }
    return Dispatch("route", (len(logits),), 32, buffers)


def route_reference(logits: Array, top_k: int, renormalise: bool) -> tuple[Array, Array]:
    p = np.exp(logits - logits.max(-1, keepdims=True).astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    ids = np.argsort(-logits.astype(np.float64), axis=-1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(p, ids, -1)
    return ids, weights / weights.sum(-1, keepdims=True) if renormalise else weights


@dataclass
class Expert:
    """The matrices of an expert, its (token, out row) pairs, and which output they go to."""

    gate: Weight
    up: Weight
    down: Weight
    tokens: Sequence[int]
    out_rows: Sequence[int]
    out: Array


class _Sources:
    """Places arrays in few buffers, weights of one expert behind each other as in a slot."""

    def __init__(self) -> None:
        self.buffers: list[Array] = []

    def slot(self, arrays: Sequence[Array]) -> list[int]:
        """One buffer with all of `arrays`, each at a multiple of 16; their Locations."""
        offsets, parts, at = [], [], 0
        for array in arrays:
            offsets.append(len(self.buffers) << 56 | at)
            parts.append(array.tobytes().ljust(ceil_div(array.nbytes, 16) * 16, b"\xff"))
            at += len(parts[-1])
        self.buffers.append(np.frombuffer(b"".join(parts), np.uint8))
        return offsets

    def whole(self, array: Array) -> int:
        """The Location of an array that is a buffer of its own."""
        for i, buffer in enumerate(self.buffers):
            if buffer is array:
                return i << 56
        self.buffers.append(array)
        return len(self.buffers) - 1 << 56


def experts(
    x: Array,
    calls: Sequence[Expert],
    *,
    tiles: bool,
    quads: tuple[int, int] | None = None,
    apart: bool = False,
) -> list[Dispatch]:
    """gate_up and down for up to as many calls as fit; all slots in one buffer. quads: of gate_up
    and of down, if not as the host chooses. apart: each part of a weight in a buffer of its own.
    """
    sources = _Sources()
    hidden = x.shape[1]
    widest = max(call.gate.rows for call in calls)
    args = S["ExpertArguments"](hidden, ceil_div(widest, 4) * 4, len(calls))
    arrays = [
        part
        for call in calls
        for matrix in (call.gate, call.up, call.down)
        for part in (matrix.weight, matrix.scales, matrix.biases)
    ]
    locations = iter([sources.whole(a) for a in arrays] if apart else sources.slot(arrays))
    tile_count = 0
    for entry, call in zip(args.experts, calls, strict=False):
        for matrix in (entry.gate, entry.up, entry.down):
            matrix.weight, matrix.scales, matrix.biases = (next(locations) for _ in range(3))
        entry.out = sources.whole(call.out)
        entry.intermediate, entry.first_pair = call.gate.rows, args.pairs
        args.pairs += len(call.tokens)
        tile_count += ceil_div(len(call.tokens), K["kTileTokens"])
    buffers: dict[int, Array | bytes] = {
        K["kExpertX"]: x,
        K["kExpertArguments"]: bytes(args),
        K["kExpertPairTokens"]: np.concatenate([call.tokens for call in calls]).astype(np.int32),
        K["kExpertPairRows"]: np.concatenate([call.out_rows for call in calls]).astype(np.int32),
        K["kExpertActivations"]: np.full((args.pairs, args.stride), np.nan, np.float32),
    }
    for i in range(K["kMaxSources"]):
        buffers[K["kExpertSources"] + i] = sources.buffers[min(i, len(sources.buffers) - 1)]
    first = _format_constants(calls[0].gate) | _format_constants(calls[0].up, K["kSecondBits"])
    down = _format_constants(calls[0].down)
    if tiles:
        rows, threads = K["kTileRows"], K["kTileThreads"]
        return [
            Dispatch(
                "experts_gate_up_tiles",
                (ceil_div(widest, rows), tile_count),
                threads,
                buffers,
                first,
            ),
            Dispatch(
                "experts_down_tiles", (ceil_div(hidden, rows), tile_count), threads, buffers, down
            ),
        ]
    up_rows, down_rows = 2 * widest * args.pairs, hidden * args.pairs
    quads = quads or (matvec_quads(up_rows), matvec_quads(down_rows))
    first[K["kQuads"]], down[K["kQuads"]] = quads
    up_blocks = ceil_div(widest, matvec_block_rows(quads[0]) // 2)
    down_blocks = ceil_div(hidden, matvec_block_rows(quads[1]))
    threads = K["kMatvecThreads"]
    return [
        Dispatch("experts_gate_up", (up_blocks, args.pairs), threads, buffers, first),
        Dispatch("experts_down", (down_blocks, args.pairs), threads, buffers, down),
    ]


def expert_reference(x: Array, call: Expert) -> Array:
    """float64 [pairs, hidden]"""
    x = x[list(call.tokens)].astype(np.float64)
    inner = silu(x @ call.gate.values().T) * (x @ call.up.values().T)
    return inner @ call.down.values().T


def combine(
    x: Array,
    expert_out: Array,
    expert_weights: Array,
    shared_out: Array,
    shared_gate: Array,
    norm: Array | None = None,
    normed: Array | None = None,
    eps: float = 1e-6,
) -> Dispatch:
    """Adds to x; fills normed where a norm is given."""
    args = S["CombineArguments"](x.shape[1], expert_weights.shape[1], norm is not None, eps)
    buffers = {
        K["kCombineExpertOut"]: expert_out,
        K["kCombineExpertWeights"]: expert_weights,
        K["kCombineSharedOut"]: shared_out,
        K["kCombineSharedGate"]: shared_gate,
        K["kCombineX"]: x,
        K["kCombineNormWeight"]: _UNUSED if norm is None else norm,
        K["kCombineNormed"]: _UNUSED if normed is None else normed,
        K["kCombineArguments"]: bytes(args),
    }
    return Dispatch("combine", (len(x),), K["kCombineThreads"], buffers)


def combine_reference(
    x: Array, expert_out: Array, expert_weights: Array, shared_out: Array, shared_gate: Array
) -> Array:
    routed = expert_out.reshape(len(x), -1, x.shape[1]).astype(np.float64)
    gate = 1 / (1 + np.exp(-shared_gate.astype(np.float64)))
    return x + np.einsum("tk,tkh->th", expert_weights, routed) + gate[:, None] * shared_out
