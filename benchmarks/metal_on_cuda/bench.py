"""Checks and times the Metal kernels on an NVIDIA GPU, at the shapes of Qwen3.5-397B-A17B.

    python benchmarks/metal_on_cuda/bench.py            # everything
    python benchmarks/metal_on_cuda/bench.py --matvec   # the products of decoding only

Every result is compared with numpy in float64; `error` is the largest difference as a share of the
largest value. Times are medians of replays of a CUDA graph, in which the weights take turns among
copies that together exceed the L2 cache. `of copy` is the bandwidth (weights and what else a kernel
must read and write, once) as a share of that of a device-to-device copy measured in the same run.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests" / "metal")]

import numpy as np  # noqa: E402
import shader_dispatch as ops  # noqa: E402
from gpu import Gpu, Uploads  # noqa: E402
from shader_dispatch import BF16, Dispatch, Expert, Weight, random_weight  # noqa: E402

Array = np.ndarray[Any, Any]
HIDDEN, INTERMEDIATE, EXPERTS, VOCAB = 4096, 1024, 512, 248320
KEY_HEADS, VALUE_HEADS, HEAD_DIM = 16, 64, 128
CHANNELS = (2 * KEY_HEADS + VALUE_HEADS) * HEAD_DIM
L2_BYTES = 60e6

gpu = Gpu()
rng = np.random.default_rng(1)
failures: list[str] = []


def normal(*shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def empty(*shape: int) -> Array:
    return np.full(shape, np.nan, np.float32)


def copy_bandwidth() -> float:
    """Bytes read and written a second."""
    size = 4 << 30
    source, to = gpu.allocate(size), gpu.allocate(size)
    seconds = gpu.seconds(lambda: gpu.copy(to, source, size))
    gpu.free(source)
    gpu.free(to)
    return 2 * size / seconds


def error_of(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


class Bench:
    """One line of the table: what is computed, its error and its time."""

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth = bandwidth
        print(f"{'':42} {'error':>8} {'µs':>9} {'MB':>8} {'GB/s':>6} {'of copy':>8}", flush=True)

    def line(
        self,
        name: str,
        dispatches: Dispatch | Sequence[Dispatch],
        moved: float,
        check: Callable[[], float],
        tolerance: float = 1e-5,
    ) -> None:
        """moved: bytes. check: the error, once the arrays hold results."""
        if isinstance(dispatches, Dispatch):
            dispatches = [dispatches]
        uploads = Uploads(gpu)
        pointers = [uploads.pointers(d) for d in dispatches]
        for d, p in zip(dispatches, pointers, strict=True):
            gpu.launch(d, p)
        gpu.synchronize()
        uploads.download()
        error = check()
        if not error <= tolerance:
            failures.append(f"{name}: error {error:.1e}")

        # Large arrays, which are the weights and caches, take turns with copies of themselves.
        sizes = {
            p[i]: a.nbytes
            for d, p in zip(dispatches, pointers, strict=True)
            for i, a in d.buffers.items()
            if i in p and a.nbytes > 1 << 18
        }
        total = sum(sizes.values())
        copies = int(np.clip(4 * L2_BYTES / total, 1, 64)) if total else 1
        turns = [pointers]
        made = []
        for _ in range(copies - 1):
            other = {pointer: gpu.allocate(size) for pointer, size in sizes.items()}
            for pointer, size in sizes.items():
                gpu.copy(other[pointer], pointer, size)
            made += other.values()
            turns.append([{i: other.get(q, q) for i, q in p.items()} for p in pointers])
        rounds = max(1, 20 // copies)

        def work() -> None:
            for _ in range(rounds):
                for turn in turns:
                    for d, p in zip(dispatches, turn, strict=True):
                        gpu.launch(d, p)

        seconds = gpu.seconds(work) / (rounds * copies)
        for pointer in made:
            gpu.free(pointer)
        uploads.free()
        speed = moved / seconds
        print(
            f"{name:42} {error:8.1e} {seconds * 1e6:9.1f} {moved / 1e6:8.1f} {speed / 1e9:6.0f} "
            f"{speed / self.bandwidth:8.1%}",
            flush=True,
        )


def bytes_of(*weights: Weight) -> int:
    return sum(
        w.weight.nbytes + (w.scales.nbytes + w.biases.nbytes) * (w.bits > 0) for w in weights
    )


def some_rows(weight: Weight, count: int) -> tuple[Array, Weight]:
    """Random rows of a weight, the last among them."""
    rows = np.append(rng.choice(weight.rows, min(count, weight.rows) - 1), weight.rows - 1)
    parts = (weight.weight, weight.scales, weight.biases)
    picked = [part[rows] if len(part) == weight.rows else part for part in parts]
    return rows, Weight(len(rows), weight.columns, *weight.format, *picked)


def product(bench: Bench, kernel: str, tokens: int, rows: int, columns: int, *form: int) -> None:
    weight = random_weight(rng, rows, columns, *form)
    x, out = normal(tokens, columns), empty(tokens, rows)
    dispatch = ops.product(kernel, x, [weight], [out], [0])

    def check() -> float:
        picked, part = some_rows(weight, 4096)
        return error_of(out[:, picked], x @ part.values().T)

    bits, group, dtype = weight.format
    label = f"{bits}-bit/{group}" if bits else ("f32", "f16", "bf16")[dtype]
    name = f"{kernel} {label} {rows}x{columns}" + (f", {tokens} tokens" if tokens > 1 else "")
    bench.line(name, dispatch, bytes_of(weight) + x.nbytes + out.nbytes, check)


def random_experts(
    count: int, lists: Sequence[Sequence[int]], outs: Sequence[Array]
) -> list[Expert]:
    """Experts of the real shape; the i-th takes the tokens lists[i] to consecutive rows."""
    calls = []
    row = 0
    for tokens, out in zip(lists, outs, strict=True):
        shapes = [(INTERMEDIATE, HIDDEN), (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
        matrices = [random_weight(rng, *shape) for shape in shapes]
        calls.append(Expert(*matrices, tokens, range(row, row + len(tokens)), out))
        row += len(tokens)
    assert len(calls) == count
    return calls


def expert_bytes(calls: Sequence[Expert]) -> int:
    return sum(bytes_of(call.gate, call.up, call.down) for call in calls)


def experts_of_decode(bench: Bench, top_k: int) -> None:
    x, out = normal(1, HIDDEN), empty(top_k, HIDDEN)
    calls = random_experts(top_k, [[0]] * top_k, [out] * top_k)
    dispatches = ops.experts(x, calls, tiles=False)

    def check() -> float:
        return error_of(out, np.concatenate([ops.expert_reference(x, c) for c in calls]))

    moved = expert_bytes(calls) + x.nbytes + out.nbytes
    bench.line(f"experts, K={top_k}", dispatches, moved, check)


def experts_of_prompt(bench: Bench, count: int, tokens: int) -> None:
    x, out = normal(tokens, HIDDEN), empty(count * tokens, HIDDEN)
    calls = random_experts(count, [list(range(tokens))] * count, [out] * count)
    dispatches = ops.experts(x, calls, tiles=True)

    def check() -> float:
        found = out[: 2 * tokens]
        return error_of(found, np.concatenate([ops.expert_reference(x, c) for c in calls[:2]]))

    moved = expert_bytes(calls) + x.nbytes + out.nbytes
    bench.line(f"experts of a prompt, {count} x {tokens} tokens", dispatches, moved, check)


def delta(bench: Bench, tokens: int) -> None:
    d = ops.random_delta(rng, tokens, KEY_HEADS, VALUE_HEADS, HEAD_DIM, HEAD_DIM)
    state_out, out = np.full_like(d.state, np.nan), np.full_like(d.z, np.nan)

    def check() -> float:
        reference, state = ops.gated_delta_reference(d)
        return max(error_of(out, reference), error_of(state_out, state))

    moved = 2 * d.state.nbytes + d.qkv.nbytes + d.z.nbytes + out.nbytes
    bench.line(f"gated_delta, {tokens} tokens", ops.gated_delta(d, state_out, out), moved, check)


def conv(bench: Bench, tokens: int) -> None:
    x, weight, state = normal(tokens, CHANNELS), normal(4, CHANNELS), normal(3, CHANNELS)
    state_out, before = empty(3, CHANNELS), x.copy()
    dispatch = ops.causal_conv(x, weight, state, state_out)
    moved = 2 * x.nbytes + 2 * state.nbytes + weight.nbytes
    bench.line(
        f"causal_conv, {tokens} tokens",
        dispatch,
        moved,
        lambda: error_of(x, ops.causal_conv_reference(before, weight, state)[0]),
    )


def attention(bench: Bench, tokens: int, position: int, keys_per_split: int) -> None:
    call = ops.random_attention(rng, tokens, 32, 2, 256, 64, position, BF16)
    reference = ops.attention_reference(call)[0]
    out = empty(tokens, 32 * 256)
    dispatches = ops.attention(call, keys_per_split, out)
    moved = call.keys.nbytes + call.values.nbytes + call.q_gate.nbytes + out.nbytes
    name = f"attention, {tokens} tokens at {position}, splits of {keys_per_split}"
    bench.line(name, dispatches, moved, lambda: error_of(out, reference), 3e-3)


def small(bench: Bench) -> None:
    x, weight, out = normal(1, HIDDEN), normal(HIDDEN), empty(1, HIDDEN)
    bench.line(
        "rms_norm",
        ops.rms_norm(x, weight, 1e-6, out),
        3 * x.nbytes,
        lambda: error_of(out, ops.rms_norm_reference(x, weight, 1e-6)),
    )
    logits, ids, weights = normal(1, EXPERTS), np.zeros((1, 10), np.int32), empty(1, 10)

    def check_route() -> float:
        expected_ids, expected = ops.route_reference(logits, 10, True)
        return 1.0 if np.any(ids != expected_ids) else error_of(weights, expected)

    bench.line(
        "route, 512 experts", ops.route(logits, True, ids, weights), logits.nbytes, check_route
    )
    table = random_weight(rng, VOCAB // 8, HIDDEN)
    tokens, rows = rng.integers(0, table.rows, 64).astype(np.int32), empty(64, HIDDEN)

    def check_embed() -> float:
        parts = [part[tokens] for part in (table.weight, table.scales, table.biases)]
        return error_of(rows, Weight(64, HIDDEN, *table.format, *parts).values())

    bench.line("embed, 64 tokens", ops.embed(tokens, table, rows), rows.nbytes * 1.14, check_embed)
    parts = normal(10, HIDDEN), normal(1, 10), normal(1, HIDDEN), normal(1)
    added, normed = normal(1, HIDDEN), empty(1, HIDDEN)
    expected = ops.combine_reference(added, *parts)
    before = added.copy()

    def check_combine() -> float:
        return max(
            error_of(added, expected),
            error_of(normed, ops.rms_norm_reference(expected, weight, 1e-6)),
        )

    moved = parts[0].nbytes + 4 * before.nbytes
    bench.line(
        "combine and norm, K=10", ops.combine(added, *parts, weight, normed), moved, check_combine
    )


def layer(bench: Bench, top_k: int, full_attention: bool, position: int = 4096) -> None:
    """A whole layer of decoding, as the Metal host encodes it, without its wait for the router."""
    stream = normal(1, HIDDEN)
    before = stream.copy()
    norms = [normal(HIDDEN) + 1 for _ in range(3)]
    normed, normed_again, normed_last = empty(1, HIDDEN), empty(1, HIDDEN), empty(1, HIDDEN)
    dispatches = [ops.rms_norm(stream, norms[0], 1e-6, normed)]
    weights: list[Weight] = []

    def products(
        x: Array, rows: Sequence[int], outs: Sequence[Array], add: int = 0, bits: int = 4
    ) -> None:
        made = [random_weight(rng, r, x.shape[1], bits) for r in rows]
        weights.extend(made)
        dispatches.append(ops.product("matvec", x, made, outs, [add] * len(made)))

    extra = 0
    if full_attention:
        call = ops.random_attention(rng, 1, 32, 2, 256, 64, position, BF16)
        mixed = empty(1, 32 * 256)
        q_gate, k, v = (t.reshape(1, -1) for t in (call.q_gate, call.k, call.v))
        products(normed, [q_gate.size, k.size, v.size], [q_gate, k, v])
        call.q_gate, call.k, call.v = (
            t.reshape(old.shape)
            for t, old in zip((q_gate, k, v), (call.q_gate, call.k, call.v), strict=True)
        )
        attend = ops.attention(call, 64, mixed)
        for d in attend:
            d.buffers.update({1: q_gate, 2: k, 3: v})
        dispatches += attend
        extra = call.keys.nbytes + call.values.nbytes
    else:
        d = ops.random_delta(rng, 1, KEY_HEADS, VALUE_HEADS, HEAD_DIM, HEAD_DIM)
        mixed, state_out = empty(1, VALUE_HEADS * HEAD_DIM), np.full_like(d.state, np.nan)
        taps, conv_state, conv_out = normal(4, CHANNELS), normal(3, CHANNELS), empty(3, CHANNELS)
        products(normed, [CHANNELS, mixed.size, VALUE_HEADS, VALUE_HEADS], [d.qkv, d.z, d.a, d.b])
        dispatches.append(ops.causal_conv(d.qkv, taps, conv_state, conv_out))
        dispatches.append(ops.gated_delta(d, state_out, mixed))
        extra = 2 * d.state.nbytes
    products(mixed, [HIDDEN], [stream], add=1)
    dispatches.append(ops.rms_norm(stream, norms[1], 1e-6, normed_again))
    logits, gate = empty(1, EXPERTS), empty(1, 1)
    products(normed_again, [EXPERTS, 1], [logits, gate], bits=8)
    ids, chosen = np.zeros((1, top_k), np.int32), empty(1, top_k)
    dispatches.append(ops.route(logits, True, ids, chosen))
    routed, shared = empty(top_k, HIDDEN), empty(1, HIDDEN)
    calls = random_experts(top_k + 1, [[0]] * (top_k + 1), [routed] * top_k + [shared])
    calls[-1].out_rows = [0]
    dispatches += ops.experts(normed_again, calls, tiles=False)
    dispatches.append(
        ops.combine(stream, routed, chosen, shared, gate.reshape(1), norms[2], normed_last)
    )
    dispatches[-1].buffers[3] = gate

    def check() -> float:
        x = before.astype(np.float64)
        y = ops.rms_norm_reference(x, norms[0], 1e-6)
        if full_attention:
            parts = [y @ w.values().T for w in weights[:3]]
            for name, part in zip(("q_gate", "k", "v"), parts, strict=True):
                setattr(call, name, part.reshape(getattr(call, name).shape))
            x += ops.attention_reference(call)[0] @ weights[3].values().T
        else:
            qkv, d.z, d.a, d.b = (y @ w.values().T for w in weights[:4])
            d.qkv = ops.causal_conv_reference(qkv, taps, conv_state)[0]
            x += ops.gated_delta_reference(d)[0] @ weights[4].values().T
        y = ops.rms_norm_reference(x, norms[1], 1e-6)
        router, shared_gate = (y @ w.values().T for w in weights[-2:])
        _, probabilities = ops.route_reference(router, top_k, True)
        outs = [ops.expert_reference(y, c) for c in calls]
        x = ops.combine_reference(
            x, np.concatenate(outs[:-1]), probabilities, outs[-1], shared_gate[0]
        )
        return max(
            error_of(stream, x), error_of(normed_last, ops.rms_norm_reference(x, norms[2], 1e-6))
        )

    kind = f"attention at {position}" if full_attention else "GatedDeltaNet"
    moved = bytes_of(*weights) + expert_bytes(calls) + extra
    name = f"layer, {kind}, K={top_k} ({len(dispatches)} dispatches)"
    bench.line(name, dispatches, moved, check, 3e-3 if full_attention else 2e-5)


def matvecs(bench: Bench) -> None:
    for rows, columns in [(1024, 4096), (4096, 1024), (16384, 4096), (4096, 8192), (VOCAB, 4096)]:
        product(bench, "matvec", 1, rows, columns)
    for top_k in (4, 10):
        experts_of_decode(bench, top_k)


def everything(bench: Bench) -> None:
    matvecs(bench)
    for form in [(2, 64, BF16), (8, 64, BF16), (0, 0, BF16)]:
        product(bench, "matvec", 1, 16384, 4096, *form)
    product(bench, "matvec", 4, 16384, 4096)
    for top_k in (4, 10):
        layer(bench, top_k, full_attention=False)
        layer(bench, top_k, full_attention=True)
    small(bench)
    for tokens in (1, 128):
        conv(bench, tokens)
        delta(bench, tokens)
    attention(bench, 1, 4096, 64)
    attention(bench, 1, 65536, 512)
    attention(bench, 64, 1000, 1 << 20)
    product(bench, "matmul", 128, 16384, 4096)
    experts_of_prompt(bench, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--matvec", action="store_true", help="only the products of decoding")
    options = parser.parse_args()
    bandwidth = copy_bandwidth()
    print(f"{gpu.name}: a copy moves {bandwidth / 1e9:.0f} GB/s, read and written")
    (matvecs if options.matvec else everything)(Bench(bandwidth))
    for failure in failures:
        print("WRONG", failure)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
