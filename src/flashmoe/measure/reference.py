"""What each operation of a backend is, in float64: what `doctor` and the tests compare with.

Written from the models' own formulas (transformers' modeling_qwen3_5_moe.py), for clarity and not
for speed. Shapes are those of `_native.ops`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def to_bf16(x: Array) -> npt.NDArray[np.uint16]:
    """float32 rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(words: Array) -> npt.NDArray[np.float32]:
    return (words.astype(np.uint32) << 16).view(np.float32)


def store(x: Array, dtype: str) -> tuple[Array, Array]:
    """The array as it lies in a checkpoint, and the float64 values that it then holds."""
    if dtype == "BF16":
        words = to_bf16(x)
        return words, from_bf16(words).astype(np.float64)
    stored = x.astype(np.float16 if dtype == "F16" else np.float32)
    return stored, stored.astype(np.float64)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    wide = x.astype(np.float64)
    return np.asarray(wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * weight)


def causal_conv(x: Array, weight: Array, state: Array) -> tuple[Array, Array]:
    """The outputs [n, channels], and the state after them."""
    n, taps = len(x), len(weight)
    line = np.concatenate([state, x]).astype(np.float64)
    total = np.sum([weight[k] * line[k : k + n] for k in range(taps)], axis=0)
    return silu(total), line[len(line) - taps + 1 :]


def gated_delta(
    qkv: Array,
    z: Array,
    a: Array,
    b: Array,
    a_log: Array,
    dt_bias: Array,
    norm: Array,
    state: Array,
    key_heads: int,
    eps: float,
) -> tuple[Array, Array]:
    """The outputs [n, heads * dv], and the state after them."""
    heads, dk, dv = state.shape
    out, s = np.zeros((len(qkv), heads, dv)), state.astype(np.float64).copy()
    for t, row in enumerate(qkv.astype(np.float64)):
        q = row[: key_heads * dk].reshape(key_heads, dk)
        k = row[key_heads * dk : 2 * key_heads * dk].reshape(key_heads, dk)
        v = row[2 * key_heads * dk :].reshape(heads, dv)
        q = q / np.sqrt((q**2).sum(-1, keepdims=True) + 1e-6) * dk**-0.5
        k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
        for h in range(heads):
            kh, qh = k[h // (heads // key_heads)], q[h // (heads // key_heads)]
            g = -np.exp(np.float64(a_log[h])) * np.log1p(np.exp(np.float64(a[t, h] + dt_bias[h])))
            s[h] *= np.exp(g)
            s[h] += np.outer(kh, sigmoid(b[t, h].astype(np.float64)) * (v[h] - s[h].T @ kh))
            o = s[h].T @ qh
            o = o / np.sqrt((o**2).mean() + eps) * norm
            out[t, h] = o * silu(z[t, h * dv : (h + 1) * dv].astype(np.float64))
    return out.reshape(len(qkv), -1), s


def attention(
    q_gate: Array,
    k: Array,
    v: Array,
    q_norm: Array,
    k_norm: Array,
    keys: Array,
    values: Array,
    position: int,
    rotary_dim: int,
    rope_theta: float,
    eps: float,
    *,
    rounded: bool = False,
) -> tuple[Array, Array, Array]:
    """The outputs [n, heads * dim], and keys and values after them.

    `rounded`: queries, and the weights of each block of 256 keys against the block's own largest,
    are in bfloat16, as the keys and values that they meet.
    """
    n, heads, _ = q_gate.shape
    kv_heads, dim = k.shape[1:]
    exponents = np.arange(0, rotary_dim, 2).astype(np.float32) / np.float32(rotary_dim)
    powers = (np.float64(rope_theta) ** exponents.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1) / powers
    angles = np.outer(np.arange(position, position + n, dtype=np.float32), inverse)[:, None]
    cos, sin = np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))

    def prepare(x: Array, weight: Array) -> Array:
        x = rms_norm(x, weight, eps)
        half = rotary_dim // 2
        a, b = x[..., :half], x[..., half:rotary_dim]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., rotary_dim:]], -1)

    bf16 = keys.dtype == np.uint16
    keys, values = ((from_bf16(c) if bf16 else c).astype(np.float64) for c in (keys, values))
    new_k, new_v = prepare(k, k_norm), v
    if bf16:
        new_k, new_v = (from_bf16(to_bf16(c)) for c in (new_k.astype(np.float32), new_v))
    keys[:, position : position + n] = new_k.transpose(1, 0, 2)
    values[:, position : position + n] = new_v.transpose(1, 0, 2)
    q = prepare(q_gate[..., :dim], q_norm)
    if rounded:
        q = from_bf16(to_bf16(q)).astype(np.float64)
    out = np.zeros((n, heads, dim))
    for t in range(n):
        for h in range(heads):
            seen = slice(0, position + t + 1)
            scores = keys[h // (heads // kv_heads), seen] @ q[t, h] * dim**-0.5
            p = np.exp(scores - scores.max())
            for block in np.split(p, range(256, len(p), 256)) if rounded else ():
                top = block.max()
                block[:] = from_bf16(to_bf16(block / top)) * top
            out[t, h] = p @ values[h // (heads // kv_heads), seen] / p.sum()
    out *= sigmoid(q_gate[..., dim:].astype(np.float64))
    return out.reshape(n, -1), keys, values


def route(logits: Array, experts_per_token: int) -> tuple[Array, Array]:
    """ids [n, experts_per_token], the likeliest first (ties: the lower index), and their weights,
    divided by their sum."""
    full = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :experts_per_token]
    weights = np.take_along_axis(full, ids, -1)
    return ids, weights / weights.sum(-1, keepdims=True)


def combine(
    x: Array, expert_out: Array, expert_weights: Array, shared_out: Array, shared_gate: Array
) -> Array:
    n, k = expert_weights.shape
    wide = expert_out.astype(np.float64).reshape(n, k, -1)
    total = x + (wide * expert_weights[..., None]).sum(1)
    return np.asarray(total + sigmoid(shared_gate.astype(np.float64))[:, None] * shared_out)
