"""`flashmoe verify`, and packing: holes that a download left are found, and nothing else is one."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import VARIANTS
from fake_engine import make_tokenizer
from tensors import load, quantize, save
from typer.testing import CliRunner

from flashmoe.checkpoint.headers import read_header
from flashmoe.cli.main import app
from flashmoe.errors import CheckpointError
from flashmoe.measure.verify import verify
from flashmoe.pack.pack import pack

Get = Callable[[str], Path]
MLX = "language_model.model."


@pytest.fixture
def copy(checkpoint: Get, tmp_path: Path) -> Get:
    """Likewise, but a copy to change."""
    return lambda name: Path(shutil.copytree(checkpoint(name), tmp_path / "model"))


def punch(directory: Path, name: str, begin: int, nbytes: int) -> None:
    """Zeros over some bytes of a tensor, as a file system gives them for what was not written."""
    for file in directory.glob("*.safetensors"):
        if (tensor := read_header(file).get(name)) is not None:
            assert begin + nbytes <= tensor.nbytes
            with file.open("r+b") as stream:
                stream.seek(tensor.offset + begin)
                stream.write(bytes(nbytes))


@pytest.mark.parametrize("name", VARIANTS)
def test_whole_models_are_good(checkpoint: Get, name: str) -> None:
    calls: list[tuple[int, int]] = []
    found = verify(checkpoint(name), progress=lambda *call: calls.append(call))
    assert found.good, found.faults
    assert calls[-1][0] == calls[-1][1] == found.searched


HOLES: dict[str, tuple[str, str, int, int]] = {
    "an expert": ("fused", "model.layers.1.mlp.experts.gate_up_proj", 100_001, 4096),
    "a whole expert": ("base", "model.layers.1.mlp.experts.3.up_proj.weight", 0, 64 * 128 * 4),
    "half of an expert": ("base", "model.layers.1.mlp.experts.3.up_proj.weight", 0, 64 * 64 * 4),
    "a sector of a projection": ("base", "model.layers.0.linear_attn.out_proj.weight", 777, 515),
    "rows of the embedding": ("base", "model.embed_tokens.weight", 512 * 100, 512 * 20),
    "the first rows of the head": ("base", "lm_head.weight", 0, 512 * 10),
    "much of the end of the head": ("base", "lm_head.weight", 512 * 160, 512 * 160),
    "a convolution": (
        "nested",
        "model.language_model.layers.0.linear_attn.conv1d.weight",
        512,
        1024,
    ),
    "words": ("mlx-4", f"{MLX}layers.1.mlp.switch_mlp.up_proj.weight", 5000, 4096),
    "words of the embedding's last rows": ("mlx-4", f"{MLX}embed_tokens.weight", 20480 - 640, 640),
    "scales": ("mlx-4", f"{MLX}embed_tokens.scales", 128, 640),
    "biases": ("mlx-4", f"{MLX}embed_tokens.biases", 128, 640),
    "words of 2 bits": ("mlx-2", f"{MLX}layers.0.mlp.switch_mlp.down_proj.weight", 0, 2048),
}


@pytest.mark.parametrize("case", HOLES)
def test_a_hole_is_found_by_verify_and_stops_a_pack(copy: Get, tmp_path: Path, case: str) -> None:
    name, tensor, begin, nbytes = HOLES[case]
    directory = copy(name)
    punch(directory, tensor, begin, nbytes)
    found = verify(directory)
    assert not found.good
    (fault, *_) = found.faults
    assert "where no weight is zero: that part was never downloaded" in fault
    assert str(directory) in fault and ("layers." in tensor) == ("layers." in fault)
    with pytest.raises(CheckpointError, match="where no weight is zero"):
        pack(directory, tmp_path / "pack", bits=4)
    assert not (tmp_path / "pack/config.json").exists()


def test_zeros_that_mean_something_are_no_hole(copy: Get, tmp_path: Path) -> None:
    directory = copy("base")
    tensors = load(directory / "model.safetensors")
    tensors["model.embed_tokens.weight"].array[-15:] = 0  # no token's
    tensors["model.embed_tokens.weight"].array[7] = 0  # the token that pads
    tensors["lm_head.weight"].array[-3:] = 0
    tensors["model.norm.weight"].array[:] = 0  # zero-centred, and never trained
    tensors["model.layers.0.linear_attn.dt_bias"].array[:] = 0
    pruned = tensors["model.layers.0.mlp.experts.2.up_proj.weight"].array
    pruned[np.random.default_rng(1).random(pruned.shape) < 0.5] = 0
    pruned[20:24] = 0
    save(tensors, directory / "model.safetensors")
    assert verify(directory).faults == ()
    pack(directory, tmp_path / "pack", bits=4)
    assert verify(tmp_path / "pack").faults == ()


def test_groups_of_zeros_that_were_quantized_are_no_hole(copy: Get) -> None:
    directory = copy("mlx-4")
    tensors = load(directory / "model.safetensors")
    name = f"{MLX}layers.0.linear_attn.in_proj_qkv"
    parts = quantize(np.zeros((256, 128), np.float32), "BF16", 4, 64)
    for suffix, part in zip((".weight", ".scales", ".biases"), parts, strict=True):
        assert tensors[name + suffix].array.shape == part.array.shape
        tensors[name + suffix] = part
    save(tensors, directory / "model.safetensors")
    assert verify(directory).faults == ()


def _as_hub_cache(directory: Path, at: Path) -> Path:
    """The same as links to blobs called by their hashes, as the hub's cache has them."""
    snapshot = at / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (at / "blobs").mkdir()
    for file in directory.iterdir():
        data = file.read_bytes()
        name = hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()
        if file.suffix == ".safetensors":
            name = hashlib.sha256(data).hexdigest()
        (at / "blobs" / name).write_bytes(data)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def test_files_of_the_hubs_cache_are_compared_with_its_hashes(
    checkpoint: Get, tmp_path: Path
) -> None:
    snapshot = _as_hub_cache(checkpoint("nested-bf16-sharded"), tmp_path)
    found = verify(snapshot)
    assert found.good and found.searched == 0
    assert all(file.published for file in found.files)
    assert {"config.json", "generation_config.json"} <= {file.name for file in found.files}
    for name in ("generation_config.json", next(snapshot.glob("model-00001-of-*")).name):
        blob = (snapshot / name).resolve()
        data = blob.read_bytes()
        blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name[0] == "m" else data + b" ")
        faults = verify(snapshot).faults
        blob.write_bytes(data)
        assert len(faults) == 1 and f"{name}: is not the file that the hub has" in faults[0]


