"""Checkpoint.open finds the very bytes of every weight, in every layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import HUGGING_FACE, MLX, VARIANTS, weights
from table_reader import floats, read
from tensors import Tensor, dequantize, load, of_bytes, quantize, save
from tensors import stored as as_dtype

from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.table import Format
from flashmoe.errors import CheckpointError

Get = Callable[[str], Path]


def by_canonical_name(values: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Matrices and vectors outside experts, Qwen3-Next's projections taken apart."""
    result = {}
    heads, ratio = (
        config.linear_num_key_heads,
        config.linear_num_value_heads // config.linear_num_key_heads,
    )
    k, v = config.linear_key_head_dim, ratio * config.linear_value_head_dim
    for name, value in values.items():
        key = name.removeprefix("model.").removesuffix(".weight")
        base, interleaved, what = key.partition("in_proj_")
        fields: dict[str, list[int]] = {}
        if what == "qkvz":
            fields = {"qkv": [k, k, v], "z": [v]}
        elif what == "ba":
            fields = {"b": [ratio], "a": [ratio]}
        elif ".experts." not in key:
            result[key] = value
        begin = 0
        for field, sizes in fields.items():
            grouped = value.reshape(heads, -1, value.shape[-1])
            pieces = []
            for size in sizes:
                pieces.append(grouped[:, begin : begin + size].reshape(-1, value.shape[-1]))
                begin += size
            result[base + interleaved + field] = np.concatenate(pieces)
    return result


def as_stored(name: str, key: str, matrix: np.ndarray, dtype: str) -> np.ndarray:
    """What is left of a matrix by canonical name once it is quantized as the variant's are."""
    bits, group = VARIANTS[name].mlx or (16, 0)
    if bits != 16 and key.endswith(("mlp.gate", "shared_expert_gate")):
        bits, group = 8, 64
    if bits == 16 or matrix.shape[-1] % group:
        return matrix
    return dequantize(*quantize(matrix, dtype, bits, group), bits, group)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_is_found(checkpoint: Get, name: str) -> None:
    stored = Checkpoint.open(checkpoint(name))
    dtype = VARIANTS[name].dtype
    values = {key: tensor.floats() for key, tensor in weights(name).items()}
    expected = by_canonical_name(values, stored.config)
    matrices = {key for key, value in expected.items() if value.ndim == 2}
    assert stored.matrices.keys() == matrices
    for key, matrix in stored.matrices.items():
        found = floats(stored, matrix.format, matrix.parts)
        assert np.array_equal(found, as_stored(name, key, expected[key], dtype)), key

    assert stored.vectors.keys() == expected.keys() - matrices
    for key, vector in stored.vectors.items():
        weight = expected[key].flatten()
        zero_centred = "norm" in key and not key.endswith("linear_attn.norm")
        assert vector.plus_one == (zero_centred and name in HUGGING_FACE), key
        if zero_centred and name in MLX:
            weight = as_dtype(weight + 1, dtype).floats()
        found = of_bytes(vector.dtype, read(stored, vector.extents)).floats()
        assert np.array_equal(found, weight), key
        assert vector.length == weight.size

    assert len(stored.experts) == len(stored.config.layer_types)
    for layer, experts in enumerate(stored.experts):
        extents = experts.extents.reshape(stored.config.num_experts, experts.parts, 1, 3)
        block = f"model.layers.{layer}.mlp.experts."
        gates, ups = np.split(values[block + "gate_up_proj"], 2, axis=1)
        first = 0
        for kind, whole in (("gate", gates), ("up", ups), ("down", values[block + "down_proj"])):
            form: Format = getattr(experts, kind)
            for expert, weight in enumerate(whole):
                parts = list(extents[expert, first : first + form.parts])
                found = floats(stored, form, parts)
                assert np.array_equal(found, as_stored(name, kind, weight, dtype)), (layer, expert)
            first += form.parts


