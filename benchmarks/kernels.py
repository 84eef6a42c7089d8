"""Speed of the matrix kernels against what the machine's memory and arithmetic can do.

    python benchmarks/kernels.py [--repeats 7] [--megabytes 512]

Decode: GB/s of packed weights (with scales and biases) of one token's product, and its share of a
plain read by the same number of threads, measured alternately with it. Prompt: multiplications and
additions per second of 512 tokens against one matrix that stays in the cache. Medians; in brackets
the smallest and largest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flashmoe import _native

ops = _native.ops
COLS = 4096


def matrix(rows: int, bits: int, group: int) -> tuple[object, int]:
    """A quantized matrix of random words, with bfloat16 scales, and its bytes."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, rows * COLS * bits // 32, dtype=np.uint32)
    scales = np.full(rows * COLS // group, 0x3C00, np.uint16)
    parts = [words, scales, scales.copy()]
    native = ops.Matrix(rows, COLS, "BF16", parts, bits, group)
    return native, sum(part.nbytes for part in parts)


def dense(rows: int) -> tuple[object, int]:
    words = np.full(rows * COLS, 0x3C00, np.uint16)
    return ops.Matrix(rows, COLS, "BF16", [words]), words.nbytes


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read(array: np.ndarray, threads: int) -> None:
    """Reads every byte, as probe.memory_rate does; numpy releases the GIL in the reduction."""
    pieces = np.array_split(array, threads)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(np.max, pieces))


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):7.1f} [{min(values):.1f}-{max(values):.1f}]"


def decode(
    name: str, precision: str, weight: tuple[object, int], repeats: int, counts: list[int]
) -> None:
    native, size = weight
    x = np.random.default_rng(1).standard_normal((1, COLS), np.float32)
    plain = np.zeros(size, np.uint8) + 1
    for threads in counts:
        engine = ops.Backend(precision, threads)
        rates, reads, shares = [], [], []
        for _ in range(repeats + 1):
            plain_rate = size / seconds(lambda n=threads: read(plain, n)) / 1e9
            rate = size / seconds(lambda e=engine: e.matmul(x, [native])) / 1e9
            reads.append(plain_rate)
            rates.append(rate)
            shares.append(100 * rate / plain_rate)
        print(
            f"{name:26} {precision:8} {threads} threads {spread(rates[1:])} GB/s"
            f"   read {spread(reads[1:])}   share {spread(shares[1:])} %"
        )


def prompt(
    name: str, precision: str, weight: tuple[object, int], repeats: int, counts: list[int]
) -> None:
    rows = 2048
    native, _ = weight
    for tokens in (4, 16, 512):
        x = np.random.default_rng(1).standard_normal((tokens, COLS), np.float32)
        for threads in counts:
            engine = ops.Backend(precision, threads)
            work = 2 * rows * COLS * tokens
            times = [
                seconds(lambda e=engine, v=x: e.matmul(v, [native])) for _ in range(repeats + 1)
            ]
            print(
                f"{name:26} {precision:8} {threads} threads {tokens:4} tokens "
                f"{spread([work / t / 1e9 for t in times[1:]])} GFLOP/s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=512, help="of weights, beyond any cache")
    parser.add_argument("--quick", action="store_true", help="4 bits with group 64 only")
    counts = sorted({1, os.cpu_count() or 1})
    parser.add_argument("--threads", type=int, nargs="+", default=counts)
    options = parser.parse_args()
    print(f"kernels: {_native.cpu_kernels()}")
    formats = [(4, 64), (4, 32), (4, 128), (2, 64), (8, 64)]
    for bits, group in formats[:1] if options.quick else formats:
        rows = options.megabytes * 2**20 * 8 // (COLS * bits) // 64 * 64
        decode(
            f"{bits} bits, group {group}",
            "int8",
            matrix(rows, bits, group),
            options.repeats,
            options.threads,
        )
    if not options.quick:
        rows = options.megabytes * 2**20 // (2 * COLS)
        decode(
            "4 bits, group 64", "float32", matrix(4 * rows, 4, 64), options.repeats, options.threads
        )
        decode("bfloat16", "float32", dense(rows), options.repeats, options.threads)
    for bits, group in formats[:1] if options.quick else formats:
        weight = matrix(2048, bits, group)
        prompt(f"{bits} bits, group {group}", "int8", weight, options.repeats, options.threads)
    if not options.quick:
        prompt("4 bits, group 64", "float32", matrix(2048, 4, 64), options.repeats, options.threads)


if __name__ == "__main__":
    main()
