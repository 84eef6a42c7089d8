"""Flash-MoE against llama.cpp where the experts do not fit into memory, from a cold start.

    pip install llama-cpp-python gguf
    python benchmarks/make_checkpoint.py /tmp/m1 --preset m1
    flashmoe pack /tmp/m1 /tmp/m1-packed
    python benchmarks/from_disk.py /tmp/m1-packed --room 0.35

Each run is a fresh process in a cgroup whose memory limit has room for the resident weights and
for the given share of the experts, with the files dropped from the page cache; the engines take
turns. Before its clock starts a process has touched the memory that it will fill, for the host of a
virtual machine may provide that slowly (see limits.py). Both take in the same random ids with the
same weights (see against_peers.py), so they need the same experts. llama.cpp maps its file, without
repacking, which would not fit; it is run with the disk's readahead as it is and with the
--readahead given, for reading ahead is what it depends on. What was read is compared with what a
cache of whole experts would have to, least recently used out first, over the same room; the disk's
own rate is measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from against_peers import PEERS, FlashMoe, exported, summary
from limits import drop, memory_limit, readahead, readahead_of, touch_memory

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.machine.probe import disk_rate

OVERHEAD = 300_000_000  # bytes of an engine beside weights: interpreter, activations, state


def serve(name: str, source: Path, task: dict[str, Any]) -> None:
    """One run: load, prompt, decode; prints what it took."""
    touch_memory(task["touch"])
    start = time.perf_counter()
    ids = np.array(task["ids"], np.int32)
    split = task["prompt"]
    peer = PEERS[name](source, task["threads"], len(ids) + 8, task["options"])
    loaded = time.perf_counter()
    peer.feed(ids[:split])
    prompted = time.perf_counter()
    before = peer.native.stats() if isinstance(peer, FlashMoe) else {}
    for i in ids[split:]:
        peer.feed(np.array([i], np.int32))
    end = time.perf_counter()
    count = len(ids) - split
    answer: dict[str, Any] = {
        "load": loaded - start,
        "prefill": split / (prompted - loaded),
        "decode": count / (end - prompted) if count else None,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if isinstance(peer, FlashMoe):
        now = peer.native.stats()
        answer |= {
            "bytes": (now["bytes_read"] - before["bytes_read"]) / max(count, 1),
            "seconds": end - prompted,
            "slots": now["slot_bytes"],
            "resident": now["resident_bytes"],
        }
    print(json.dumps(answer))


def run(name: str, source: Path, limit: int, task: dict[str, Any]) -> dict[str, Any]:
    for file in (
        [source, *source.parent.glob("*.safetensors")]
        if source.is_file()
        else [*source.glob("*.safetensors")]
    ):
        drop(file)
    command = [sys.executable, __file__, str(source), "--serve", name, "--task", json.dumps(task)]
    with memory_limit(limit) as join:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, preexec_fn=join, check=False
        )
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}; its message is above")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def lru_bytes(routing: np.ndarray, slots: int, expert: int, skip: int) -> float:
    """Bytes a token that an LRU cache of `slots` experts reads, after `skip` tokens.

    routing: [tokens, layers, experts_per_token] experts.
    """
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    misses = 0
    for token, layers in enumerate(routing):
        for layer, experts in enumerate(layers):
            for e in experts.tolist():
                if (layer, e) in cache:
                    cache.move_to_end((layer, e))
                    continue
                misses += token >= skip
                cache[layer, e] = None
                if len(cache) > slots:
                    cache.popitem(last=False)
    return misses * expert / (len(routing) - skip)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--room", type=float, default=0.35, help="share of the experts that fits")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-threads", type=int, help="of llama.cpp, which wait for pages")
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--readahead", type=int, default=128, help="KiB, for llama.cpp")
    parser.add_argument("--slow-runs", type=int, default=1, help="of llama.cpp as the disk is set")
    parser.add_argument("--json", type=Path, help="where to write every run")
    parser.add_argument("--serve", choices=list(PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.checkpoint, arguments.task)
        return

    checkpoint = Checkpoint.open(arguments.checkpoint)
    config = checkpoint.config
    gguf = exported(arguments.checkpoint)
    expert = max(layer.expert_bytes for layer in checkpoint.experts)
    experts = expert * config.num_experts * len(checkpoint.experts)
    resident = sum(matrix.format.nbytes for matrix in checkpoint.matrices.values())
    room = int(arguments.room * experts)
    limit = resident + room + OVERHEAD
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vocab_size, arguments.prompt + arguments.tokens).tolist()
    task = {"ids": ids, "prompt": arguments.prompt, "threads": arguments.threads}
    task["touch"] = resident + room
    options = {"experts_per_token": config.num_experts_per_tok, "cache_bytes": room}
    ours = task | {"options": options}
    theirs = task | {"options": {"use_mmap": True, "use_extra_bufts": False}}
    theirs["threads"] = arguments.peer_threads or arguments.threads
    print(
        f"{experts / 1e9:.2f} GB of experts, {resident / 1e9:.2f} GB resident; limit "
        f"{limit / 1e9:.2f} GB ({arguments.room:.0%} of the experts and {OVERHEAD / 1e9} GB)"
    )
    default = readahead_of(gguf)
    mapped = f"llama.cpp, readahead {arguments.readahead} KiB"
    results: dict[str, list[dict[str, Any]]] = {"flashmoe": [], mapped: []}
    disk = []
    for i in range(arguments.runs):
        files = [Path(file) for file in checkpoint.files]
        disk.append(disk_rate(files, expert, seconds=2) or float("nan"))
        results["flashmoe"].append(run("flashmoe", arguments.checkpoint, limit, ours))
        with readahead(gguf, arguments.readahead):
            results[mapped].append(run("llama.cpp", gguf, limit, theirs))
        if i < arguments.slow_runs:
            with contextlib.suppress(SystemExit):
                name = f"llama.cpp, readahead {default} KiB as set"
                slow = run("llama.cpp", gguf, limit, theirs)
                results.setdefault(name, []).append(slow)
    for what in ("prefill", "decode"):
        print(f"{what}, tok/s, median (least .. most)")
        mine = [r[what] for r in results["flashmoe"]]
        if mine[0] is None:
            continue
        for name, runs in results.items():
            values = [r[what] for r in runs]
            ratios = [a / b for a, b in zip(mine, values, strict=False)]
            print(f"  {name:40s} {summary(values)}   ratio to it {summary(ratios)}")
    last = results["flashmoe"][-1]
    least: dict[str, float] = {}
    print(f"disk, random reads of an expert, GB/s: {summary([d / 1e9 for d in disk])}")
    if arguments.tokens:
        rates = [r["bytes"] * arguments.tokens / r["seconds"] for r in results["flashmoe"]]
        shares = [rate / d for rate, d in zip(rates, disk, strict=True)]
        decoding = summary([r / 1e9 for r in rates])
        print(f"read while decoding, GB/s: {decoding}, {summary(shares)} of it")
        engine = FlashMoe(
            arguments.checkpoint, arguments.threads, len(ids), {**options, "cache_bytes": 1}
        )
        routing = engine.native.forward(engine.state, np.array(ids, np.int32), routing=True)[1]
        lru = lru_bytes(routing, room // expert, expert, arguments.prompt)
        read = statistics.median(r["bytes"] for r in results["flashmoe"])
        least["lru_bytes"] = lru
        print(f"read a token: {read / 1e6:.1f} MB; LRU over this room: {lru / 1e6:.1f} MB")
    held = last["resident"] + last["slots"]
    print(f"peak memory {last['peak'] / 1e9:.2f} GB; weights and slots {held / 1e9:.2f} GB")
    if arguments.json:
        arguments.json.write_text(
            json.dumps(
                {"room": arguments.room, "prompt": arguments.prompt, "disk": disk, "runs": results}
                | least,
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
