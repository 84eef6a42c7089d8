"""`flashmoe pack`: MLX's values, the layout promised, never a directory that opens but is wrong."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from engines import TestEngine, random_ids
from table_reader import floats
from tensors import load, quantize

from flashmoe.checkpoint.headers import read_header
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.errors import ArgumentError, CheckpointError, ReadError, WriteError
from flashmoe.pack.convert import to_bf16
from flashmoe.pack.layout import EXPERT_ALIGNMENT, PART_ALIGNMENT
from flashmoe.pack.pack import pack

ROOT = Path(__file__).parents[1]
PREFIX = "language_model.model."
Get = Callable[[str], Path]


@pytest.fixture(scope="session")
def source(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint of 8 bits."""
    directory = tmp_path_factory.mktemp("pack") / "source"
    shape = maker.Shape(128, 2, 4, 2, 64, 64, 320, 4, 2, 32, 2, 4, 32, full_attention_interval=2)
    maker.make_checkpoint(directory, shape, bits=8)
    return directory


def tensors(directory: Path) -> dict[str, npt.NDArray[Any]]:
    """Every tensor of a pack but the padding; bfloat16 as uint16."""
    return {
        name: tensor.array
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load(file).items()
        if not name.startswith("padding.")
    }


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


# Values


@pytest.mark.parametrize(
    ("variant", "bits", "group"),
    [
        ("nested", 4, 64),
        ("bf16", 8, 32),
        ("bf16", 4, 32),
        ("fused", 2, 64),
        ("f16", 4, 64),
        ("next-ratio-4", 4, 64),
        ("mlx-4-group-128", 2, 128),
        ("mlx-dense", 8, 64),
        ("mlx-4", 2, 64),
        ("mlx-8", 4, 32),
        ("mlx-2", 8, 64),
    ],
)
def test_every_quantized_tensor_is_what_mlx_makes_of_it(
    checkpoint: Get, tmp_path: Path, variant: str, bits: int, group: int
) -> None:
    opened = Checkpoint.open(checkpoint(variant))
    pack(checkpoint(variant), tmp_path / "pack", bits=bits, group_size=group)
    packed = tensors(tmp_path / "pack")

    def check(path: str, form: Any, parts: Any) -> None:
        router = path.endswith(("mlp.gate", "shared_expert_gate"))
        new_bits, new_group = (8, 64) if router else (bits, group)
        if (form.bits, form.group) == (new_bits, new_group):
            return  # copied, which another test sees
        weight = floats(opened, form, parts)
        expected = quantize(weight, form.dtype, new_bits, new_group)
        for suffix, want in zip((".weight", ".scales", ".biases"), expected, strict=True):
            have = packed[path + suffix].reshape(want.array.shape)
            np.testing.assert_array_equal(have.view(np.uint8), want.array.view(np.uint8), path)

    for name, matrix in opened.matrices.items():
        path = "language_model.lm_head" if name == "lm_head" else PREFIX + name
        check(path, matrix.format, matrix.parts)
    for layer, experts in enumerate(opened.experts):
        table = experts.extents.reshape(opened.config.num_experts, 3, -1, 1, 3)
        forms = (experts.gate, experts.up, experts.down)
        for expert, row in enumerate(table):
            for kind, form, parts in zip(("gate", "up", "down"), forms, row, strict=True):
                path = f"{PREFIX}layers.{layer}.mlp.experts.{expert}.{kind}_proj"
                check(path, form, parts)


@pytest.mark.parametrize(
    ("variant", "bits"), [("mlx-4", 4), ("mlx-2", 2), ("mlx-next", 4), ("bf16", 16), ("f16", 16)]
)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_pack_of_the_same_bits_gives_the_same_logits(
    checkpoint: Get, tmp_path: Path, variant: str, bits: int, precision: str
) -> None:
    pack(checkpoint(variant), tmp_path / "pack", bits=bits)
    ids = random_ids(300, 40)
    expected = TestEngine(checkpoint(variant), precision=precision).logits(ids)
    assert np.array_equal(TestEngine(tmp_path / "pack", precision=precision).logits(ids), expected)


def test_columns_that_the_group_does_not_divide_stay_at_16_bits(
    checkpoint: Get, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "flashmoe"):
        summary = pack(checkpoint("mlx-4-partly-dense"), tmp_path / "pack")
    assert len(summary.dense) == 8  # down_proj of the routed and shared experts of 4 layers
    assert all(path.endswith("down_proj") for path in summary.dense)
    for path in summary.dense:
        assert f"{path} stays at 16 bits: groups of 64 do not divide it" in caplog.text
    config = json.loads((tmp_path / "pack/config.json").read_text())
    assert all(config["quantization"][path] is False for path in summary.dense)
    opened = Checkpoint.open(tmp_path / "pack")
    assert all(experts.down.bits == 0 and experts.gate.bits == 4 for experts in opened.experts)
    TestEngine(tmp_path / "pack").logits(random_ids(300, 5))


