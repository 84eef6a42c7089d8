"""The fingerprint of a checkpoint: the same for the same bits, another for other ones."""

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from flashmoe.checkpoint.headers import read_header
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.errors import ReadError
from flashmoe.pack.pack import pack


@pytest.fixture(scope="module")
def tiny(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("fingerprint") / "tiny"
    maker.make_checkpoint(directory, maker.PRESETS["tiny"])
    return directory


def fingerprint(directory: Path) -> str:
    return Checkpoint.open(directory).fingerprint


def flip(directory: Path, name: str) -> None:
    """Changes the first byte of a tensor."""
    for path in directory.glob("*.safetensors"):
        tensor = read_header(path).get(name)
        if tensor is not None:
            with path.open("r+b") as file:
                file.seek(tensor.offset)
                byte = file.read(1)[0]
                file.seek(tensor.offset)
                file.write(bytes([byte ^ 1]))
            return
    raise AssertionError(name)


def test_a_pack_of_the_same_bits_has_the_fingerprint_of_its_source(tiny, tmp_path) -> None:
    pack(tiny, tmp_path / "packed", bits=4, group_size=64)
    assert fingerprint(tmp_path / "packed") == fingerprint(tiny)
    pack(tiny, tmp_path / "other", bits=8, group_size=64)
    assert fingerprint(tmp_path / "other") != fingerprint(tiny)


def test_one_that_is_dense_and_zero_centred_has_it_too(checkpoint, tmp_path) -> None:
    source = checkpoint("nested-bf16-sharded")  # its norms are stored less 1, those of a pack not
    pack(source, tmp_path / "packed", bits=16)
    assert fingerprint(tmp_path / "packed") == fingerprint(source)


def test_every_resident_tensor_counts(tiny, tmp_path) -> None:
    known = {fingerprint(tiny)}
    checkpoint = Checkpoint.open(tiny)
    names = [
        name
        for path in checkpoint.files
        for name in read_header(path)
        if ".experts." not in name and "switch_mlp" not in name
    ]
    assert len(names) > 60
    copy = tmp_path / "copy"
    shutil.copytree(tiny, copy)
    for name in names:
        flip(copy, name)
        found = fingerprint(copy)
        assert found not in known, name
        known.add(found)


def test_experts_and_config_count(tiny, tmp_path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    checkpoint = Checkpoint.open(copy)
    name = next(
        name for path in checkpoint.files for name in read_header(path) if "up_proj.scales" in name
    )
    flip(copy, name)
    assert fingerprint(copy) != fingerprint(tiny)
    flip(copy, name)
    assert fingerprint(copy) == fingerprint(tiny)
    path = copy / "config.json"
    config = json.loads(path.read_text())
    (config.get("text_config") or config)["rms_norm_eps"] = 0.5
    path.write_text(json.dumps(config))
    assert fingerprint(copy) != fingerprint(tiny)


def test_a_file_that_shrank_is_named(tiny, tmp_path) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    checkpoint = Checkpoint.open(copy)
    for path in checkpoint.files:
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ReadError, match=r"safetensors: \d+ bytes at \d+: only \d+ are there"):
        _ = checkpoint.fingerprint
