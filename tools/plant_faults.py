"""Plants a fault in one module after another and runs the fast layer of tests on each.

    python tools/plant_faults.py             # all: builds the native core a dozen times
    python tools/plant_faults.py hub turn    # those whose file's name holds any of these words

Works on a copy of the tree. A fault's own tests run first, then, where they pass, the whole fast
layer. Ends with 1 where a text is no longer in its file, or fewer than nine faults in ten are
caught. Needs what CONTRIBUTING.md names for building in place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHARE = 0.9  # of the faults that must be caught


@dataclass(frozen=True)
class Fault:
    file: str  # below src/
    before: str  # occurs once
    after: str
    tests: str  # names of test files, without test_ and .py


P, N = "flashmoe/", "flashmoe_native/"
FAULTS = (
    Fault(
        P + "checkpoint/config.py",
        "return 2 * self.key_width + self.value_width",
        "return self.key_width + 2 * self.value_width",
        "config checkpoint",
    ),
    Fault(P + "checkpoint/architecture.py", '("q_proj", 2 * width)', '("q_proj", width)', "parity"),
    Fault(
        P + "checkpoint/headers.py",
        "if bits != (end - begin) * 8:",
        "if bits > (end - begin) * 8:",
        "damage",
    ),
    Fault(
        P + "checkpoint/index.py",
        "if unnamed := found.keys() - names:",
        "if unnamed := names - found.keys():",
        "wild",
    ),
    Fault(
        P + "checkpoint/zeros.py", "if end - begin >= LEAST:", "if end - begin > 4096:", "verify"
    ),
    Fault(P + "checkpoint/json.py", "if len(result) != len(pairs):", "if not pairs:", "damage"),
    Fault(
        P + "checkpoint/table.py",
        "return 3 if self.bits else 1",
        "return 2 if self.bits else 1",
        "checkpoint",
    ),
    Fault(
        P + "checkpoint/weights.py",
        "plus_one = weight.kind is Kind.NORM and not self._mlx_convention",
        "plus_one = weight.kind is Kind.NORM",
        "checkpoint",
    ),
    Fault(
        P + "checkpoint/template.py",
        "{k: v for k, v in m.items() if v is not None}",
        "dict(m)",
        "chat",
    ),
    Fault(
        P + "checkpoint/tokenizer.py",
        "if token.special)",
        "if not token.special)",
        "text model",
    ),
    Fault(
        P + "generate/sampling.py",
        "np.where(x > 0, x / penalty, x * penalty)",
        "np.where(x > 0, x / penalty, x / penalty)",
        "sampling",
    ),
    Fault(
        P + "generate/text.py",
        "for n in range(min(len(text), len(stop) - 1), 0, -1):",
        "for n in range(min(len(text), len(stop) - 2), 0, -1):",
        "text",
    ),
    Fault(
        P + "generate/state.py",
        'for name in ("experts_per_token", "precision"):',
        'for name in ("experts_per_token",):',
        "state",
    ),
    Fault(
        P + "generate/stats.py",
        "decoded = self.generated_tokens - 1",
        "decoded = self.generated_tokens",
        "model",
    ),
    Fault(
        P + "generate/model.py",
        "if before + len(ids) > self.context:",
        "if len(ids) > self.context:",
        "model",
    ),
    Fault(
        P + "machine/budget.py",
        "if resident + slots + keys <= available:",
        "if resident + keys <= available:",
        "info",
    ),
    Fault(
        P + "measure/fit.py",
        "share = max(0, available - sizes.resident) / sizes.experts",
        "share = max(0, available) / sizes.experts",
        "info time_model",
    ),
    Fault(P + "pack/convert.py", "+ 0x7FFF +", "+ 0x8000 +", "pack"),
    Fault(
        P + "pack/layout.py",
        "if source.cols % group == 0:",
        "if source.cols % self.group == 0 and bits:",
        "pack",
    ),
    Fault(
        P + "hub.py",
        "except errors.GatedRepoError:",
        "except errors.EntryNotFoundError:",
        "hub",
    ),
    Fault(
        N + "core/file.cpp",
        "if (fd == direct_ && done < length && done % kDirectUnit != 0) {",
        "if (done < 0) {",
        "read_errors",
    ),
    Fault(
        N + "core/thread_pool.cpp",
        "begin = share.end;",
        "begin = share.end + 1;",
        "ops determinism",
    ),
    Fault(N + "core/turn.cpp", "queue_.push_back(self);", "queue_.push_front(self);", "turns"),
    Fault(
        N + "experts/expert_store.cpp",
        "    if (failed) forget(index);\n",
        "",
        "read_errors",
    ),
    Fault(
        N + "model/forward.cpp",
        "std::swap(state.deltas[layer], next_deltas_[layer]);",
        "if (n > 1) std::swap(state.deltas[layer], next_deltas_[layer]);",
        "parity",
    ),
    Fault(
        N + "model/loader.cpp",
        "(spec.plus_one ? 1.0f : 0.0f)",
        "(spec.plus_one ? 0.0f : 1.0f)",
        "parity",
    ),
    Fault(
        N + "model/state.cpp",
        "from = row * head * old.capacity;",
        "from = row * head * capacity;",
        "parity",
    ),
    Fault(
        N + "quantize/affine.cpp",
        "std::fabs(min) > std::fabs(max)",
        "std::fabs(min) >= std::fabs(max)",
        "quantize",
    ),
    Fault(
        N + "backend/cpu/delta.inl",
        "head / (call.value_heads / call.key_heads)",
        "head % call.key_heads",
        "ops parity",
    ),
    Fault(
        N + "backend/cpu/int8_quantize.inl",
        "scales[to] = largest_value / 127.0f;",
        "scales[to] = largest_value / 128.0f;",
        "ops",
    ),
    Fault(
        N + "backend/cpu/softmax.inl",
        "scores[i] = -__builtin_inff();",
        "scores[i] = 0.0f;",
        "ops",
    ),
)


class Tree:
    """A copy of what tests need, with the native core built in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "tree"
        ignored = shutil.ignore_patterns("build", "dist", ".*", "__pycache__", "*.so")
        shutil.copytree(ROOT, self.root, ignore=ignored)
        self.build = folder / "build"
        options = [
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        self._call("cmake", "-S", self.root, "-B", self.build, *options)
        self.compile()

    def compile(self) -> None:
        self._call("ninja", "-C", self.build)
        for old in (self.root / "src/flashmoe").glob("_native*.so"):
            old.unlink()
        (library,) = self.build.glob("_native*.so")
        shutil.copy(library, self.root / "src/flashmoe")

    def passes(self, *tests: str) -> bool:
        """Whether these test files pass, or with none all of the fast layer."""
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(self.root / "src")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=1800,
        )
        return run.returncode == 0

    def _call(self, *command: str | Path) -> None:
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise SystemExit(run.stdout + run.stderr)


