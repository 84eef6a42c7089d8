"""Every kernel of metal/, run by the executor, against numpy in float64, at small odd shapes."""

import functools
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_plans import (
    Memory,
    all_finite,
    attention,
    causal_conv,
    combine,
    embed,
    experts,
    gated_delta,
    matmul,
    rms_norm,
    route,
    run_on,
)
from gpu_references import (
    BF16,
    F16,
    F32,
    Array,
    Expert,
    attention_reference,
    causal_conv_reference,
    combine_reference,
    expert_reference,
    gated_delta_reference,
    load,
    random_attention,
    random_delta,
    random_weight,
    rms_norm_reference,
    route_reference,
    store,
)
from shader_executor import ROOT, DispatchError, Executor, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

SEEDS = (0, 1, 2)  # 0: in order
QUANTISED = [(bits, group, BF16) for bits in (2, 4, 8) for group in (32, 64, 128)]
QUANTISED += [(4, 64, F16), (4, 64, F32), (8, 32, F16)]
DENSE = [(0, 0, F32), (0, 0, F16), (0, 0, BF16)]
TOLERANCE = 1e-5  # of the reference's own scale
Run = Callable[..., list[str]]
KERNELS = {"matvec": 1 << 20, "matmul": 0}  # and decode_tokens that lead to them


@pytest.fixture(scope="session")
def executor(tmp_path_factory: pytest.TempPathFactory) -> Executor:
    # benchmarks/metal_on_cuda runs this file on a GPU, test_coverage.py with a library that
    # counts lines.
    if os.environ.get("FLASHMOE_SHADERS_ON") == "cuda":
        sys.path.insert(0, str(ROOT / "benchmarks" / "metal_on_cuda"))
        from gpu import Gpu  # noqa: PLC0415

        return Gpu()
    library = os.environ.get("FLASHMOE_SHADER_LIBRARY")
    return Executor(Path(library) if library else build(tmp_path_factory.mktemp("executor")))


def runner(executor: Executor) -> Run:
    """run(operations, seed, **tuning) on the executor; the kernels that ran."""
    return functools.partial(run_on, executor)


@pytest.fixture
def run(executor: Executor) -> Run:
    return runner(executor)


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(r: np.random.Generator, *shape: int) -> Array:
    return r.standard_normal(shape, np.float32)


def empty(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float32)


def assert_close(found: Array, expected: Array, tolerance: float = TOLERANCE) -> None:
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("form", QUANTISED + DENSE, ids=str)
def test_embed_gives_rows_of_the_table(run: Run, form: tuple[int, ...]) -> None:
    r = rng()
    table = random_weight(r, 9, 384, *form)
    ids, out = np.array([8, 0, 3], np.int32), empty(3, 384)
    run(embed(ids, table, out))
    assert_close(out, table.values()[ids], 1e-6)


@pytest.mark.parametrize("width", [1, 96, 1025, 4096])
def test_rms_norm(run: Run, width: int) -> None:
    r = rng()
    x, weight, out = normal(r, 3, width), normal(r, width), empty(3, width)
    for seed in SEEDS:
        run(rms_norm(x, weight, 1e-6, out), seed)
        assert_close(out, rms_norm_reference(x, weight, 1e-6))


@pytest.mark.parametrize("kernel", ["matvec", "matmul"])
@pytest.mark.parametrize("form", QUANTISED + DENSE, ids=str)
def test_products_of_every_format(run: Run, kernel: str, form: tuple[int, int, int]) -> None:
    r = rng()
    # One simdgroup a row (and 32 columns, less than a lane's share of each), then several.
    for seed, (tokens, columns, rows) in enumerate(
        [(3, form[1] or 32, 5), (2, 384, 67), (1, 1152, 33)]
    ):
        x = normal(r, tokens, columns)
        weight, out = random_weight(r, rows, columns, *form), empty(tokens, rows)
        assert run(matmul(x, [weight], [out], [0]), seed, decode_tokens=KERNELS[kernel]) == [kernel]
        assert_close(out, x @ weight.values().T)


