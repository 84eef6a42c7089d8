"""The checks of the shaders are themselves checked: each planted fault must be rejected."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_kernels as kernels
from shader_executor import SHADERS, DispatchError, Executor, build, compiler

BF16, F16, F32 = kernels.BF16, kernels.F16, kernels.F32
Run = Callable[..., None]


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in a file of metal/; `check` is what must fail, with `error` in its
    message.
    """

    fault: str
    file: str
    old: str
    new: str
    check: Callable[[Run], None]
    error: str = ""
    count: int = 1  # how often `old` stands in the file; the first is replaced

    def plant(self, directory: Path) -> Path:
        for path in SHADERS.iterdir():
            text = path.read_text()
            if path.name == self.file:
                assert text.count(self.old) == self.count, f"{self.fault}: not as expected"
                text = text.replace(self.old, self.new, 1)
            (directory / path.name).write_text(text)
        return directory


_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def _matmul(run: Run) -> None:
    kernels.test_products_of_every_format(run, "matmul", (4, 64, BF16))


def _matvec(run: Run) -> None:
    kernels.test_long_rows_are_shared_by_simdgroups(run, "matvec", 4096)


def _delta(run: Run) -> None:
    kernels.test_gated_delta(run, (11, 2, 4, 32, 32))


def _attention(run: Run) -> None:
    kernels.test_attention(run, F32, (7, 3, 1, 96, 22, 61), kernels.SHORT)


def _norm(run: Run) -> None:
    kernels.test_rms_norm(run, 1025)


def _experts(run: Run) -> None:
    kernels.test_experts(run, False, (4, 64, BF16), (4, 64, BF16))


EXECUTED = [
    Mutant("no barrier in the sum of a threadgroup", "common.h", f"  {_BARRIER}\n", "", _norm),
    Mutant(
        "no barrier between staging inputs and using them",
        "matvec.h",
        f"    {_BARRIER}\n    for (uint chunk",
        "    for (uint chunk",
        _matvec,
    ),
    Mutant(
        "inputs staged while others still use the last",
        "matvec.h",
        f"    if (begin > 0) {_BARRIER}\n",
        "",
        lambda run: kernels.test_long_rows_are_shared_by_simdgroups(run, "matvec", 9216),
    ),
    Mutant(
        "no barrier between filling a tile and reading it",
        "tiles.h",
        f"    {_BARRIER}\n    for (uint k",
        "    for (uint k",
        _matmul,
    ),
    Mutant(
        "a tile filled while others still read the last",
        "tiles.h",
        f"    {_BARRIER}\n#pragma unroll\n    for (uint i",
        "#pragma unroll\n    for (uint i",
        _matmul,
    ),
    Mutant(
        "no barrier between the parts of a column and their sum",
        "delta.metal",
        f"      {_BARRIER}\n",
        "",
        _delta,
    ),
    Mutant(
        "one side for the sums of all tokens",
        "delta.metal",
        "i % 2 * kDeltaParts",
        "0 * kDeltaParts",
        _delta,
    ),
    Mutant(
        "no barrier between scores and softmax",
        "attention.metal",
        f"    {_BARRIER}\n\n#pragma unroll\n    for (uint r",
        "\n#pragma unroll\n    for (uint r",
        _attention,
    ),
    Mutant(
        "scores of the next keys while others still use the last",
        "attention.metal",
        f"    {_BARRIER}\n  }}\n\n#pragma unroll\n  for (uint r",
        "  }\n\n#pragma unroll\n  for (uint r",
        lambda run: kernels.test_attention(run, F32, (5, 8, 1, 64, 16, 130), {"enough_groups": 1}),
    ),
    Mutant(
        "outputs normed before the last token's are there",
        "delta.metal",
        f"    {_BARRIER}\n\n    for (uint i = simdgroup",
        "    for (uint i = simdgroup",
        _delta,
    ),
    Mutant(
        "no barrier between a head's norm and its rotation",
        "attention.metal",
        "  simdgroup_barrier(mem_flags::mem_threadgroup);\n\n  const ulong position",
        "  const ulong position",
        _attention,
    ),
    Mutant(
        "a return before a barrier",
        "matvec.metal",
        "  float total[",
        "  if (first >= product.rows) return;\n  float total[",
        _matvec,
        "not reached|threadgroup_barrier",
    ),
    Mutant(
        "a simdgroup's sum that half of its lanes reach",
        "common.h",
        "const float sum = simd_sum(value);",
        "const float sum = lane < 16 ? simd_sum(value) : 0;",
        _norm,
        "not reached by every lane",
    ),
    Mutant(
        "one element too many",
        "norm.metal",
        "i < args.width; i += kNormThreads) {\n    out",
        "i <= args.width; i += kNormThreads) {\n    out",
        _norm,
        "past the end",
    ),
    Mutant(
        "one row too many",
        "matvec.metal",
        "row >= product.rows",
        "row > product.rows",
        _matvec,
        "past the end",
    ),
    Mutant(
        "a column's bound left out",
        "embed.metal",
        "  if (column >= args.columns) return;\n",
        "",
        lambda run: kernels.test_embed_gives_rows_of_the_table(run, (0, 0, F32)),
        "past the end",
    ),
    Mutant(
        "wide loads off by a word",
        "matvec.h",
        "((device const uint4*)w.weight)[",
        "((device const uint4*)(w.weight + 4))[",
        _matvec,
        "misaligned",
    ),
    Mutant(
        "two arrays exchanged",
        "norm.metal",
        "args.shared_out;",
        "args.expert_out;",
        lambda run: kernels.test_combine_adds_to_the_stream_and_norms_it(run, 96),
    ),
    Mutant(
        "more threadgroup memory than there is",
        "route.metal",
        "[kMaxRouted]",
        "[9 * kMaxRouted]",
        lambda run: kernels.test_route(run, 8, 4, True),
        "threadgroup memory",
    ),
    Mutant(
        "up in the format of gate",
        "experts.metal",
        "{second_format(), stored(expert.up)",
        "{first_format(), stored(expert.up)",
        lambda run: kernels.test_gate_and_up_of_different_formats(run, False),
    ),
    Mutant(
        "every pair's output in the row of the first",
        "experts.metal",
        "pair_rows[pair]",
        "pair_rows[0]",
        _experts,
    ),
    Mutant(
        "ties to the higher index",
        "route.metal",
        "left[e] > best",
        "left[e] >= best",
        lambda run: kernels.test_route(run, 512, 10, True),
    ),
    Mutant(
        "a key of the future in sight",
        "attention.metal",
        "position <= args.position + token;",
        "position <= args.position + token + 1;",
        _attention,
    ),
    Mutant(
        "caches cut instead of rounded",
        "common.h",
        "(bits + 0x7fff + ((bits >> 16) & 1))",
        "(bits)",
        lambda run: kernels.test_attention(run, BF16, (7, 3, 1, 96, 22, 61), kernels.SHORT),
    ),
]


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("mutant", EXECUTED, ids=lambda m: m.fault.replace(" ", "-"))
def test_the_executor_rejects(mutant: Mutant, tmp_path: Path) -> None:
    run = kernels.runner(Executor(build(tmp_path, mutant.plant(tmp_path), ["-O1"])))
    with pytest.raises((AssertionError, DispatchError), match=mutant.error or None):
        mutant.check(run)


