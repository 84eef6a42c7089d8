"""Every operation of the CPU backend against numpy in float64, on every instruction set here."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import numpy as np
import pytest

from flashmoe import _native
from flashmoe.measure.reference import (
    attention,
    from_bf16,
    gated_delta,
    sigmoid,
    silu,
    store,
    to_bf16,
)

ops = _native.ops
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = ("portable", "avx2", "avx-vnni", "avx512", "avx512-bf16") if X86 else tuple(ops.isas())
THREADS = 2


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    if request.param not in ops.isas():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("FLASHMOE_ISA", request.param)
    return request.param


def backend(precision="float32", threads=THREADS):
    return ops.Backend(precision, threads)


def close(actual, expected, tolerance=2e-5):
    """Largest error within `tolerance` of the largest value, so that cancellation is no failure."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max(initial=0)
    assert error <= tolerance * np.abs(expected).max(initial=1e-30), error


# Element types and the affine format


@dataclass
class Weight:
    native: object
    values: np.ndarray  # float64 [rows, cols]
    q: np.ndarray | None = None
    scales: np.ndarray | None = None
    biases: np.ndarray | None = None
    group: int = 0


def misalign(array):
    """The same bytes at an address that is a multiple of 2 and of nothing larger."""
    raw = array.tobytes()
    room = np.zeros(len(raw) + 64, np.uint8)
    start = (-room.ctypes.data) % 64 + 2
    room[start : start + len(raw)] = np.frombuffer(raw, np.uint8)
    return room[start : start + len(raw)]


def dense(rng, rows, cols, dtype="F32"):
    stored, values = store(rng.standard_normal((rows, cols)) / np.sqrt(cols), dtype)
    return Weight(ops.Matrix(rows, cols, dtype, [misalign(stored)]), values)


def quantized(rng, rows, cols, bits=4, group=64, dtype="BF16"):
    q = rng.integers(0, 2**bits, (rows, cols), dtype=np.uint32)
    step = rng.standard_normal((rows, cols // group)) / np.sqrt(cols) / 2 ** (bits - 1)
    s, scales = store(step, dtype)
    b, biases = store(-step * 2 ** (bits - 1) * rng.uniform(0.5, 1.5, step.shape), dtype)
    each = 32 // bits
    shifts = np.arange(each, dtype=np.uint32) * bits
    words = (q.reshape(rows, -1, each) << shifts).sum(-1, dtype=np.uint32)
    values = q * np.repeat(scales, group, 1) + np.repeat(biases, group, 1)
    parts = [misalign(words), misalign(s), misalign(b)]
    native = ops.Matrix(rows, cols, dtype, parts, bits, group)
    return Weight(native, values, q, scales, biases, group)


FORMATS = [(bits, group) for bits in (2, 4, 8) for group in (32, 64, 128)]
TOKENS = [1, 3, 64, 65]


# Products


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 8), (5, 33), (37, 64), (19, 1100)])
def test_dense_product(isa, dtype, rows, cols):
    rng = np.random.default_rng(rows)
    weight = dense(rng, rows, cols, dtype)
    for n in TOKENS:
        x = rng.standard_normal((n, cols), np.float32)
        for precision in ("float32", "int8"):  # dense weights keep float32 inputs
            (out,) = backend(precision).matmul(x, [weight.native])
            close(out, x @ weight.values.T)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_quantized_product_with_float32_inputs(isa, bits, group, dtype):
    rng = np.random.default_rng(bits * group)
    for rows, groups in ((3, 1), (21, 9)):
        weight = quantized(rng, rows, groups * group, bits, group, dtype)
        for n in TOKENS:
            x = rng.standard_normal((n, groups * group), np.float32)
            (out,) = backend().matmul(x, [weight.native])
            close(out, x @ weight.values.T)