@pytest.mark.parametrize("kernel", ["matvec", "matmul"])
@pytest.mark.parametrize("columns", [2048, 4096, 8192, 9216])
def test_long_rows_are_shared_by_simdgroups(run: Run, kernel: str, columns: int) -> None:
    r = rng()
    x, weight, out = normal(r, 1, columns), random_weight(r, 19, columns), empty(1, 19)
    for seed in SEEDS:
        assert run(matmul(x, [weight], [out], [0]), seed, decode_tokens=KERNELS[kernel]) == [kernel]
        assert_close(out, x @ weight.values().T)


@pytest.mark.parametrize(
    "form", [(4, 64, BF16), (2, 32, F16), (8, 128, BF16), (0, 0, F16)], ids=str
)
def test_several_quads_of_rows_for_a_simdgroup(run: Run, form: tuple[int, int, int]) -> None:
    r = rng()
    for tokens, columns, rows in [(1, 4224, 37), (2, 384, 3), (1, 31 if form[0] == 0 else 128, 64)]:
        x, weight = normal(r, tokens, columns), random_weight(r, rows, columns, *form)
        for two_quads_rows in (1, 1 << 20):
            out = empty(tokens, rows)
            run(matmul(x, [weight], [out], [0]), two_quads_rows=two_quads_rows)
            assert_close(out, x @ weight.values().T)


@pytest.mark.parametrize("kernel", ["matvec", "matmul"])
@pytest.mark.parametrize("columns", [1, 31, 97, 1500])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_odd_columns_of_dense_weights(run: Run, kernel: str, columns: int, dtype: int) -> None:
    r = rng()
    x, weight, out = normal(r, 3, columns), random_weight(r, 7, columns, 0, 0, dtype), empty(3, 7)
    assert run(matmul(x, [weight], [out], [0]), decode_tokens=KERNELS[kernel]) == [kernel]
    assert_close(out, x @ weight.values().T)


