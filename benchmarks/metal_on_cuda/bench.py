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

import gpu_plans as ops  # noqa: E402
import gpu_references as references  # noqa: E402
import numpy as np  # noqa: E402
from gpu import Gpu  # noqa: E402
from gpu_plans import Memory, Operation  # noqa: E402
from gpu_references import BF16, Expert, Weight, random_weight  # noqa: E402

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
        operations: Operation | Sequence[Operation],
        moved: float,
        check: Callable[[], float],
        tolerance: float = 1e-5,
        **tuning: float,
    ) -> None:
        """moved: bytes. check: the error, once the arrays hold results."""
        memory = Memory(gpu)
        plans = memory.plans(operations, tuning=tuning)
        for plan in plans:
            gpu.launch(plan)
        gpu.synchronize()
        memory.download()
        error = check()
        if not error <= tolerance:
            failures.append(f"{name}: error {error:.1e}")

        # Large arrays, which are the weights and caches, take turns with copies of themselves.
        large = [(array, at) for array, at in memory.arrays.values() if array.nbytes > 1 << 18]
        total = sum(array.nbytes for array, _ in large)
        copies = int(np.clip(4 * L2_BYTES / total, 1, 64)) if total else 1
        turns = [plans]
        made = []
        for _ in range(copies - 1):
            other = {id(array): gpu.allocate(array.nbytes) for array, _ in large}
            for array, at in large:
                gpu.copy(other[id(array)], at, array.nbytes)
            made += other.values()

            def place(array: Array, other: dict[int, int] = other) -> int:
                return other.get(id(array)) or memory.place(array)

            turns.append(memory.plans(operations, place, tuning))
        rounds = max(1, 20 // copies)

        def work() -> None:
            for _ in range(rounds):
                for turn in turns:
                    for plan in turn:
                        gpu.launch(plan)

        seconds = gpu.seconds(work) / (rounds * copies)
        for pointer in made:
            gpu.free(pointer)
        memory.free()
        speed = moved / seconds
        label = f"{name} ({len(plans)})" if len(plans) > 1 else name
        print(
            f"{label:42} {error:8.1e} {seconds * 1e6:9.1f} {moved / 1e6:8.1f} {speed / 1e9:6.0f} "
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
    operation = ops.matmul(x, [weight], [out], [0])

    def check() -> float:
        picked, part = some_rows(weight, 4096)
        return error_of(out[:, picked], x @ part.values().T)

    bits, group, dtype = weight.format
    label = f"{bits}-bit/{group}" if bits else ("f32", "f16", "bf16")[dtype]
    name = f"{kernel} {label} {rows}x{columns}" + (f", {tokens} tokens" if tokens > 1 else "")
    moved = bytes_of(weight) + x.nbytes + out.nbytes
    bench.line(name, operation, moved, check, longest_seconds=1e9)


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


def experts_of_decode(bench: Bench, experts_per_token: int) -> None:
    x, out = normal(1, HIDDEN), empty(experts_per_token, HIDDEN)
    calls = random_experts(experts_per_token, [[0]] * experts_per_token, [out] * experts_per_token)
    operation = ops.experts(x, calls)

    def check() -> float:
        return error_of(out, np.concatenate([references.expert_reference(x, c) for c in calls]))

    moved = expert_bytes(calls) + x.nbytes + out.nbytes
    bench.line(f"experts, K={experts_per_token}", operation, moved, check)


def experts_of_prompt(bench: Bench, count: int, tokens: int) -> None:
    x, out = normal(tokens, HIDDEN), empty(count * tokens, HIDDEN)
    calls = random_experts(count, [list(range(tokens))] * count, [out] * count)
    operation = ops.experts(x, calls)

    def check() -> float:
        found = out[: 2 * tokens]
        return error_of(
            found, np.concatenate([references.expert_reference(x, c) for c in calls[:2]])
        )

    moved = expert_bytes(calls) + x.nbytes + out.nbytes
    name = f"experts of a prompt, {count} x {tokens} tokens"
    bench.line(name, operation, moved, check, longest_seconds=1e9)


def delta(bench: Bench, tokens: int) -> None:
    d = references.random_delta(rng, tokens, KEY_HEADS, VALUE_HEADS, HEAD_DIM, HEAD_DIM)
    state_out, out = np.full_like(d.state, np.nan), np.full_like(d.z, np.nan)

    def check() -> float:
        reference, state = references.gated_delta_reference(d)
        return max(error_of(out, reference), error_of(state_out, state))

    moved = 2 * d.state.nbytes + d.qkv.nbytes + d.z.nbytes + out.nbytes
    bench.line(f"gated_delta, {tokens} tokens", ops.gated_delta(d, state_out, out), moved, check)


def conv(bench: Bench, tokens: int) -> None:
    x, weight, state = normal(tokens, CHANNELS), normal(4, CHANNELS), normal(3, CHANNELS)
    state_out, before = empty(3, CHANNELS), x.copy()
    operation = ops.causal_conv(x, weight, state, state_out)
    moved = 2 * x.nbytes + 2 * state.nbytes + weight.nbytes
    bench.line(
        f"causal_conv, {tokens} tokens",
        operation,
        moved,
        lambda: error_of(x, references.causal_conv_reference(before, weight, state)[0]),
    )


def attention(bench: Bench, tokens: int, position: int) -> None:
    call = references.random_attention(rng, tokens, 32, 2, 256, 64, position, BF16)
    reference = references.attention_reference(call)[0]
    out = empty(tokens, 32 * 256)
    operation = ops.attention(call, out)
    moved = call.keys.nbytes + call.values.nbytes + call.q_gate.nbytes + out.nbytes
    name = f"attention, {tokens} tokens at {position}"
    bench.line(name, operation, moved, lambda: error_of(out, reference), 3e-3, longest_seconds=1e9)


def small(bench: Bench) -> None:
    x, weight, out = normal(1, HIDDEN), normal(HIDDEN), empty(1, HIDDEN)
    bench.line(
        "rms_norm",
        ops.rms_norm(x, weight, 1e-6, out),
        3 * x.nbytes,
        lambda: error_of(out, references.rms_norm_reference(x, weight, 1e-6)),
    )
    logits, ids, weights = normal(1, EXPERTS), np.zeros((1, 10), np.int32), empty(1, 10)

    def check_route() -> float:
        expected_ids, expected = references.route_reference(logits, 10, True)
        return 1.0 if np.any(ids != expected_ids) else error_of(weights, expected)

    bench.line(
        "route, 512 experts",
        ops.route(logits, True, ids, weights, np.zeros(1, np.int32)),
        logits.nbytes,
        check_route,
    )
    table = random_weight(rng, VOCAB // 8, HIDDEN)
    tokens, rows = rng.integers(0, table.rows, 64).astype(np.int32), empty(64, HIDDEN)

    def check_embed() -> float:
        parts = [part[tokens] for part in (table.weight, table.scales, table.biases)]
        return error_of(rows, Weight(64, HIDDEN, *table.format, *parts).values())

    bench.line("embed, 64 tokens", ops.embed(tokens, table, rows), rows.nbytes * 1.14, check_embed)
    parts = normal(10, HIDDEN), normal(1, 10), normal(1, HIDDEN), normal(1)
    added, normed = normal(1, HIDDEN), empty(1, HIDDEN)
    expected = references.combine_reference(added, *parts)
    before = added.copy()

    def check_combine() -> float:
        return max(
            error_of(added, expected),
            error_of(normed, references.rms_norm_reference(expected, weight, 1e-6)),
        )

    moved = parts[0].nbytes + 4 * before.nbytes
    bench.line(
        "combine and norm, K=10", ops.combine(added, *parts, weight, normed), moved, check_combine
    )


def layer(bench: Bench, experts_per_token: int, full_attention: bool, position: int = 4096) -> None:
    """A whole layer of decoding, as the Metal host encodes it, without its wait for the router."""
    stream = normal(1, HIDDEN)
    before = stream.copy()
    norms = [normal(HIDDEN) + 1 for _ in range(3)]
    normed, normed_again, normed_last = empty(1, HIDDEN), empty(1, HIDDEN), empty(1, HIDDEN)
    operations = [ops.rms_norm(stream, norms[0], 1e-6, normed)]
    weights: list[Weight] = []

    def products(
        x: Array, rows: Sequence[int], outs: Sequence[Array], add: int = 0, bits: int = 4
    ) -> None:
        made = [random_weight(rng, r, x.shape[1], bits) for r in rows]
        weights.extend(made)
        operations.append(ops.matmul(x, made, outs, [add] * len(made)))

    extra = 0
    if full_attention:
        call = references.random_attention(rng, 1, 32, 2, 256, 64, position, BF16)
        mixed = empty(1, 32 * 256)
        parts = [call.q_gate, call.k, call.v]
        products(normed, [part.size for part in parts], parts)
        operations.append(ops.attention(call, mixed))
        extra = call.keys.nbytes + call.values.nbytes
    else:
        d = references.random_delta(rng, 1, KEY_HEADS, VALUE_HEADS, HEAD_DIM, HEAD_DIM)
        mixed, state_out = empty(1, VALUE_HEADS * HEAD_DIM), np.full_like(d.state, np.nan)
        taps, conv_state, conv_out = normal(4, CHANNELS), normal(3, CHANNELS), empty(3, CHANNELS)
        products(normed, [CHANNELS, mixed.size, VALUE_HEADS, VALUE_HEADS], [d.qkv, d.z, d.a, d.b])
        operations.append(ops.causal_conv(d.qkv, taps, conv_state, conv_out))
        operations.append(ops.gated_delta(d, state_out, mixed))
        extra = 2 * d.state.nbytes
    products(mixed, [HIDDEN], [stream], add=1)
    operations.append(ops.rms_norm(stream, norms[1], 1e-6, normed_again))
    logits, gate = empty(1, EXPERTS), empty(1, 1)
    products(normed_again, [EXPERTS, 1], [logits, gate], bits=8)
    ids, chosen = np.zeros((1, experts_per_token), np.int32), empty(1, experts_per_token)
    operations.append(ops.route(logits, True, ids, chosen, np.zeros(1, np.int32)))
    routed, shared = empty(experts_per_token, HIDDEN), empty(1, HIDDEN)
    calls = random_experts(
        experts_per_token + 1,
        [[0]] * (experts_per_token + 1),
        [routed] * experts_per_token + [shared],
    )
    calls[-1].out_rows = [0]
    operations.append(ops.experts(normed_again, calls))
    operations.append(ops.combine(stream, routed, chosen, shared, gate, norms[2], normed_last))

    def check() -> float:
        x = before.astype(np.float64)
        y = references.rms_norm_reference(x, norms[0], 1e-6)
        if full_attention:
            parts = [y @ w.values().T for w in weights[:3]]
            for name, part in zip(("q_gate", "k", "v"), parts, strict=True):
                setattr(call, name, part.reshape(getattr(call, name).shape))
            x += references.attention_reference(call)[0] @ weights[3].values().T
        else:
            qkv, d.z, d.a, d.b = (y @ w.values().T for w in weights[:4])
            d.qkv = references.causal_conv_reference(qkv, taps, conv_state)[0]
            x += references.gated_delta_reference(d)[0] @ weights[4].values().T
        y = references.rms_norm_reference(x, norms[1], 1e-6)
        router, shared_gate = (y @ w.values().T for w in weights[-2:])
        _, probabilities = references.route_reference(router, experts_per_token, True)
        outs = [references.expert_reference(y, c) for c in calls]
        x = references.combine_reference(
            x, np.concatenate(outs[:-1]), probabilities, outs[-1], shared_gate[0]
        )
        return max(
            error_of(stream, x),
            error_of(normed_last, references.rms_norm_reference(x, norms[2], 1e-6)),
        )

    kind = f"attention at {position}" if full_attention else "GatedDeltaNet"
    moved = bytes_of(*weights) + expert_bytes(calls) + extra
    name = f"layer, {kind}, K={experts_per_token}"
    bench.line(name, operations, moved, check, 3e-3 if full_attention else 2e-5)


def matvecs(bench: Bench) -> None:
    for rows, columns in [(1024, 4096), (4096, 1024), (16384, 4096), (4096, 8192), (VOCAB, 4096)]:
        product(bench, "matvec", 1, rows, columns)
    for experts_per_token in (4, 10):
        experts_of_decode(bench, experts_per_token)


def everything(bench: Bench) -> None:
    matvecs(bench)
    for form in [(2, 64, BF16), (8, 64, BF16), (0, 0, BF16)]:
        product(bench, "matvec", 1, 16384, 4096, *form)
    product(bench, "matvec", 4, 16384, 4096)
    for experts_per_token in (4, 10):
        layer(bench, experts_per_token, full_attention=False)
        layer(bench, experts_per_token, full_attention=True)
    small(bench)
    for tokens in (1, 128):
        conv(bench, tokens)
        delta(bench, tokens)
    attention(bench, 1, 4096)
    attention(bench, 1, 65536)
    attention(bench, 64, 1000)
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