@pytest.mark.parametrize("name", VARIANTS)
def test_every_extent_lies_in_its_file_and_has_the_bytes_of_its_part(
    checkpoint: Get, name: str
) -> None:
    stored = Checkpoint.open(checkpoint(name))
    sizes = np.array([file.stat().st_size for file in stored.files])
    everything = [vector.extents for vector in stored.vectors.values()]
    for matrix in stored.matrices.values():
        everything += matrix.parts
        for part, extents in enumerate(matrix.parts):
            assert extents[:, 2].sum() == matrix.format.part_bytes(part)
    for experts in stored.experts:
        everything.append(experts.extents)
        lengths = [
            format.part_bytes(part)
            for format in (experts.gate, experts.up, experts.down)
            for part in range(format.parts)
        ]
        assert (experts.extents[:, 2].reshape(-1, experts.parts) == lengths).all()
        assert sum(lengths) == experts.expert_bytes
    extents = np.concatenate(everything)
    assert extents.dtype == np.int64
    assert (extents[:, 1] >= 8).all()
    assert (extents[:, 1] + extents[:, 2] <= sizes[extents[:, 0]]).all()


def test_exceptions_of_the_quantization_key_are_believed(checkpoint: Get) -> None:
    stored = Checkpoint.open(checkpoint("mlx-4"))
    formats = {name: matrix.format for name, matrix in stored.matrices.items()}
    for name, format in formats.items():
        narrow = not name.endswith((".mlp.gate", ".mlp.shared_expert_gate"))
        assert (format.bits, format.group) == ((4, 64) if narrow else (8, 64)), name


def test_columns_that_groups_do_not_divide_are_read_dense(checkpoint: Get) -> None:
    experts = Checkpoint.open(checkpoint("mlx-4-partly-dense")).experts[0]
    assert (experts.gate.bits, experts.up.bits, experts.down.bits) == (4, 4, 0)
    assert experts.parts == 7


def test_separate_quantized_experts_with_padding_are_read_as_stacked_ones(
    checkpoint: Get, tmp_path: Path
) -> None:
    """pack's layout; the format of switch_mlp in config.json is that of each expert."""
    stacked = Checkpoint.open(checkpoint("mlx-4"))
    directory = Path(shutil.copytree(stacked.directory, tmp_path / "separate"))
    tensors = {"padding.0": Tensor("U8", np.zeros(24, np.uint8))}
    for name, tensor in load(directory / "model.safetensors").items():
        module, found, part = name.partition(".switch_mlp.")
        pieces = enumerate(tensor.array) if found else ()
        for expert, piece in pieces:
            tensors[f"{module}.experts.{expert}.{part}"] = Tensor(tensor.dtype, piece)
        if not found:
            tensors[name] = tensor
    save(tensors, directory / "model.safetensors")
    (directory / "model.safetensors.index.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    config["quantization"] = {"bits": 8, "group_size": 64} | {
        name.rpartition(".")[0].replace("experts.0.", "switch_mlp."): {
            "bits": 8 if name.endswith(("mlp.gate.scales", "shared_expert_gate.scales")) else 4,
            "group_size": 64,
        }
        for name in tensors
        if name.endswith(".scales") and ("experts." not in name or "experts.0." in name)
    }
    (directory / "config.json").write_text(json.dumps(config))

    separate = Checkpoint.open(directory)
    for ours, theirs in zip(separate.experts, stacked.experts, strict=True):
        assert (ours.gate, ours.up, ours.down) == (theirs.gate, theirs.up, theirs.down)
        assert read(separate, ours.extents) == read(stacked, theirs.extents)


def test_the_head_of_a_tied_checkpoint_is_absent(checkpoint: Get) -> None:
    for name in ("tied", "mlx-tied"):
        stored = Checkpoint.open(checkpoint(name))
        assert "lm_head" not in stored.matrices
        assert stored.config.tie_word_embeddings


def test_links_into_a_hub_cache_are_followed(checkpoint: Get, tmp_path: Path) -> None:
    shutil.copytree(checkpoint("sharded"), tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / file.name)
    stored = Checkpoint.open(snapshot)
    assert all(file.parent == snapshot for file in stored.files)


def test_something_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        Checkpoint.open(tmp_path / "nowhere")