def int8_product(x, weight):
    """The product with 8-bit inputs as it is defined: integer sums of a group, then float32."""
    f = np.float32
    n, cols = x.shape
    rows, group = weight.q.shape[0], weight.group
    groups = cols // group
    by_group = x.reshape(n, groups, group)
    largest = np.abs(by_group).max(-1)
    inverse = np.where(largest > 1e-30, f(127) / np.maximum(largest, f(1e-30)), f(0)).astype(f)
    q = np.rint(by_group * inverse[..., None]).astype(np.int64)
    scales = largest / f(127)
    sums = q.sum(-1).astype(f)
    dots = np.einsum("ngi,rgi->nrg", q, weight.q.reshape(rows, groups, group).astype(np.int64))
    terms = weight.scales.astype(f) * dots.astype(f) + weight.biases.astype(f) * sums[:, None, :]
    terms = terms * scales[:, None, :]
    partial = np.zeros((n, rows, 16), f)
    for g in range(groups):
        partial[:, :, g % 16] += terms[:, :, g]
    for half in (8, 4, 2, 1):
        partial = partial[..., :half] + partial[..., half : 2 * half]
    assert partial.dtype == f
    return partial[..., 0]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_int8_product_is_the_defined_one_to_the_bit(isa, bits, group, dtype):
    rng = np.random.default_rng(bits + group)
    for rows, groups in ((1, 1), (3, 3), (17, 8), (53, 16), (36, 37)):
        weight = quantized(rng, rows, groups * group, bits, group, dtype)
        for n in TOKENS:
            x = rng.standard_normal((n, groups * group), np.float32)
            (out,) = backend("int8").matmul(x, [weight.native])
            np.testing.assert_array_equal(out, int8_product(x, weight))


