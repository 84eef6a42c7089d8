"""Flash-MoE against llama.cpp or mlx on the same weights and tokens, everything in memory.

    pip install llama-cpp-python gguf
    python benchmarks/make_checkpoint.py /tmp/m1 --preset m1
    python benchmarks/against_peers.py /tmp/m1

For llama.cpp the checkpoint is exported to GGUF (Q4_0, the same weights; see gguf_export.py) beside
itself, once; mlx reads it as it lies, if it is not packed. Each engine runs in a process of its
own; they take turns, so that what the machine does meanwhile meets both. Both take in the same ids
(no sampling), so the experts that are needed are the same: the correlation of their logits is
printed as proof. llama.cpp runs at its default, which repacks weights, with the same number of
threads; mlx chooses its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.machine.budget import prompt_chunk
from flashmoe.machine.probe import available_memory, memory_rate
from flashmoe.measure.bench import bytes_touched

Ids = npt.NDArray[np.int32]
Logits = npt.NDArray[np.float32]


class Peer(Protocol):
    def reset(self) -> None:
        """Forgets every token."""

    def feed(self, ids: Ids) -> Logits:
        """Appends ids; logits [vocab] of the last."""

    def use_threads(self, threads: int) -> None:
        """Computes with so many from now on."""


class FlashMoe:
    def __init__(self, source: Path, threads: int, context: int, options: dict[str, Any]) -> None:
        from flashmoe import _native  # noqa: PLC0415

        checkpoint = Checkpoint.open(source)
        experts = options.pop("experts_per_token")
        ask = partial(checkpoint.needs, experts, threads=threads)
        options.setdefault("chunk", prompt_chunk(ask, available_memory()))
        config, table = checkpoint.native_config(experts), checkpoint.native
        self.make = lambda threads: _native.Engine(config, table, threads=threads, **options)
        self.native = self.make(threads)
        self.reset()

    def use_threads(self, threads: int) -> None:
        del self.state, self.native
        self.native = self.make(threads)
        self.reset()

    def reset(self) -> None:
        self.state = self.native.new_state()

    def feed(self, ids: Ids) -> Logits:
        return self.native.forward(self.state, ids)


class LlamaCpp:
    def __init__(self, source: Path, threads: int, context: int, options: dict[str, Any]) -> None:
        import ctypes  # noqa: PLC0415

        import llama_cpp as llama  # noqa: PLC0415

        self.llama = llama
        quiet = llama.llama_log_callback(lambda level, text, data: None)
        self.quiet = quiet
        llama.llama_log_set(quiet, ctypes.c_void_p(0))
        llama.llama_backend_init()
        model_options = llama.llama_model_default_params()
        for key, value in options.items():
            setattr(model_options, key, value)
        self.model = llama.llama_model_load_from_file(str(source).encode(), model_options)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {source}")
        context_options = llama.llama_context_default_params()
        context_options.n_ctx = context
        context_options.n_batch = context
        context_options.n_threads = context_options.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, context_options)
        vocab = llama.llama_model_get_vocab(self.model)
        self.vocab = llama.llama_vocab_n_tokens(vocab)

    def use_threads(self, threads: int) -> None:
        self.llama.llama_set_n_threads(self.context, threads, threads)

    def reset(self) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)

    def feed(self, ids: Ids) -> Logits:
        array = (self.llama.llama_token * len(ids))(*ids.tolist())
        if self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(array, len(ids))):
            raise SystemExit("llama_decode failed")
        last = self.llama.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(last, (self.vocab,)).copy()


class Mlx:
    def __init__(self, source: Path, threads: int, context: int, options: dict[str, Any]) -> None:
        from mlx_lm.utils import load_model  # noqa: PLC0415

        self.model, _ = load_model(source)
        self.reset()

    def use_threads(self, threads: int) -> None:
        raise SystemExit("mlx chooses its own threads")

    def reset(self) -> None:
        from mlx_lm.models.cache import make_prompt_cache  # noqa: PLC0415

        self.cache = make_prompt_cache(self.model)

    def feed(self, ids: Ids) -> Logits:
        import mlx.core as mx  # noqa: PLC0415

        logits = self.model(mx.array(ids[None]), cache=self.cache)[0, -1]
        return np.array(logits.astype(mx.float32))


PEERS = {"flashmoe": FlashMoe, "llama.cpp": LlamaCpp, "mlx": Mlx}


def serve(name: str, source: Path, threads: int, context: int, options: dict[str, Any]) -> None:
    """Runs measurements that are asked for on stdin, a line each."""
    peer: Peer = PEERS[name](source, threads, context, options)
    for line in sys.stdin:
        task = json.loads(line)
        if task["threads"]:
            peer.use_threads(task["threads"])
        prompt, rest = (np.array(task[key], np.int32) for key in ("prompt", "rest"))
        peer.reset()
        start = time.perf_counter()
        logits = peer.feed(prompt)
        prefill = time.perf_counter() - start
        start = time.perf_counter()
        for i in rest:
            logits = peer.feed(np.array([i], np.int32))
        decode = time.perf_counter() - start
        answer = {
            "prefill": len(prompt) / prefill,
            "decode": len(rest) / decode if len(rest) else None,
            "logits": logits[:256].tolist(),
        }
        print(json.dumps(answer), flush=True)


class Worker:
    def __init__(
        self,
        name: str,
        source: Path,
        arguments: list[str],
        options: dict[str, Any],
        environment: dict[str, str] | None = None,
    ):
        command = [sys.executable, str(Path(__file__)), str(source), "--serve", name, *arguments]
        command += ["--options", json.dumps(options)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | (environment or {}),
        )

    def run(self, prompt: list[int], rest: list[int], threads: int = 0) -> dict[str, Any]:
        """Threads other than 0 are used from now on."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(
            json.dumps({"prompt": prompt, "rest": rest, "threads": threads}) + "\n"
        )
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("a worker ended early; its message is above")
        result: dict[str, Any] = json.loads(answer)
        return result


