"""Damaged checkpoints: each is refused by a CheckpointError that names the file, and the tensor.

What only a run can find (NaN among an expert's scales, a file that shrinks meanwhile) is in
test_read_errors.py; damaged config.json files are in test_config.py.
"""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensors import Tensor, load, save, stored

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.errors import CheckpointError

Get = Callable[[str], Path]
Damage = Callable[[Path], None]
Json = dict[str, Any]

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
SHARD = "model-00001-of-"
EMBEDDING = "model.embed_tokens.weight"
GATE = "model.layers.0.mlp.gate.weight"
MLX = "language_model.model."

DAMAGES: dict[str, tuple[str, Damage, tuple[str, ...]]] = {}
"""By name: the variant to damage, what damages it, and what the message must hold."""


def damage(variant: str, *words: str) -> Callable[[Damage], Damage]:
    def register(function: Damage) -> Damage:
        DAMAGES[function.__name__] = variant, function, words
        return function

    return register


def split_header(file: Path) -> tuple[bytes, bytes]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def write_header(file: Path, text: bytes, data: bytes) -> None:
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(directory: Path, change: Callable[[Json], object]) -> None:
    text, data = split_header(directory / WEIGHTS)
    header = json.loads(text)
    change(header)
    write_header(directory / WEIGHTS, json.dumps(header).encode(), data)