@pytest.mark.parametrize("rows", [16, 32, 48, 53])
def test_int8_product_of_any_number_of_tokens_is_the_defined_one(isa, rows):
    rng = np.random.default_rng(rows)
    weight = quantized(rng, rows, 17 * 64)
    x = rng.standard_normal((40, 17 * 64), np.float32)
    expected = int8_product(x, weight)
    for n in range(1, 41):
        (out,) = backend("int8").matmul(x[:n], [weight.native])
        np.testing.assert_array_equal(out, expected[:n])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_int8_product_of_extreme_values_does_not_saturate(isa, bits):
    rng = np.random.default_rng(bits)
    weight = quantized(rng, 20, 512, bits, 128)
    full = np.full(weight.q.shape, 2**bits - 1, np.uint32)
    words = np.full((20, 512 * bits // 32), 0xFFFFFFFF, np.uint32)
    scales, biases = to_bf16(weight.scales), to_bf16(weight.biases)
    weight.native = ops.Matrix(20, 512, "BF16", [words, scales, biases], bits, 128)
    weight.q = full
    for n in (1, 9, 40):
        signs = np.where(rng.random((n, 512)) < 0.1, -1, 1).astype(np.float32)
        for x in (signs, np.ones((n, 512), np.float32), -np.ones((n, 512), np.float32)):
            (out,) = backend("int8").matmul(x, [weight.native])
            np.testing.assert_array_equal(out, int8_product(x, weight))


@pytest.mark.parametrize(("bits", "group"), FORMATS)
def test_int8_product_is_near_the_exact_one(isa, bits, group):
    rng = np.random.default_rng(7)
    weight = quantized(rng, 64, 16 * group, bits, group)
    x = rng.standard_normal((4, 16 * group), np.float32)
    (out,) = backend("int8").matmul(x, [weight.native])
    exact = x @ weight.values.T
    # Rounding to 1/127 of a group's largest value: about 0.7% of an input's deviation.
    assert np.sqrt(np.mean((out - exact) ** 2)) < 0.01 * exact.std()


def test_int8_product_carries_nan_infinity_and_zero(isa):
    rng = np.random.default_rng(8)
    weight = quantized(rng, 4, 256)
    x = np.zeros((3, 256), np.float32)
    x[1, 70] = np.nan
    x[2, 200] = np.inf
    (out,) = backend("int8").matmul(x, [weight.native])
    assert (out[0] == 0).all()
    assert np.isnan(out[1]).all()
    assert not np.isfinite(out[2]).any()


@pytest.mark.parametrize("groups", [8, 17])
def test_int8_product_of_many_tokens_keeps_what_is_not_finite_to_itself(isa, groups):
    rng = np.random.default_rng(groups)
    weight = quantized(rng, 53, 64 * groups)
    x = rng.standard_normal((9, 64 * groups), np.float32)
    expected = int8_product(x, weight)
    x[3, 70] = np.nan
    x[8, 200] = np.inf
    (out,) = backend("int8").matmul(x, [weight.native])
    assert np.isnan(out[3]).all()
    assert not np.isfinite(out[8]).any()
    others = [0, 1, 2, 4, 5, 6, 7]
    np.testing.assert_array_equal(out[others], expected[others])


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_one_input_serves_matrices_of_several_formats(isa, precision):
    rng = np.random.default_rng(3)
    weights = [
        quantized(rng, 130, 512),
        quantized(rng, 1, 512, 8, 64),
        dense(rng, 7, 512, "BF16"),
        quantized(rng, 40, 512, 4, 32, "F16"),
    ]
    x = rng.standard_normal((5, 512), np.float32)
    outs = backend(precision).matmul(x, [weight.native for weight in weights])
    for out, weight in zip(outs, weights, strict=True):
        close(out, x @ weight.values.T, 2e-5 if precision == "float32" else 0.02)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_product_is_added_to_what_the_output_holds(isa, precision):
    rng = np.random.default_rng(4)
    weight = quantized(rng, 50, 256)
    x = rng.standard_normal((20, 256), np.float32)
    start = rng.standard_normal((20, 50), np.float32)
    total = start.copy()
    engine = backend(precision)
    engine.matmul_add(x, weight.native, total)
    np.testing.assert_array_equal(total, start + engine.matmul(x, [weight.native])[0])


# Experts


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(("width", "make"), [(64, quantized), (192, quantized), (41, dense)])
def test_experts(isa, precision, width, make):
    rng = np.random.default_rng(width)
    n, hidden, count = 70, 128, 5
    x = rng.standard_normal((n, hidden), np.float32)
    rows = rng.permutation(3 * n).astype(np.int32)
    expected = np.zeros((3 * n, hidden))
    calls, used = [], 0
    for expert in range(count):
        gate, up, down = (
            make(rng, width, hidden),
            make(rng, width, hidden),
            make(rng, hidden, width),
        )
        tokens = np.flatnonzero(rng.random(n) < (0.3, 0.02, 0.6, 0, 1)[expert]).astype(np.int32)
        out_rows = rows[used : used + len(tokens)]
        used += len(tokens)
        calls.append((gate.native, up.native, down.native, tokens, out_rows))
        chosen = x[tokens]
        inner = silu(chosen @ gate.values.T) * (chosen @ up.values.T)
        expected[out_rows] = inner @ down.values.T
    actual = backend(precision).experts(x, calls, 3 * n)
    close(actual, expected, 2e-5 if precision == "float32" or make is dense else 0.03)
    one_by_one = sum(backend(precision, 1).experts(x, [call], 3 * n) for call in calls)
    np.testing.assert_array_equal(actual, one_by_one)


def test_experts_of_another_format_than_the_shared_one(isa):
    rng = np.random.default_rng(11)
    x = rng.standard_normal((1, 256), np.float32)
    calls, expected = [], []
    for row, (bits, group) in enumerate([(4, 64), (2, 128), (8, 32)]):
        gate, up = (quantized(rng, 128, 256, bits, group) for _ in range(2))
        down = quantized(rng, 256, 128, bits, group)
        calls.append((gate.native, up.native, down.native, np.int32([0]), np.int32([row])))
        inner = silu(x @ gate.values.T) * (x @ up.values.T)
        expected.append((inner @ down.values.T)[0])
    close(backend("int8").experts(x, calls, 3), expected, 0.03)


# The other operations


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_embed(isa, dtype):
    rng = np.random.default_rng(0)
    ids = np.int32([3, 0, 3, 6])
    plain = dense(rng, 7, 72, dtype)
    close(backend().embed(plain.native, ids), plain.values[ids], 1e-7)
    for bits, group in FORMATS:
        table = quantized(rng, 7, 3 * group, bits, group, dtype)
        close(backend().embed(table.native, ids), table.values[ids], 1e-6)


@pytest.mark.parametrize("width", [8, 33, 2048])
def test_rms_norm(isa, width):
    rng = np.random.default_rng(width)
    x = rng.standard_normal((3, width), np.float32)
    weight = rng.standard_normal(width, np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6) * weight
    close(backend().rms_norm(x, weight, 1e-6), expected, 1e-6)


@pytest.mark.parametrize("kernel", [2, 4, 5])
@pytest.mark.parametrize("channels", [6, 96, 1000])
@pytest.mark.parametrize("n", TOKENS)
def test_causal_conv(isa, n, channels, kernel):
    rng = np.random.default_rng(channels)
    x = rng.standard_normal((n, channels), np.float32)
    weight = rng.standard_normal((kernel, channels), np.float32)
    state = rng.standard_normal((kernel - 1, channels), np.float32)
    out, after = backend().causal_conv(x, weight, state)
    line = np.concatenate([state, x]).astype(np.float64)
    close(out, silu(sum(weight[k] * line[k : k + n] for k in range(kernel))), 1e-6)
    np.testing.assert_array_equal(after, line[-(kernel - 1) :].astype(np.float32))


def delta_inputs(n, key_heads, heads, dk, dv):
    rng = np.random.default_rng(n + heads + dk)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    return {
        "qkv": draw(n, 2 * key_heads * dk + heads * dv),
        "z": draw(n, heads * dv),
        "a": draw(n, heads),
        "b": draw(n, heads),
        "a_log": np.log(rng.uniform(0.1, 8, heads)).astype(np.float32),
        "dt_bias": draw(heads),
        "norm": draw(dv),
        "state": draw(heads, dk, dv),
        "key_heads": key_heads,
        "eps": 1e-6,
    }


@pytest.mark.parametrize(
    ("key_heads", "heads", "dk", "dv"),
    [(1, 1, 8, 8), (2, 4, 16, 24), (1, 4, 33, 40), (2, 2, 128, 128), (3, 6, 24, 72)],
)
@pytest.mark.parametrize("n", TOKENS)
def test_gated_delta(isa, n, key_heads, heads, dk, dv):
    inputs = delta_inputs(n, key_heads, heads, dk, dv)
    out, state = backend().gated_delta(**inputs)
    expected, expected_state = gated_delta(**inputs)
    close(out, expected)
    close(state, expected_state)


def attention_inputs(n, heads, kv_heads, dim, dtype, position):
    rng = np.random.default_rng(n + heads + dim)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    capacity = position + n + 5
    keys, values = draw(kv_heads, capacity, dim), draw(kv_heads, capacity, dim)
    if dtype == "BF16":
        keys, values = to_bf16(keys), to_bf16(values)
    # What lies past the position must not matter.
    for cache in (keys, values):
        cache[:, position:] = 0x7FC0 if dtype == "BF16" else np.nan
    return {
        "q_gate": draw(n, heads, 2 * dim),
        "k": draw(n, kv_heads, dim),
        "v": draw(n, kv_heads, dim),
        "q_norm": draw(dim),
        "k_norm": draw(dim),
        "keys": keys,
        "values": values,
        "position": position,
    }


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "rotary"),
    [(1, 1, 8, 2), (4, 2, 24, 12), (6, 1, 40, 40), (8, 4, 16, 4), (16, 2, 256, 64)],
)
@pytest.mark.parametrize(("n", "position"), [(1, 0), (1, 700), (3, 255), (65, 0), (65, 500)])
def test_attention(isa, n, position, heads, kv_heads, dim, rotary, dtype):
    inputs = attention_inputs(n, heads, kv_heads, dim, dtype, position)
    rope = {"rotary_dim": rotary, "rope_theta": 1e4, "eps": 1e-6}
    rounded = isa == "avx512-bf16" and dtype == "BF16"
    expected, keys, values = attention(**inputs, **rope, rounded=rounded)
    out = backend().attention(**inputs, **rope)
    # What falls on the other side of a bfloat16 rounding than the reference's moves the rest.
    close(out, expected, {"F32": 3e-5, "BF16": 2e-3}[dtype])
    seen = slice(0, position + n)
    for cache, reference in ((inputs["keys"], keys), (inputs["values"], values)):
        stored = from_bf16(cache) if dtype == "BF16" else cache
        close(stored[:, seen], reference[:, seen], 1e-5 if dtype == "F32" else 2**-8)
        assert np.isnan(stored[:, position + n :]).all()