# Layout


def test_a_router_has_a_group_of_its_own(maker: ModuleType, tmp_path: Path) -> None:
    """64, where the pack's is 128 and does not divide the columns."""
    shape = maker.Shape(192, 2, 4, 2, 64, 64, 320, 4, 2, 32, 2, 4, 32, full_attention_interval=2)
    maker.make_checkpoint(tmp_path / "source", shape, bits=8)
    pack(tmp_path / "source", tmp_path / "pack", bits=4, group_size=128)
    said = json.loads((tmp_path / "pack/config.json").read_text())["quantization"]
    assert said[f"{PREFIX}layers.0.mlp.gate"] == {"group_size": 64, "bits": 8}


def test_scales_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8], np.float32)
    assert [hex(value) for value in to_bf16(ties)] == ["0x3f80", "0x3f82", "0x3f81", "0xbf80"]


def test_an_expert_is_one_extent_at_a_multiple_of_16_kib(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "pack", bits=2)
    opened = Checkpoint.open(tmp_path / "pack")
    assert [file.name for file in opened.files] == [
        "layer-000.safetensors", "layer-001.safetensors", "resident.safetensors"
    ]  # fmt: skip
    for layer, experts in enumerate(opened.experts):
        file = opened.files[int(experts.extents[0, 0])]
        assert file.name == f"layer-{layer:03d}.safetensors"
        assert (experts.extents[:, 0] == experts.extents[0, 0]).all()
        for parts in experts.extents.reshape(opened.config.num_experts, 9, 3)[:, :, 1:]:
            begins, ends = parts[:, 0], parts.sum(axis=1)
            assert begins[0] % EXPERT_ALIGNMENT == 0
            assert (begins % PART_ALIGNMENT == 0).all()
            gaps = begins[1:] - ends[:-1]
            assert ((gaps >= 0) & (gaps < PART_ALIGNMENT)).all()  # in the order they are used