def edit_json(file: Path, change: Callable[[Json], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    edit_json(directory / INDEX, lambda index: change(index["weight_map"]))


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Leaves a file that is sound as safetensors, and an index, if any, that agrees with it."""
    tensors = load(directory / WEIGHTS)
    change(tensors)
    save(tensors, directory / WEIGHTS)
    if (directory / INDEX).exists():
        edit_json(
            directory / INDEX,
            lambda index: index.update(weight_map=dict.fromkeys(tensors, WEIGHTS)),
        )


def edit_tensor(directory: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({name: change(tensors[name])}))


def zeros(*shape: int) -> Tensor:
    return stored(np.zeros(shape, np.float32), "F32")


# The file of a checkpoint that is one file.


@damage("base", WEIGHTS, "at least 8")
def an_empty_file(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(b"")


@damage("base", WEIGHTS, "truncated")
def a_file_that_ends_in_its_header(directory: Path) -> None:
    os.truncate(directory / WEIGHTS, 1000)


@damage("base", WEIGHTS, "truncated")
def a_file_that_lacks_its_second_half(directory: Path) -> None:
    os.truncate(directory / WEIGHTS, (directory / WEIGHTS).stat().st_size // 2)


@damage("base", WEIGHTS, "truncated")
def a_file_that_lacks_its_last_byte(directory: Path) -> None:
    os.truncate(directory / WEIGHTS, (directory / WEIGHTS).stat().st_size - 1)


@damage("base", WEIGHTS, "1 bytes", "belong to no tensor")
def a_byte_after_the_last_tensor(directory: Path) -> None:
    with (directory / WEIGHTS).open("ab") as file:
        file.write(b"\0")


@damage("base", WEIGHTS, "header of 9223372036854775808 bytes")
def a_header_length_of_2_to_the_63(directory: Path) -> None:
    with (directory / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", 1 << 63))


@damage("base", WEIGHTS, "not valid JSON")
def a_header_length_one_too_small(directory: Path) -> None:
    text, _ = split_header(directory / WEIGHTS)
    with (directory / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", len(text.rstrip()) - 1))


@damage("base", WEIGHTS, "header")
def a_header_length_one_too_large(directory: Path) -> None:
    text, _ = split_header(directory / WEIGHTS)
    with (directory / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", len(text) + 1))


@damage("base", WEIGHTS, "header", "not valid JSON")
def a_header_of_no_bytes(directory: Path) -> None:
    with (directory / WEIGHTS).open("r+b") as file:
        file.write(struct.pack("<Q", 0))


@damage("base", WEIGHTS, "not UTF-8")
def a_header_that_is_not_utf8(directory: Path) -> None:
    text, data = split_header(directory / WEIGHTS)
    write_header(directory / WEIGHTS, text.replace(b"embed", b"\xff\xfe\xfd\xfc\xfb"), data)


@damage("base", WEIGHTS, "expected an object")
def a_header_that_is_a_list(directory: Path) -> None:
    write_header(directory / WEIGHTS, b"[]", b"")


@damage("base", WEIGHTS, "nested too deeply")
def a_header_nested_without_end(directory: Path) -> None:
    write_header(directory / WEIGHTS, b'{"a":' * 100_000, b"")


@damage("base", WEIGHTS, EMBEDDING, "more than once")
def a_tensor_named_twice(directory: Path) -> None:
    text, data = split_header(directory / WEIGHTS)
    text = text.replace(b"model.norm.weight", EMBEDDING.encode())
    write_header(directory / WEIGHTS, text, data)


@damage("base", WEIGHTS, "cannot be called", "\\x1b[2J")
def a_tensor_whose_name_clears_the_screen(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"\x1b[2J": zeros(1)}))


@damage("sharded", INDEX, "cannot be called")
def a_tensor_of_the_index_whose_name_is_endless(directory: Path) -> None:
    edit_index(directory, lambda names: names.update({"x" * 10_000: WEIGHTS}))


@damage("base", WEIGHTS, "__metadata__")
def metadata_that_is_no_object_of_strings(directory: Path) -> None:
    edit_header(directory, lambda header: header.update(__metadata__={"format": 1}))


@damage("base", WEIGHTS, GATE, "expected an object of dtype, shape and data_offsets")
def a_tensor_without_a_dtype(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE].pop("dtype"))


@damage("base", WEIGHTS, GATE, "expected an object of dtype, shape and data_offsets")
def a_tensor_that_is_a_number(directory: Path) -> None:
    edit_header(directory, lambda header: header.update({GATE: 7}))


@damage("base", WEIGHTS, GATE, "unknown dtype 'F31'")
def an_unknown_dtype(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE].update(dtype="F31"))


@damage("base", WEIGHTS, GATE, "shape is", "-8")
def a_negative_shape(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE].update(shape=[-8, -128]))


@damage("base", WEIGHTS, "q_proj.bias", "shape is [True]")
def a_shape_of_true_where_another_is_one(directory: Path) -> None:
    def change(header: Json) -> None:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_")
        for name, shape, at in (("k_proj.bias", [1], end), ("q_proj.bias", [True], end + 4)):
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4]}

    edit_header(directory, change)


@damage("base", WEIGHTS, GATE, "shape is", "8.0")
def a_shape_of_floats(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE].update(shape=[8.0, 128]))


@damage("base", WEIGHTS, GATE, "BF16 [8, 128] takes 2048 bytes", "span 4096")
def a_dtype_of_another_size(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE].update(dtype="BF16"))


@damage("base", WEIGHTS, GATE, "takes")
def a_shape_that_overflows_64_bits(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE].update(shape=[1 << 62, 1 << 62]))


@damage("base", WEIGHTS, GATE, "expected at most 16 integers")
def a_shape_whose_product_is_endless(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE].update(shape=[1 << 62] * 100_000))


@damage("base", WEIGHTS, GATE, "expected at most 16 integers")
def a_shape_of_a_thousand_digits(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE].update(shape=[10**1000]))


@damage("base", WEIGHTS, GATE, "expected [begin, end]")
def offsets_that_are_negative(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE].update(data_offsets=[-4096, 0]))


@damage("base", WEIGHTS, GATE, "expected [begin, end]")
def offsets_that_run_backwards(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE]["data_offsets"].reverse())


@damage("base", WEIGHTS, GATE, "expected [begin, end]")
def offsets_that_are_strings(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE].update(data_offsets=["0", "4096"]))


@damage("base", WEIGHTS, GATE, "truncated")
def offsets_beyond_the_file(directory: Path) -> None:
    def change(header: Json) -> None:
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_")
        header.clear()
        header[GATE] = {"dtype": "U8", "shape": [1 << 60], "data_offsets": [0, 1 << 60]}
        assert end < 1 << 60

    edit_header(directory, change)


@damage("base", WEIGHTS, "model.norm.weight", "inside")
def tensors_that_overlap(directory: Path) -> None:
    def change(header: Json) -> None:
        begin, _ = header[GATE]["data_offsets"]
        header["model.norm.weight"]["data_offsets"] = [begin + 8, begin + 8 + 4 * 128]

    edit_header(directory, change)


@damage("base", WEIGHTS, "no holes")
def a_hole_between_tensors(directory: Path) -> None:
    edit_header(directory, lambda header: header.pop(GATE))


# Sound files that are not this model's.


@damage("base", WEIGHTS, GATE, "no tensor")
def a_missing_tensor(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(GATE))


@damage("base", WEIGHTS, EMBEDDING)
def a_missing_embedding(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.pop(EMBEDDING))


@damage("base", WEIGHTS, "model.layers.3.mlp.experts.7.up_proj.weight", "no tensor")
def a_missing_expert(directory: Path) -> None:
    name = "model.layers.3.mlp.experts.7.up_proj.weight"
    edit_tensors(directory, lambda tensors: tensors.pop(name))


@damage("base", WEIGHTS, "does not have", "model.layers.0.mlp.experts.8.up_proj.weight")
def an_expert_too_many(directory: Path) -> None:
    name = "model.layers.0.mlp.experts.8.up_proj.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: zeros(64, 128)}))


@damage("base", WEIGHTS, "does not have", "model.layers.4.input_layernorm.weight")
def a_layer_too_many(directory: Path) -> None:
    name = "model.layers.4.input_layernorm.weight"
    edit_tensors(directory, lambda tensors: tensors.update({name: zeros(128)}))


@damage("base", WEIGHTS, "does not have", "self_attn.k_proj.bias", "self_attn.q_proj.bias")
def biases_that_the_model_does_not_have(directory: Path) -> None:
    name = "model.layers.3.self_attn.{}_proj.bias"
    new = {name.format(letter): zeros(128) for letter in "qk"}
    edit_tensors(directory, lambda tensors: tensors.update(new))


@damage("base", WEIGHTS, "does not have", "score.weight")
def a_head_that_the_model_does_not_have(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({"score.weight": zeros(2, 128)}))


@damage("base", WEIGHTS, GATE, "shape [128, 8], expected [8, 128]")
def a_transposed_router(directory: Path) -> None:
    edit_tensor(directory, GATE, lambda tensor: tensor.map(np.transpose))


@damage("base", WEIGHTS, "linear_attn.conv1d.weight", "shape [256, 4], expected [256, 1, 4]")
def a_convolution_of_two_dimensions(directory: Path) -> None:
    name = "model.layers.1.linear_attn.conv1d.weight"
    edit_tensor(directory, name, lambda tensor: tensor.map(lambda a: a[:, 0]))


@damage("base", WEIGHTS, GATE, "dtype I32, expected F32 or F16 or BF16")
def a_dtype_of_the_same_size(directory: Path) -> None:
    edit_header(directory, lambda header: header[GATE].update(dtype="I32"))


@damage("base", WEIGHTS, "linear_attn.A_log", "dtype F64")
def a_vector_of_float64(directory: Path) -> None:
    name = "model.layers.0.linear_attn.A_log"
    edit_tensor(directory, name, lambda tensor: stored(tensor.floats(), "F64"))


@damage("base", WEIGHTS, "experts.5.down_proj.weight", "BF16", "first expert is F32")
def experts_of_different_dtypes(directory: Path) -> None:
    name = "model.layers.2.mlp.experts.5.down_proj.weight"
    edit_tensor(directory, name, lambda tensor: stored(tensor.floats(), "BF16"))


@damage("fused", WEIGHTS, "experts.gate_up_proj", "shape [8, 128, 128]", "expected [8, 256, 128]")
def an_expert_width_that_is_not_the_configs(directory: Path) -> None:
    edit_json(directory / CONFIG, lambda config: config.update(moe_intermediate_size=128))


@damage("next", WEIGHTS, "in_proj_qkvz.weight", "expected [384, 128]")
def interleaved_projections_of_another_shape(directory: Path) -> None:
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    edit_tensor(directory, name, lambda tensor: tensor.map(lambda a: a[:-1]))


@damage("nested", WEIGHTS, "does not have", "model.embed_tokens.weight")
def two_models_in_one_file(directory: Path) -> None:
    edit_tensors(directory, lambda tensors: tensors.update({EMBEDDING: zeros(320, 128)}))


# Quantization.


@damage("mlx-4", WEIGHTS, f"{MLX}embed_tokens.weight", "[320, 24] is 6 bits", "expected 2, 4, 8")
def words_of_6_bits(directory: Path) -> None:
    words = Tensor("U32", np.zeros((320, 24), np.uint32))
    edit_tensor(directory, f"{MLX}embed_tokens.weight", lambda _: words)


@damage("mlx-4", WEIGHTS, f"{MLX}embed_tokens.scales", "is 16 columns a group", "32, 64, 128")
def scales_of_groups_of_16(directory: Path) -> None:
    name = f"{MLX}embed_tokens.scales"
    edit_tensor(directory, name, lambda tensor: tensor.map(lambda a: np.repeat(a, 4, axis=1)))


@damage("mlx-4", WEIGHTS, f"{MLX}embed_tokens.scales", "dtype U8", "none of mxfp4, mxfp8 and nvfp4")
def scales_that_are_exponents(directory: Path) -> None:
    scales = Tensor("U8", np.zeros((320, 4), np.uint8))
    edit_tensor(directory, f"{MLX}embed_tokens.scales", lambda _: scales)


@damage("base", WEIGHTS, GATE, "dtype U8", "MLX 4-bit edition")
def weights_of_8_bits(directory: Path) -> None:
    edit_tensor(directory, GATE, lambda tensor: Tensor("U8", np.zeros((8, 128), np.uint8)))


@damage("base", WEIGHTS, "mlp.gate.qweight is GPTQ or AWQ's", "MLX 4-bit edition")
def weights_that_gptq_packed(directory: Path) -> None:
    edit_tensors(
        directory,
        lambda tensors: tensors.update({GATE.replace(".weight", ".qweight"): tensors.pop(GATE)}),
    )


@damage("mlx-4", INDEX, f"{MLX}layers.1.mlp.switch_mlp.up_proj.scales", "no tensor")
def words_without_scales(directory: Path) -> None:
    name = f"{MLX}layers.1.mlp.switch_mlp.up_proj.scales"
    edit_tensors(directory, lambda tensors: tensors.pop(name))


@damage("mlx-4", INDEX, f"{MLX}layers.1.mlp.switch_mlp.up_proj.biases", "no tensor")
def scales_without_biases(directory: Path) -> None:
    name = f"{MLX}layers.1.mlp.switch_mlp.up_proj.biases"
    edit_tensors(directory, lambda tensors: tensors.pop(name))


@damage("mlx-4", WEIGHTS, "up_proj.biases", "dtype F32, expected BF16")
def biases_of_another_dtype_than_scales(directory: Path) -> None:
    name = f"{MLX}layers.1.mlp.switch_mlp.up_proj.biases"
    edit_tensor(directory, name, lambda tensor: stored(tensor.floats(), "F32"))


@damage("mlx-4", WEIGHTS, "switch_mlp.up_proj.weight", "shape [7, 64, 16], expected [8, 64, 16]")
def stacked_experts_that_lack_one(directory: Path) -> None:
    name = f"{MLX}layers.1.mlp.switch_mlp.up_proj.weight"
    edit_tensor(directory, name, lambda tensor: tensor.map(lambda a: a[:-1]))


@damage("mlx-4", WEIGHTS, "conv1d.weight", "expected [256, 4, 1]")
def convolutions_of_two_conventions(directory: Path) -> None:
    name = f"{MLX}layers.1.linear_attn.conv1d.weight"
    edit_tensor(directory, name, lambda tensor: tensor.map(lambda a: a.swapaxes(1, 2)))


# The index and the files it names.


@damage("sharded", SHARD, "no such file", INDEX)
def a_missing_shard(directory: Path) -> None:
    next(directory.glob(f"{SHARD}*")).unlink()


@damage("sharded", INDEX, "../model")
def an_index_that_leaves_the_directory(directory: Path) -> None:
    edit_index(directory, lambda names: names.update({EMBEDDING: "../model.safetensors"}))


@damage("sharded", INDEX, EMBEDDING, "/etc/passwd")
def an_index_that_names_an_absolute_path(directory: Path) -> None:
    edit_index(directory, lambda names: names.update({EMBEDDING: "/etc/passwd"}))


@damage("sharded", INDEX, EMBEDDING, "C:model.safetensors")
def an_index_that_names_a_path_of_windows(directory: Path) -> None:
    edit_index(directory, lambda names: names.update({EMBEDDING: "C:model.safetensors"}))


@damage("sharded", INDEX, EMBEDDING, "None")
def an_index_that_names_no_file(directory: Path) -> None:
    edit_index(directory, lambda names: names.update({EMBEDDING: None}))


@damage("sharded", "no such file", "of-", "is here")
def a_missing_shard_without_an_index(directory: Path) -> None:
    next(directory.glob("model-00002-of-*")).unlink()
    (directory / INDEX).unlink()


@damage("sharded", "model-more.safetensors: holds", "and so does model-0000", "of another model")
def files_of_two_editions_without_an_index(directory: Path) -> None:
    (directory / INDEX).unlink()
    file = sorted(directory.glob("model-*"))[1]
    file.with_name("model-more.safetensors").write_bytes(file.read_bytes())


@damage("sharded", INDEX, "not valid JSON")
def an_index_cut_short(directory: Path) -> None:
    os.truncate(directory / INDEX, 500)


@damage("sharded", INDEX, "weight_map")
def an_index_without_a_map(directory: Path) -> None:
    (directory / INDEX).write_text('{"metadata": {}}')


@damage("sharded", INDEX, "not a regular file")
def an_index_that_is_a_directory(directory: Path) -> None:
    (directory / INDEX).unlink()
    (directory / INDEX).mkdir()


@damage("sharded", INDEX, "cannot be opened")
def an_index_that_links_to_itself(directory: Path) -> None:
    (directory / INDEX).unlink()
    (directory / INDEX).symlink_to(INDEX)


@damage("base", WEIGHTS, "no such file")
def a_link_that_leads_nowhere(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to("nowhere")


@damage("base", WEIGHTS, "not a regular file")
def a_pipe_that_would_never_answer(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    os.mkfifo(directory / WEIGHTS)


@damage("base", WEIGHTS, "not a regular file")
def a_link_to_a_device(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to("/dev/zero")


@damage("base", f"neither {WEIGHTS} nor {INDEX}", "pytorch_model.bin")
def weights_of_another_format(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


@damage("base", CONFIG, "no such file")
def a_missing_config(directory: Path) -> None:
    (directory / CONFIG).unlink()


@damage("base", CONFIG, "not valid JSON")
def a_config_cut_short(directory: Path) -> None:
    os.truncate(directory / CONFIG, 100)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused_by_name(checkpoint: Get, tmp_path: Path, name: str) -> None:
    variant, damaged, words = DAMAGES[name]
    directory = Path(shutil.copytree(checkpoint(variant), tmp_path / "model"))
    damaged(directory)
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(directory)
    message = str(error.value)
    assert message.startswith(str(directory))
    for word in words:
        assert word in message
    assert len(message) < 1000


@pytest.mark.parametrize("variant", ["base", "mlx-4", "sharded"])
def test_random_damage_to_metadata_is_refused_or_harmless(
    checkpoint: Get, tmp_path: Path, variant: str
) -> None:
    directory = Path(shutil.copytree(checkpoint(variant), tmp_path / "model"))
    choose = random.Random(20)
    files = [directory / CONFIG, *sorted(directory.glob("model*"))]
    refused = 0
    for _ in range(150):
        file = choose.choice(files)
        sound = file.read_bytes()
        file.write_bytes(damaged_metadata(file, sound, choose))
        try:
            Checkpoint.open(directory)
        except CheckpointError as error:
            refused += str(error).startswith(str(directory))
        file.write_bytes(sound)
    assert refused > 100
    Checkpoint.open(directory)


def damaged_metadata(file: Path, sound: bytes, choose: random.Random) -> bytes:
    """Cut off anywhere, or with a few bytes of JSON flipped, replaced, deleted or doubled."""
    if choose.random() < 0.2:
        return sound[: choose.randrange(len(sound))]
    end = len(sound)
    if file.suffix == ".safetensors":
        end = 8 + struct.unpack("<Q", sound[:8])[0]
    head = bytearray(sound[:end])
    for _ in range(choose.choice((1, 1, 3))):
        at = choose.randrange(len(head) - 8)
        kind = choose.randrange(4)
        if kind == 0:
            head[at] ^= 1 << choose.randrange(8)
        elif kind == 1:
            head[at] = choose.choice(b'0123456789-.,:{}[]"')
        elif kind == 2:
            del head[at : at + choose.randrange(1, 5)]
        else:
            head[at:at] = head[at : at + choose.randrange(1, 5)]
    return bytes(head) + sound[end:]