def test_hashes_of_a_download_to_a_directory_are_known(copy: Get) -> None:
    directory = copy("base")
    data = (directory / "model.safetensors").read_bytes()
    notes = directory / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    note = notes / "model.safetensors.metadata"
    note.write_text(f"{'0' * 40}\n{hashlib.sha256(data).hexdigest()}\n1700000000.0\n")
    assert verify(directory).good and verify(directory).searched == 0
    note.write_text(f"{'0' * 40}\n{'a' * 64}\n1700000000.0\n")
    assert not verify(directory).good
    note.write_bytes(b"\xff")
    assert verify(directory).searched > 0


def test_the_command_says_what_is_wrong_and_ends_with_1(copy: Get) -> None:
    directory = copy("base")
    make_tokenizer().save(str(directory / "tokenizer.json"))
    result = CliRunner().invoke(app, ["verify", str(directory)])
    assert result.exit_code == 0 and result.stdout.endswith(": good\n")
    for expert in range(8):
        for kind in ("gate", "up", "down"):
            name = f"model.layers.1.mlp.experts.{expert}.{kind}_proj.weight"
            punch(directory, name, 0, 4096)
    result = CliRunner().invoke(app, ["verify", str(directory)])
    assert result.exit_code == 1 and result.stdout.endswith(
        "and 4 more\n" + f"{directory}: DAMAGED\n"
    )
    result = CliRunner().invoke(app, ["verify", str(directory), "--json"])
    assert result.exit_code == 1 and not json.loads(result.stdout)["good"]