def test_route(isa):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((9, 37), np.float32) * 3
    logits[4, 5:20] = 7.0  # ties: the lower index first
    full = np.exp(logits.astype(np.float64))
    full /= full.sum(-1, keepdims=True)
    for top_k in (1, 4, 37):
        order = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
        expected = np.take_along_axis(full, order, -1)
        ids, weights = backend().route(logits, top_k, False)
        np.testing.assert_array_equal(ids, order)
        close(weights, expected, 1e-6)
        ids, weights = backend().route(logits, top_k, True)
        np.testing.assert_array_equal(ids, order)
        close(weights, expected / expected.sum(-1, keepdims=True), 1e-6)


def test_route_of_nan_names_experts_that_exist(isa):
    logits = np.full((2, 12), np.nan, np.float32)
    logits[1, 3] = 1
    ids, _ = backend().route(logits, 4, True)
    for row in ids:
        assert sorted(set(row)) == sorted(row)
        assert set(row) <= set(range(12))


@pytest.mark.parametrize("hidden", [8, 72, 1000])
def test_combine(isa, hidden):
    rng = np.random.default_rng(hidden)
    n, k = 5, 3
    x, shared = rng.standard_normal((2, n, hidden), np.float32)
    experts = rng.standard_normal((n * k, hidden), np.float32)
    weights = rng.random((n, k), np.float32)
    gate = rng.standard_normal(n, np.float32)
    expected = x + np.einsum("nk,nkh->nh", weights, experts.reshape(n, k, hidden))
    expected = expected + sigmoid(gate)[:, None] * shared
    close(backend().combine(x, experts, weights, shared, gate), expected, 1e-6)