@pytest.mark.parametrize("kernel", ["matvec", "matmul"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_products_of_one_input_go_together_and_add(run: Run, kernel: str, count: int) -> None:
    r = rng()
    x = normal(r, 41, 128)
    weights = [random_weight(r, rows, 128, 4, 32) for rows in (70, 1, 130, 64)[:count]]
    add = [1, 0, 0, 1][:count]
    outs = [normal(r, 41, weight.rows) for weight in weights]
    expected = [
        x @ weight.values().T + (out if adds else 0)
        for weight, out, adds in zip(weights, outs, add, strict=True)
    ]
    assert run(matmul(x, weights, outs, add), decode_tokens=KERNELS[kernel]) == [kernel]
    for out, reference in zip(outs, expected, strict=True):
        assert_close(out, reference)


@pytest.mark.parametrize("taps", [1, 2, 4, 8])
def test_causal_conv(run: Run, taps: int) -> None:
    r = rng()
    for tokens, channels in [(1, 300), (5, 257), (2, 1)]:
        x, weight = normal(r, tokens, channels), normal(r, taps, channels)
        state, state_out = normal(r, taps - 1, channels), empty(taps - 1, channels)
        out, new_state = causal_conv_reference(x, weight, state)
        run(causal_conv(x, weight, state, state_out))
        assert_close(x, out)
        np.testing.assert_array_equal(state_out, new_state)


@pytest.mark.parametrize(
    "shape",  # tokens, key_heads, value_heads, key_dim, value_dim
    [
        (1, 1, 2, 128, 128),
        (11, 2, 4, 32, 32),
        (5, 1, 4, 64, 16),
        (4, 2, 2, 36, 100),
        (9, 1, 1, 4, 1),
    ],
)
def test_gated_delta(run: Run, shape: tuple[int, ...]) -> None:
    d = random_delta(rng(), *shape)
    reference, new_state = gated_delta_reference(d)
    for seed in SEEDS:
        state_out, out = np.full_like(d.state, np.nan), np.full_like(d.z, np.nan)
        run(gated_delta(d, state_out, out), seed)
        assert_close(out, reference)
        assert_close(state_out, new_state)


def test_gated_delta_goes_on_from_its_state(run: Run) -> None:
    d = random_delta(rng(), 7, 1, 2, 32, 32)
    reference, new_state = gated_delta_reference(d)
    state = d.state
    outs = []
    for begin, end in [(0, 3), (3, 4), (4, 7)]:
        part = random_delta(rng(), 1, 1, 2, 32, 32)
        part.__dict__.update(d.__dict__, state=state)
        for name in ("qkv", "z", "a", "b"):
            setattr(part, name, np.ascontiguousarray(getattr(d, name)[begin:end]))
        state, out = np.full_like(state, np.nan), np.full_like(part.z, np.nan)
        run(gated_delta(part, state, out))
        outs.append(out)
    assert_close(np.concatenate(outs), reference)
    assert_close(state, new_state)


SHORT = {"least_keys": 32, "enough_groups": 1 << 20}  # splits of 32 keys


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "tuning"),  # tokens, heads, kv_heads, head_dim, rotary_dim, position
    [
        ((1, 32, 2, 256, 64, 70), SHORT),  # the real model's heads, several splits
        ((1, 4, 2, 64, 16, 0), {}),  # the first token
        ((1, 4, 4, 32, 32, 33), {}),  # all of a head rotates
        ((5, 8, 1, 64, 16, 130), {"enough_groups": 1}),  # a prompt, in one split
        ((7, 3, 1, 96, 22, 61), SHORT),  # rows that are no multiple of 16; splits none of whose
        ((70, 2, 2, 64, 0, 0), SHORT),  # keys are visible to some rows; no rotation
        ((9, 4, 2, 64, 16, 40), {"longest_seconds": 1e-9}),  # a query at a time
    ],
)
def test_attention(run: Run, dtype: int, shape: tuple[int, ...], tuning: dict[str, float]) -> None:
    call = random_attention(rng(), *shape, dtype)
    out, new_keys, new_values = attention_reference(call)
    before = load(call.keys), load(call.values)
    for seed in SEEDS:
        found = np.full_like(out, np.nan, np.float32)
        run(attention(call, found), seed, **tuning)
        assert_close(found, out, 1e-5 if dtype == F32 else 2e-3)
    begin, end = call.position, call.position + len(call.k)
    for cache, old, new in zip(
        (call.keys, call.values), before, (new_keys, new_values), strict=True
    ):
        assert_close(load(cache)[:, begin:end], new, 1e-5 if dtype == F32 else 4e-3)
        rounded = load(store(new, dtype)) == load(cache)[:, begin:end]
        assert dtype == F32 or rounded.mean() > 0.99  # to nearest; float32 sums may tip a few
        np.testing.assert_array_equal(load(cache)[:, :begin], old[:, :begin])
        np.testing.assert_array_equal(load(cache)[:, end:], old[:, end:])


def test_rope_far_into_the_context(run: Run) -> None:
    call = random_attention(rng(), 1, 1, 1, 32, 32, 0, F32)
    call.position = 262143
    call.keys = np.zeros((1, 262144, 32), np.float32)
    call.values = np.zeros((1, 262144, 32), np.float32)
    _, new_keys, _ = attention_reference(call)
    run(attention(call, empty(1, 32)), enough_groups=1)
    assert_close(call.keys[:, -1:], new_keys)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("experts_", "top_k"), [(8, 4), (7, 7), (512, 10), (1024, 32), (33, 1)])