def caught_by(tree: Tree, fault: Fault) -> str:
    """What rejects the fault: its tests, the rest of the fast layer, or nothing."""
    path = tree.root / "src" / fault.file
    sound = path.read_text()
    native = fault.file.startswith(N)
    path.write_text(sound.replace(fault.before, fault.after))
    try:
        if native:
            tree.compile()
        own = [f"tests/test_{name}.py" for name in fault.tests.split()]
        if not tree.passes(*own):
            return fault.tests
        return "" if tree.passes() else "the fast layer"
    finally:
        path.write_text(sound)
        if native:
            tree.compile()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only faults whose file holds one of these")
    words = parser.parse_args().words
    stale = [f for f in FAULTS if (ROOT / "src" / f.file).read_text().count(f.before) != 1]
    for fault in stale:
        print(f"{fault.file} does not hold this once: {fault.before}", file=sys.stderr)
    if stale:
        raise SystemExit(1)
    chosen = [f for f in FAULTS if not words or any(word in f.file for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Tree(Path(folder))
        tests = sorted({f"tests/test_{name}.py" for f in chosen for name in f.tests.split()})
        if not tree.passes(*tests):
            raise SystemExit("the tests fail before any fault is planted")
        caught = 0
        for fault in chosen:
            start = time.perf_counter()
            by = caught_by(tree, fault)
            caught += bool(by)
            taken = time.perf_counter() - start
            print(f"{fault.file}: {'caught by ' + by if by else 'NOT CAUGHT'} ({taken:.0f} s)")
    print(f"{caught} of {len(chosen)} caught")
    raise SystemExit(caught < SHARE * len(chosen))


if __name__ == "__main__":
    main()
