"""What goes wrong while weights are read: an exception that names the file, and nothing lost."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import TestEngine, random_ids

from flashmoe.checkpoint.headers import read_header
from flashmoe.errors import CheckpointError, ReadError, StateError

GetCheckpoint = Callable[[str], Path]


@pytest.fixture
def directory(checkpoint: GetCheckpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("mlx-4"), tmp_path / "model"))


# The least cache there is: experts do not stay, and are read past the page cache.
@pytest.mark.parametrize("cache_bytes", [0, 1])
def test_a_file_that_shrinks_mid_run_names_itself_and_the_model_goes_on(
    directory: Path, cache_bytes: int
) -> None:
    engine = TestEngine(directory, cache_bytes=cache_bytes)
    ids = random_ids(300, 40)
    expected = engine.logits(ids)
    state = engine.native.new_state()
    engine.logits(ids[:20], state)
    file = next(directory.glob("*.safetensors"))
    whole = file.read_bytes()
    os.truncate(file, len(whole) // 3)
    with pytest.raises(ReadError, match=rf"{file.name}: reading \d+ bytes at offset \d+"):
        engine.logits(ids[20:], state)
    assert state.position == 20
    with file.open("r+b") as again:
        again.write(whole)
    assert np.array_equal(engine.logits(ids[20:], state), expected[20:])


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives EIO")
def test_an_io_error_names_file_and_offset_and_the_model_goes_on(directory: Path) -> None:
    engine = TestEngine(directory)
    ids = random_ids(300, 40)
    expected = engine.logits(ids)
    state = engine.native.new_state()
    opened = [Path("/proc/self/fd") / entry for entry in os.listdir("/proc/self/fd")]
    numbers = [int(fd.name) for fd in opened if os.path.realpath(fd).startswith(str(directory))]
    assert numbers
    # This process's memory, where nothing is mapped: reading it is an input/output error.
    broken = os.open("/proc/self/mem", os.O_RDONLY)
    saved = [os.dup(number) for number in numbers]
    for number in numbers:
        os.dup2(broken, number)
    with pytest.raises(ReadError, match=r"safetensors: reading \d+ bytes at offset \d+: Input/out"):
        engine.logits(ids, state)
    assert state.position == 0
    for number, copy in zip(numbers, saved, strict=True):
        os.dup2(copy, number)
    assert np.array_equal(engine.logits(ids, state), expected)


@pytest.mark.parametrize("cache_bytes", [0, 1])
def test_a_file_that_vanishes_mid_run_is_still_read(directory: Path, cache_bytes: int) -> None:
    engine = TestEngine(directory, cache_bytes=cache_bytes)
    ids = random_ids(300, 10)
    expected = engine.logits(ids)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    assert np.array_equal(engine.logits(ids), expected)


def test_a_missing_file_is_named_when_the_model_opens(directory: Path) -> None:
    file = next(directory.glob("*.safetensors"))
    file.unlink()
    with pytest.raises((CheckpointError, ReadError), match=r"safetensors"):
        TestEngine(directory)


def overwrite(directory: Path, suffix: str, value: bytes, at: int) -> str:
    """Writes `value` at byte `at` of the first tensor so named; returns the file's name."""
    for file in directory.glob("*.safetensors"):
        for name, tensor in read_header(file).items():
            if name.endswith(suffix):
                with file.open("r+b") as stream:
                    stream.seek(tensor.offset + at)
                    stream.write(value)
                return file.name
    raise AssertionError(suffix)


NAN_BF16 = b"\xc0\x7f"


@pytest.mark.parametrize(
    "suffix", ["embed_tokens.scales", "input_layernorm.weight", "mlp.gate.biases"]
)
def test_nan_in_a_resident_weight_names_file_and_tensor(directory: Path, suffix: str) -> None:
    name = overwrite(directory, suffix, NAN_BF16, at=2)
    with pytest.raises(CheckpointError, match=rf"{name}: tensor .*: element 1 is infinite or NaN"):
        TestEngine(directory)


def test_nan_in_an_expert_names_file_layer_and_expert(directory: Path) -> None:
    name = overwrite(directory, "layers.1.mlp.switch_mlp.up_proj.scales", NAN_BF16 * 256, at=0)
    engine = TestEngine(directory)
    state = engine.native.new_state()
    with pytest.raises(CheckpointError, match=rf"{name}: layer 1, expert \d, up_proj.scales"):
        engine.logits(random_ids(300, 40), state)
    assert state.position == 0


def test_a_closed_model_says_so(directory: Path) -> None:
    engine = TestEngine(directory)
    state = engine.native.new_state()
    engine.native.close()
    with pytest.raises(StateError, match="closed"):
        engine.logits([5], state)