def _typed(fault: str, file: str, old: str, new: str, count: int = 1) -> Mutant:
    return Mutant(fault, file, old, new, lambda run: None, count=count)


TYPED = [
    _typed(
        "threadgroup memory passed as device memory",
        "common.h",
        "threadgroup float* partial, uint simdgroups",
        "device float* partial, uint simdgroups",
    ),
    _typed(
        "constants passed as device memory",
        "experts.metal",
        "find_tile(constant ExpertArguments& args",
        "find_tile(device ExpertArguments& args",
    ),
    _typed(
        "a write to an input",
        "norm.metal",
        "device float* normed = args.normed",
        "device const float* normed = args.normed",
    ),
    _typed(
        "a double", "common.h", "INLINE float sigmoid(float x)", "INLINE double sigmoid(float x)"
    ),
    _typed("a name that is not Metal's", "delta.metal", "log(u)", "log1p(u)"),
    _typed(
        "a field that does not exist",
        "route.metal",
        "j < args.experts_per_token;",
        "j < args.experts_a_token;",
    ),
]


@pytest.mark.parametrize("mutant", TYPED, ids=lambda m: m.fault.replace(" ", "-"))
def test_the_type_check_rejects(mutant: Mutant, tmp_path: Path) -> None:
    pytest.importorskip("clang.cindex", reason="needs libclang")
    from test_types import FILES, MODES, problems  # noqa: PLC0415

    shaders = mutant.plant(tmp_path)
    assert any(problems(shaders / name, mode) for name in FILES for mode in MODES)


@pytest.mark.parametrize("new", ["[[buffer(1)]]", ""], ids=["index 1", "no index"])
def test_a_kernel_whose_struct_is_not_at_index_0_is_rejected(new: str, tmp_path: Path) -> None:
    pytest.importorskip("clang.cindex", reason="needs libclang")
    import test_types  # noqa: PLC0415

    mutant = _typed("another index", "route.metal", "[[buffer(0)]]", new)
    with pytest.raises(AssertionError, match="route"):
        test_types.check_arguments(mutant.plant(tmp_path))


UNROLLED = [
    _typed(
        "a loop not unrolled",
        "delta.metal",
        "#pragma unroll\n      for (uint r",
        "      for (uint r",
        2,
    ),
    _typed(
        "a function constant as a bound", "matvec.metal", "q < kMaxQuads;", "q < quads_constant;"
    ),
    _typed("a helper not inlined", "matvec.h", "INLINE void add_quad", "inline void add_quad"),
    _typed("an element chosen at run time", "tiles.h", "out[i] = fma", "out[(i + row) % 16] = fma"),
]


@pytest.mark.skipif(not shutil.which("clang-19"), reason="needs clang-19")
@pytest.mark.parametrize("mutant", UNROLLED, ids=lambda m: m.fault.replace(" ", "-"))
def test_an_array_in_memory_is_rejected(mutant: Mutant, tmp_path: Path) -> None:
    pytest.importorskip("clang.cindex", reason="needs libclang")
    from test_types import FILES, memory_of_threads  # noqa: PLC0415

    shaders = mutant.plant(tmp_path)
    assert any(memory_of_threads(shaders / name, tmp_path / "out.ll") for name in FILES)