# Results do not depend on how tokens are divided into calls, nor on threads


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_products_do_not_depend_on_batching_or_threads(isa, precision):
    rng = np.random.default_rng(5)
    weights = [
        quantized(rng, 333, 1152, 4, 64),
        quantized(rng, 70, 1152, 2, 32),
        quantized(rng, 33, 1152, 8, 128),
        dense(rng, 61, 1152, "BF16"),
    ]
    x = rng.standard_normal((65, 1152), np.float32)
    for weight in weights:
        (whole,) = backend(precision).matmul(x, [weight.native])
        for threads in (1, 2, 3):
            engine = backend(precision, threads)
            (again,) = engine.matmul(x, [weight.native])
            np.testing.assert_array_equal(whole, again)
            for size in (1, 2, 7, 17, 64):
                (part,) = engine.matmul(x[:size], [weight.native])
                np.testing.assert_array_equal(whole[:size], part)
            (last,) = engine.matmul(x[64:], [weight.native])
            np.testing.assert_array_equal(whole[64:], last)


@pytest.mark.parametrize("sizes", [(1,) * 65, (64, 1), (3, 20, 42)])
def test_gated_delta_does_not_depend_on_batching_or_threads(isa, sizes):
    inputs = delta_inputs(65, 2, 4, 33, 72)
    whole, end = backend().gated_delta(**inputs)
    engine, state, begin = backend(threads=1), inputs["state"], 0
    for size in sizes:
        part = {name: inputs[name][begin : begin + size] for name in ("qkv", "z", "a", "b")}
        out, state = engine.gated_delta(**{**inputs, **part, "state": state})
        np.testing.assert_array_equal(whole[begin : begin + size], out)
        begin += size
    np.testing.assert_array_equal(end, state)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("sizes", [(1,) * 65, (64, 1), (3, 20, 42)])
def test_attention_does_not_depend_on_batching_or_threads(isa, sizes, dtype):
    rope = {"rotary_dim": 8, "rope_theta": 1e6, "eps": 1e-6}
    inputs = attention_inputs(65, 6, 2, 40, dtype, 480)
    pieces = attention_inputs(65, 6, 2, 40, dtype, 480)
    whole = backend().attention(**inputs, **rope)
    for threads in (1, 2):
        engine, begin = backend(threads=threads), 0
        for size in sizes:
            part = {name: pieces[name][begin : begin + size] for name in ("q_gate", "k", "v")}
            out = engine.attention(**{**pieces, **part, "position": 480 + begin}, **rope)
            np.testing.assert_array_equal(whole[begin : begin + size], out)
            begin += size
    np.testing.assert_array_equal(inputs["keys"], pieces["keys"])
    np.testing.assert_array_equal(inputs["values"], pieces["values"])


@pytest.mark.parametrize("n", [1, 3])
def test_attention_to_a_long_context_does_not_depend_on_threads(n):
    """Longer than what threads take in one round of keys, for which they have memory."""
    rope = {"rotary_dim": 8, "rope_theta": 1e6, "eps": 1e-6}
    inputs = attention_inputs(n, 6, 2, 8, "F32", 30000)
    whole = backend(threads=1).attention(**inputs, **rope)
    for threads in (2, 3):
        np.testing.assert_array_equal(whole, backend(threads=threads).attention(**inputs, **rope))


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FLASHMOE_ISA", "pentium")
    with pytest.raises(ValueError, match=r"pentium.*portable"):
        backend()


def test_backend_refuses_no_threads():
    with pytest.raises(ValueError, match="threads must be at least 1"):
        backend(threads=0)