def test_a_pack_says_what_it_is_and_takes_the_tokenizer_along(source: Path, tmp_path: Path) -> None:
    summary = pack(source, tmp_path / "pack", bits=2, group_size=32)
    config = json.loads((tmp_path / "pack/config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (2, 32)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "pack" / name).read_bytes() == (source / name).read_bytes()
    files = list((tmp_path / "pack").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) == summary.nbytes == summary.written
    index = json.loads((tmp_path / "pack/model.safetensors.index.json").read_text())["weight_map"]
    for file in files:
        assert {name for name, of in index.items() if of == file.name} == set(read_header(file))


def test_threads_change_no_byte(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "one", threads=1)
    pack(source, tmp_path / "three", threads=3)
    assert content(tmp_path / "one") == content(tmp_path / "three")


# Room, progress and memory


@pytest.mark.parametrize("missing", [0, 1])
def test_the_disk_is_checked_before_a_weight_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    needed = pack(source, tmp_path / "first").nbytes
    room = SimpleNamespace(free=needed - missing)
    monkeypatch.setattr("flashmoe.pack.pack.shutil.disk_usage", lambda path: room)
    if not missing:
        pack(source, tmp_path / "second")
        return
    with pytest.raises(WriteError, match=r"second: .* to write, .* free; make room"):
        pack(source, tmp_path / "second")
    assert [path.name for path in (tmp_path / "second").iterdir()] == ["pack.json"]


def test_progress_counts_every_byte_once(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    summary = pack(source, tmp_path / "pack", progress=lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done[0] == 0 and done[-1] == summary.nbytes and done == sorted(done)
    assert {total for _, total in calls} == {summary.nbytes}
    assert len(calls) > 50
    calls.clear()
    assert pack(source, tmp_path / "pack", progress=lambda *call: calls.append(call)).written == 0
    assert calls == [(summary.nbytes, summary.nbytes)]


def test_memory_is_about_that_of_a_layer(maker: ModuleType, tmp_path: Path) -> None:
    shape = maker.Shape(512, 8, 32, 2, 256, 64, 320, 4, 2, 64, 2, 4, 64)
    nbytes = maker.make_checkpoint(tmp_path / "source", shape, bits=8)
    script = (
        "import resource, sys; from flashmoe.pack.pack import pack\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "pack(sys.argv[2], sys.argv[3] + '-warm', threads=2); before = peak()\n"
        "pack(sys.argv[1], sys.argv[3], threads=2); print(peak() - before)"
    )
    maker.make_checkpoint(tmp_path / "small", maker.PRESETS["tiny"], bits=8)
    grown = python("-c", script, tmp_path / "source", tmp_path / "small", tmp_path / "pack")
    assert nbytes > 100e6
    assert int(grown) * 1024 < nbytes / 8


def python(*arguments: str | Path) -> str:
    """What a new interpreter prints."""
    command = [sys.executable, *map(str, arguments)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    return run.stdout


# Stopped


def test_killed_at_any_moment_it_resumes_and_never_opens_wrong(
    source: Path, tmp_path: Path
) -> None:
    pack(source, tmp_path / "whole")
    (tmp_path / "scratch").mkdir()
    moments = python(ROOT / "tests/kill_pack.py", source, tmp_path / "scratch", tmp_path / "whole")
    assert int(moments) > 30


def test_files_that_are_complete_are_not_written_again(source: Path, tmp_path: Path) -> None:
    whole = pack(source, tmp_path / "pack")
    before = content(tmp_path / "pack")
    file = tmp_path / "pack/layer-001.safetensors"
    size = file.stat().st_size
    file.unlink()
    (tmp_path / "pack/config.json").unlink()
    assert pack(source, tmp_path / "pack").written == size < whole.written
    assert content(tmp_path / "pack") == before


def test_ctrl_c_keeps_what_is_complete(source: Path, tmp_path: Path) -> None:
    pack(source, tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        if done > total * 9 // 10:  # in the last of three files
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "pack", progress=interrupt)
    names = {path.name for path in (tmp_path / "pack").iterdir()}
    assert not any(name.endswith(".part") for name in names)
    assert "resident.safetensors" in names and "config.json" not in names
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(tmp_path / "pack")
    pack(source, tmp_path / "pack")
    assert content(tmp_path / "pack") == content(tmp_path / "whole")


def test_a_full_disk_names_the_file_and_is_no_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack(source, tmp_path / "whole")
    pwrite, calls = os.pwrite, iter(range(1 << 30))

    def full(fd: int, data: Any, offset: int) -> int:
        if next(calls) == 100:
            raise OSError(28, os.strerror(28))
        return pwrite(fd, data, offset)

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(WriteError, match=r"\.safetensors: cannot be written: No space left"):
        pack(source, tmp_path / "pack")
    pack(source, tmp_path / "pack")
    assert content(tmp_path / "pack") == content(tmp_path / "whole")


# Refused


def test_a_source_that_is_damaged_in_the_middle_leaves_nothing_that_opens(
    source: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    file = next(copy.glob("*.safetensors"))
    tensor = read_header(file)[PREFIX + "layers.1.mlp.switch_mlp.up_proj.scales"]
    with file.open("r+b") as stream:
        stream.seek(tensor.offset + tensor.nbytes - 2)
        stream.write(b"\x80\x7f")  # infinity
    with pytest.raises(CheckpointError, match=rf"{file.name}: .*experts\.3\.up_proj.*not finite"):
        pack(copy, tmp_path / "pack")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint.open(tmp_path / "pack")


def test_a_source_that_shrinks_meanwhile_is_a_read_error(source: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "source"))
    file = next(copy.glob("*.safetensors"))

    def shrink(done: int, total: int) -> None:
        os.truncate(file, 1000)

    with pytest.raises(ReadError, match=rf"{file.name}: \d+ bytes at \d+: only \d+ are there"):
        pack(copy, tmp_path / "pack", progress=shrink)
    assert not (tmp_path / "pack/config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits is 3; choose one of 2, 4, 8, 16"),
        ({"group_size": 48}, "group_size is 48; choose one of 32, 64, 128"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_options_that_do_not_exist_are_named(
    source: Path, tmp_path: Path, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        pack(source, tmp_path / "pack", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "pack").exists()


def test_a_destination_that_holds_something_else_is_left_alone(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArgumentError, match=r"holds something else \(notes\.txt"):
        pack(source, tmp_path)
    with pytest.raises(ArgumentError, match="holds something else"):
        pack(source, source)
    pack(source, tmp_path / "pack")
    before = content(tmp_path / "pack")
    for other in ({"bits": 2}, {"group_size": 32}):
        with pytest.raises(ArgumentError, match=r"another way \(pack\.json differs in"):
            pack(source, tmp_path / "pack", **other)  # type: ignore[arg-type]
    assert content(tmp_path / "pack") == before


def test_two_processes_do_not_pack_to_one_directory(source: Path, tmp_path: Path) -> None:
    def again(done: int, total: int) -> None:
        with pytest.raises(WriteError, match="another process is packing to it"):
            pack(source, tmp_path / "pack")

    pack(source, tmp_path / "pack", progress=again)