def exported(checkpoint: Path) -> Path:
    """The checkpoint as GGUF beside itself, made if it is not there."""
    from gguf_export import export  # noqa: PLC0415

    file = checkpoint / "model-q4_0.gguf"
    if not file.exists():
        partial = file.with_suffix(".partial")
        export(checkpoint, partial)
        partial.rename(file)
    return file


def summary(values: list[float]) -> str:
    return f"{statistics.median(values):8.2f}  ({min(values):.2f} .. {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--peer", choices=["llama.cpp", "mlx"], default="llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--cache", type=float, default=16.0, help="GB of slots for experts")
    parser.add_argument("--json", type=Path, help="where to write every run")
    parser.add_argument("--serve", choices=list(PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--options", default="{}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    context = arguments.prompt + arguments.tokens + 64
    if arguments.serve:
        serve(
            arguments.serve,
            arguments.checkpoint,
            arguments.threads,
            context,
            json.loads(arguments.options),
        )
        return

    config = json.loads((arguments.checkpoint / "config.json").read_text())
    config = config.get("text_config", config)
    common = ["--threads", str(arguments.threads), "--prompt", str(arguments.prompt)]
    common += ["--tokens", str(arguments.tokens)]
    experts = config["num_experts_per_tok"]
    options = {
        "experts_per_token": experts,
        "cache_bytes": int(arguments.cache * 1e9),
    }
    ours = Worker("flashmoe", arguments.checkpoint, common, options)
    peer = arguments.peer
    same = exported(arguments.checkpoint) if peer == "llama.cpp" else arguments.checkpoint
    theirs = Worker(peer, same, common, {})
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config["vocab_size"], arguments.prompt + arguments.tokens).tolist()
    task = (ids[: arguments.prompt], ids[arguments.prompt :])
    warm = [worker.run(*task) for worker in (ours, theirs)]
    a, b = (np.array(answer["logits"]) for answer in warm)
    print(f"correlation of the two engines' last logits: {np.corrcoef(a, b)[0, 1]:.6f}")
    results: dict[str, list[dict[str, Any]]] = {"flashmoe": [], peer: []}
    memory = []
    for _ in range(arguments.runs):
        memory.append(memory_rate(arguments.threads))
        results["flashmoe"].append(ours.run(*task))
        results[peer].append(theirs.run(*task))
    for what in ("decode", "prefill"):
        speeds = {name: [r[what] for r in runs] for name, runs in results.items()}
        if speeds["flashmoe"][0] is None:
            continue
        ratios = [x / y for x, y in zip(speeds["flashmoe"], speeds[peer], strict=True)]
        print(f"{what}, tok/s, median of {arguments.runs} alternating runs (least .. most)")
        for name, values in speeds.items():
            print(f"  {name:10s} {summary(values)}")
        print(f"  {'ratio':10s} {summary(ratios)}")
    touched = bytes_touched(Checkpoint.open(arguments.checkpoint), experts)
    if arguments.tokens:
        rates = [r["decode"] * touched for r in results["flashmoe"]]
        shares = [rate / limit for rate, limit in zip(rates, memory, strict=True)]
        rate = statistics.median(memory) / 1e9
        print(
            f"Flash-MoE touches {touched / 1e6:.0f} MB a token, weights and states; as a share of"
        )
        print(f"the {rate:.1f} GB/s that memory gave in the same run: {summary(shares)}")
    if arguments.json:
        for runs in results.values():
            for run in runs:
                del run["logits"]
        answer = {"prompt": arguments.prompt, "tokens": arguments.tokens, "touched": touched}
        arguments.json.write_text(
            json.dumps(answer | {"memory": memory, "runs": results}, indent=1)
        )


if __name__ == "__main__":
    main()
