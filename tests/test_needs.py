"""What the native core says that a setting would take is what an engine in that setting takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import TestEngine, random_ids

import flashmoe
from flashmoe import _native
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.machine.budget import prompt_chunk
from flashmoe.pack.pack import pack

CHUNK = 64
CACHE = 1 << 30
NAMES = ["demo", "base", "odd", "tied", "next", "attention-only", "mlx-2", "mlx-4-partly-dense"]


@pytest.fixture
def find(checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    demo = Path(flashmoe.__file__).parent / "demo_model"
    return lambda name: demo if name == "demo" else checkpoint(name)


def needs_and_engine(directory: Path, **setting: Any) -> tuple[_native.Needs, _native.Engine]:
    """Of the model's own experts per token, asked for one chunk; float32 unless told otherwise."""
    setting = {"precision": "float32", "threads": 1, "chunk": CHUNK} | setting
    opened = Checkpoint.open(directory)
    needs = opened.needs(opened.config.num_experts_per_tok, **{"context": CHUNK} | setting)
    setting.pop("context", None)
    return needs, TestEngine(directory, **setting).native


def assert_taken(needs: _native.Needs, engine: _native.Engine) -> None:
    stats = engine.stats()
    for name in ("resident", "slot", "activation"):
        asked = "resident" if name == "resident" else f"{name}s"
        assert needs[asked] == stats[f"{name}_bytes"], name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache", [0, 100_000, CACHE])
def test_weights_slots_and_activations(find, name: str, cache: int) -> None:
    needs, engine = needs_and_engine(find(name), cache_bytes=cache)
    assert_taken(needs, engine)
    if cache == CACHE:
        config = Checkpoint.open(find(name)).config
        assert needs["slots"] == needs["all_slots"]
        assert needs["slots"] == needs["slot"] * config.num_experts * len(config.layer_types)


@pytest.mark.parametrize("cache", [0, CACHE])
def test_a_pack(find, tmp_path: Path, cache: int) -> None:
    pack(find("base"), tmp_path / "pack", bits=4)
    assert_taken(*needs_and_engine(tmp_path / "pack", cache_bytes=cache))


@pytest.mark.parametrize("precision", ["int8", "float32"])
@pytest.mark.parametrize("chunk", [16, 200])
def test_a_state_as_it_grows(find, precision: str, chunk: int) -> None:
    opened = Checkpoint.open(find("base"))
    engine = TestEngine(opened.directory, precision=precision, chunk=chunk).native
    state = engine.new_state()
    for context in (0, 1, 255, 256, 257, 900):
        grow = random_ids(300, context - state.position)
        for i in range(0, len(grow), chunk):
            engine.forward(state, grow[i : i + chunk])
        needs = opened.needs(1, precision=precision, chunk=chunk, context=context)
        fresh = engine.new_state()
        assert needs["recurrent"] == fresh.nbytes
        if context:
            engine.forward(fresh, random_ids(300, context))
        assert needs["state"] == fresh.nbytes
    assert (state.nbytes - needs["recurrent"]) % needs["token"] == 0


@pytest.mark.parametrize("name", ["demo", "base", "odd", "next", "attention-only", "mlx-2"])
@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_what_the_cpu_works_in(find, name: str, precision: str) -> None:
    needs, engine = needs_and_engine(find(name), precision=precision, cache_bytes=CACHE)
    # A few tokens at a time until every expert is in a slot; then all land at once.
    for part in np.split(random_ids(300, 100 * 8), 100):
        engine.forward(engine.new_state(), part)
    before = engine.stats()
    assert before["scratch_bytes"] < needs["scratch"]
    engine.forward(engine.new_state(), random_ids(300, CHUNK))
    after = engine.stats()
    assert after["expert_misses"] == before["expert_misses"]
    assert after["scratch_bytes"] == needs["scratch"]


@pytest.mark.parametrize("threads", [2, 7])
def test_threads_and_a_long_context_take_no_more_than_that(find, threads: int) -> None:
    context = 1000
    needs, engine = needs_and_engine(find("base"), threads=threads, context=context)
    state = engine.new_state()
    for part in np.split(random_ids(300, context), 20):
        engine.forward(state, part)
    taken = engine.stats()["scratch_bytes"]
    assert needs["scratch"] / 4 < taken <= 1.5 * needs["scratch"]


def test_what_the_cpu_works_in_does_not_grow_with_the_context(find) -> None:
    ask = partial(Checkpoint.open(find("base")).needs, 4, threads=16, chunk=2048)
    assert ask(context=1 << 18)["scratch"] == ask(context=1 << 20)["scratch"]


def test_nothing_needs_to_be_here(find) -> None:
    opened = Checkpoint.open(find("mlx-2"))
    there = opened.needs(2, cache_bytes=CACHE)
    opened.files[:] = [Path("nowhere") / path.name for path in opened.files]
    assert opened.needs(2, cache_bytes=CACHE) == there


def test_a_table_that_lacks_a_weight_is_refused() -> None:
    opened = Checkpoint.open("demo")
    del opened.vectors["norm"]
    with pytest.raises(flashmoe.CheckpointError, match="no tensor norm"):
        opened.needs(2)


def test_a_chunk_of_a_prompt_is_as_long_as_memory_allows(find) -> None:
    ask = partial(Checkpoint.open(find("base")).needs, 4)
    chunks = [prompt_chunk(ask, memory) for memory in (1 << 16, 1 << 27, 1 << 40)]
    assert chunks[0] == 128
    assert 128 < chunks[1] < 2048
    assert chunks[2] == 2048