def test_route(run: Run, experts_: int, top_k: int, renormalise: bool) -> None:
    r = rng()
    logits = normal(r, 4, experts_) * 3
    logits[1] = np.round(logits[1])  # many ties: the lower index comes first
    logits[2] = 5
    ids, weights = np.full((4, top_k), -1, np.int32), empty(4, top_k)
    for seed in SEEDS:
        finite = np.full(4, -1, np.int32)
        run(route(logits, renormalise, ids, weights, finite), seed)
        assert finite.tolist() == [1, 1, 1, 1]
        expected_ids, expected_weights = route_reference(logits, top_k, renormalise)
        np.testing.assert_array_equal(ids, expected_ids)
        assert_close(weights, expected_weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_route_tells_of_logits_that_are_not_finite(run: Run, bad: float) -> None:
    """... and gives valid experts all the same."""
    ids, weights, finite = np.full((2, 4), -1, np.int32), empty(2, 4), np.full(2, -1, np.int32)
    logits = np.zeros((2, 40), np.float32)
    logits[1, 37] = bad
    run(route(logits, True, ids, weights, finite))
    assert finite.tolist() == [1, 0]
    logits = np.full((2, 40), np.nan, np.float32)
    logits.setflags(write=False)  # an input, to initcheck (gpu.py)
    run(route(logits, True, ids, weights, finite))
    assert finite.tolist() == [0, 0]
    assert np.all((ids >= 0) & (ids < 40))


def test_rows_that_are_not_finite_are_told(run: Run) -> None:
    x, finite = normal(rng(), 4, 1030), np.full(4, -1, np.int32)
    x[1, 1029], x[3, 0] = np.inf, np.nan
    run(all_finite(x, finite))
    assert finite.tolist() == [1, 0, 1, 0]


EXPERT_FORMATS = [*itertools.product([(4, 64, BF16)], [(4, 64, BF16)])]
EXPERT_FORMATS += [((2, 32, BF16), (4, 32, F16)), ((8, 64, F16), (8, 64, F16))]
EXPERT_FORMATS += [((0, 0, BF16), (0, 0, BF16)), ((4, 32, BF16), (0, 0, F32))]


LISTS = {False: 1 << 20, True: 0}  # decode_tokens


@pytest.mark.parametrize("tiles", [False, True], ids=["decode", "prompt"])
@pytest.mark.parametrize(("first", "down"), EXPERT_FORMATS, ids=str)
def test_experts(run: Run, tiles: bool, first: tuple[int, ...], down: tuple[int, ...]) -> None:
    """Experts of different width and number of tokens, two outputs, one dispatch each."""
    r = rng()
    hidden, tokens = 192, 41
    x = normal(r, tokens, hidden)
    unasked = np.float32(1e30)
    outs = [empty(tokens, hidden), np.full((7, hidden), unasked)]
    lists = [(range(tokens), range(tokens), 0), ([40], [6], 1), ([3, 1, 0], [0, 5, 2], 1)]
    calls = []
    for (of_expert, rows, out), width in zip(lists, (64, 192, 128), strict=True):
        matrices = [random_weight(r, width, hidden, *first) for _ in range(2)]
        matrices.append(random_weight(r, hidden, width, *down))
        calls.append(Expert(*matrices, of_expert, rows, outs[out]))
    for two_quads_rows in (1, 1 << 20):
        kernels = run(experts(x, calls), decode_tokens=LISTS[tiles], two_quads_rows=two_quads_rows)
        assert kernels[0].endswith("_tiles") == tiles
        for call in calls:
            assert_close(call.out[list(call.out_rows)], expert_reference(x, call))
    assert np.all(outs[1][[1, 3, 4]] == unasked)


@pytest.mark.parametrize("tiles", [False, True], ids=["decode", "prompt"])
def test_gate_and_up_of_different_formats(run: Run, tiles: bool) -> None:
    r = rng()
    x, out = normal(r, 2, 96), empty(2, 96)
    gate, up = random_weight(r, 50, 96, 4, 32), random_weight(r, 50, 96, 0, 0, F16)
    call = Expert(gate, up, random_weight(r, 96, 50, 0, 0, F32), [1, 0], [0, 1], out)
    run(experts(x, [call]), decode_tokens=LISTS[tiles])
    assert_close(out, expert_reference(x, call))


def test_wide_experts_of_decode(run: Run) -> None:
    """Rows that several simdgroups share, as the real model has them."""
    r = rng()
    x, out = normal(r, 1, 4096), empty(2, 4096)
    calls = []
    for row in range(2):
        matrices = [random_weight(r, 32, 4096), random_weight(r, 32, 4096)]
        calls.append(Expert(*matrices, random_weight(r, 4096, 32, 4, 32), [0], [row], out))
    run(experts(x, calls))
    for call in calls:
        assert_close(call.out[list(call.out_rows)], expert_reference(x, call))


@pytest.mark.parametrize("hidden", [96, 1030])
def test_combine_adds_to_the_stream_and_norms_it(run: Run, hidden: int) -> None:
    r = rng()
    tokens, top_k = 2, 3
    x, norm = normal(r, tokens, hidden), normal(r, hidden)
    parts = normal(r, tokens * top_k, hidden), normal(r, tokens, top_k), normal(r, tokens, hidden)
    gate = normal(r, tokens)
    expected = combine_reference(x, *parts, gate)
    for seed in SEEDS:
        plain, with_norm, normed = x.copy(), x.copy(), empty(tokens, hidden)
        run(combine(plain, *parts, gate), seed)
        run(combine(with_norm, *parts, gate, norm, normed), seed)
        assert_close(plain, expected)
        assert_close(with_norm, expected)
        assert_close(normed, rms_norm_reference(expected, norm, 1e-6))


def test_more_experts_than_a_dispatch_holds(run: Run) -> None:
    r = rng()
    x, out = normal(r, 3, 32), empty(35, 32)
    matrices = [random_weight(r, 32, 32, 4, 32) for _ in range(3)]
    calls = [Expert(*matrices, [row % 3], [row], out) for row in range(35)]
    assert run(experts(x, calls)) == ["experts_gate_up", "experts_down"] * 2
    for call in calls:
        assert_close(call.out[list(call.out_rows)], expert_reference(x, call))


def test_no_dispatch_takes_long(run: Run) -> None:
    """A long prompt is sliced: products by tokens, attention by queries, experts by expert."""
    r = rng()
    x, weight, out = normal(r, 112, 64), random_weight(r, 80, 64), empty(112, 80)
    assert run(matmul(x, [weight], [out], [0]), longest_seconds=1e-9) == ["matmul"] * 4
    assert_close(out, x @ weight.values().T)
    matrices = [random_weight(r, 64, 64) for _ in range(3)]
    outs = empty(20, 64)
    calls = [Expert(*matrices, range(10), range(i * 10, i * 10 + 10), outs) for i in range(2)]
    assert len(run(experts(x[:10].copy(), calls), longest_seconds=1e-9)) == 4
    for call in calls:
        assert_close(outs[list(call.out_rows)], expert_reference(x, call))


def test_what_the_executor_refuses(executor: Executor) -> None:
    if not isinstance(executor, Executor):
        pytest.skip("a GPU does not check its dispatches as the executor does")
    r = rng()
    x, weight, out = normal(r, 2, 64), normal(r, 64), empty(2, 64)
    memory = Memory(executor)
    (plan,) = memory.plans(rms_norm(x, weight, 1e-6, out))
    grid, threads, arguments = plan.grid, plan.threads, plan.arguments

    def fails(match: str, *dispatch: Any) -> None:
        with pytest.raises(DispatchError, match=match):
            executor.dispatch(*dispatch)

    fails("nothing is bound at index 0", "rms_norm", grid, threads, b"")
    fails(
        "4 bytes are bound at index 0, where the argument has 32",
        "rms_norm",
        grid,
        threads,
        bytes(4),
    )
    fails("past the end of an array of 512", "rms_norm", (3, 1, 1), threads, arguments)
    fails("outside every buffer", "rms_norm", grid, threads, bytes(16) + arguments[16:])
    fails("a multiple of 32 up to 1024", "rms_norm", grid, 100, arguments)
    fails("a multiple of 32 up to 1024", "rms_norm", grid, 2048, arguments)
    fails("a multiple of 32 up to 128", "matvec", grid, 256, arguments)
    fails("empty grid", "rms_norm", (0, 1, 1), threads, arguments)
    fails("no such kernel", "rms_nrom", grid, threads, arguments)
    (plan,) = memory.plans(embed(np.zeros(1, np.int32), random_weight(r, 2, 64), empty(1, 64)))
    fails("function constant 1 has no value", "embed", plan.grid, plan.threads, plan.arguments, [4])
    memory.free()
