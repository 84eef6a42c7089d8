"""Numpy float64 references of what a GPU backend computes, and random inputs for it.

Activations are float32 arrays, a row a token. Weights are `Weight`s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
F32, F16, BF16 = 0, 1, 2
_UNUSED = np.zeros(4, np.float32)


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
    def arrays(self) -> tuple[Array, Array, Array]:
        return self.weight, self.scales, self.biases

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


# ---- operations -------------------------------------------------------------------------------


def rms_norm_reference(x: Array, weight: Array, eps: float) -> Array:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


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


def expert_reference(x: Array, call: Expert) -> Array:
    """float64 [pairs, hidden]"""
    x = x[list(call.tokens)].astype(np.float64)
    inner = silu(x @ call.gate.values().T) * (x @ call.up.values().T)
    return inner @ call.down.values().T


def combine_reference(
    x: Array, expert_out: Array, expert_weights: Array, shared_out: Array, shared_gate: Array
) -> Array:
    routed = expert_out.reshape(len(x), -1, x.shape[1]).astype(np.float64)
    gate = 1 / (1 + np.exp(-shared_gate.astype(np.float64)))
    return x + np.einsum("tk,tkh->th", expert_weights, routed) + gate[:, None] * shared_out
