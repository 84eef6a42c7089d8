"""States on disk: what is loaded is what was saved, whole, and belongs to the model that loads it.

All of it on the native engine: what a file may do to memory is what matters most.
"""

import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors

import flashmoe
from flashmoe.machine import files

Tensors = dict[str, tuple[str, list[int], bytes]]
"""Dtype, shape and bytes by name, as a file lists them."""


@pytest.fixture(scope="module")
def directory(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("state") / "tiny"
    maker.make_checkpoint(path, maker.PRESETS["tiny"])
    return path


@pytest.fixture(scope="module")
def model(directory: Path):
    with flashmoe.Model(directory, threads=2) as model:
        yield model


@pytest.fixture
def saved(model, tmp_path: Path) -> Path:
    """A state of three tokens, all computed."""
    state = model.new_state()
    list(model.generate([1, 2, 3], max_tokens=0, state=state))
    state.save(tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def ids(model, prompt, count: int, state) -> list[int]:
    options = {"max_tokens": count, "temperature": 0, "ignore_eos": True}
    return [token.id for token in model.generate(prompt, state=state, **options)]


def read(path: Path) -> tuple[dict[str, str], Tensors]:
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__")
    return metadata, {
        name: (t["dtype"], t["shape"], data[slice(*(start + o for o in t["data_offsets"]))])
        for name, t in header.items()
    }


def write(path: Path, metadata: dict[str, str], tensors: Tensors, *, sign: bool = True) -> None:
    """A sound safetensors file, with the digest that its content has: as an attacker would."""
    if sign:
        said = {key: value for key, value in metadata.items() if key != "sha256"}
        layout = {name: (dtype, shape) for name, (dtype, shape, _) in tensors.items()}
        digest = hashlib.sha256(json.dumps([said, layout], sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(tensors[name][2])
        metadata = {**metadata, "sha256": digest.hexdigest()}
    header: dict[str, Any] = {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        end = len(data) + len(content)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), end]}
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_a_saved_state_goes_on_as_the_state_itself(model, tmp_path) -> None:
    state = model.new_state()
    ids(model, [1, 2, 3], 4, state)
    path = tmp_path / "a.safetensors"
    state.save(path)
    loaded = flashmoe.State.load(model, str(path))
    assert loaded.tokens == state.tokens
    assert ids(model, [9], 6, loaded) == ids(model, [9], 6, state)


def test_what_was_predicted_is_saved_and_forked_too(model, saved, tmp_path) -> None:
    whole = ids(model, [1, 2, 3], 5, None)
    loaded = flashmoe.State.load(model, saved)
    fork = loaded.fork()
    assert ids(model, [], 5, loaded) == whole
    assert ids(model, [], 5, fork) == whole


def test_a_file_that_says_what_it_holds_correctly_is_read(model, saved) -> None:
    """The helpers of this file write what flashmoe writes: else the next tests show nothing."""
    before = saved.read_bytes()
    write(saved, *read(saved))
    assert read(saved) == read(saved) and len(before) > 1000
    assert flashmoe.State.load(model, saved).tokens == (1, 2, 3)


def test_any_safetensors_reader_reads_the_file(saved) -> None:
    with safetensors.safe_open(saved, "numpy") as file:
        assert file.metadata()["experts_per_token"] == "4"
        assert file.get_tensor("tokens").tolist() == [1, 2, 3]
        assert file.get_slice("layers.3.keys").get_dtype() == "BF16"


def test_an_empty_state_is_saved_and_loaded(model, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    model.new_state().save(path)
    loaded = flashmoe.State.load(model, path)
    assert loaded.tokens == ()
    assert len(ids(model, [1], 2, loaded)) == 2


# Shapes and dtypes that a file may have in place of the model's own, in files that are else sound.
Change = Callable[[dict[str, str], Tensors], object]
CHANGES: dict[str, Change] = {
    "64 MiB in place of 1.5 KiB": lambda m, t: t.update(
        {"layers.0.conv": ("F32", [16 << 20], b"AAAA" * (16 << 20))}
    ),
    "a page too much": lambda m, t: t.update({"layers.0.conv": ("F32", [4096], b"A" * 16384)}),
    "one element too few": lambda m, t: t.update(
        {"layers.0.conv": ("F32", [3, 127], b"A" * 4 * 3 * 127)}
    ),
    "keys of nothing": lambda m, t: t.update({"layers.3.keys": ("BF16", [0], b"")}),
    "keys of one number": lambda m, t: t.update({"layers.3.keys": ("BF16", [1], b"AA")}),
    "a transposed tensor": lambda m, t: t.update(
        {"layers.0.conv": ("F32", [128, 3], t["layers.0.conv"][2])}
    ),
    "keys with axes exchanged": lambda m, t: t.update(
        {"layers.3.keys": ("BF16", [3, 2, 64], t["layers.3.keys"][2])}
    ),
    "a flat tensor": lambda m, t: t.update(
        {"layers.3.values": ("BF16", [384], t["layers.3.values"][2])}
    ),
    "an axis more": lambda m, t: t.update(
        {"layers.3.values": ("BF16", [1, 2, 3, 64], t["layers.3.values"][2])}
    ),
    "integers for floats": lambda m, t: t.update(
        {"layers.0.conv": ("I32", [3, 128], t["layers.0.conv"][2])}
    ),
    "float32 for bfloat16": lambda m, t: t.update(
        {"layers.3.keys": ("F32", [2, 3, 32], t["layers.3.keys"][2])}
    ),
    "a dtype that states do not have": lambda m, t: t.update(
        {"layers.3.keys": ("F16", [2, 3, 64], t["layers.3.keys"][2])}
    ),
    "4000 tokens said to be computed": lambda m, t: (
        t.update(tokens=("I32", [4001], np.ones(4001, np.int32).tobytes())),
        m.update(computed="4000"),
    ),
    "one token less said to be computed": lambda m, t: m.update(computed="2"),
    "no keys": lambda m, t: t.pop("layers.3.keys"),
    "no recurrent state": lambda m, t: t.pop("layers.1.recurrent"),
    "a tensor of nobody": lambda m, t: t.update({"layers.9.keys": ("F32", [1], b"AAAA")}),
    "a prediction that is too short": lambda m, t: t.update(logits=("F32", [8], b"A" * 32)),
    "ids above the vocabulary": lambda m, t: t.update(
        tokens=("I32", [3], np.array([1, 1024, 2], np.int32).tobytes())
    ),
    "negative ids": lambda m, t: t.update(
        tokens=("I32", [3], np.array([1, -1, 2], np.int32).tobytes())
    ),
    "ids that are floats": lambda m, t: t.update(tokens=("F32", [3], t["tokens"][2])),
    "ids in rows": lambda m, t: t.update(tokens=("I32", [1, 3], t["tokens"][2])),
    "no ids": lambda m, t: t.pop("tokens"),
    "nothing computed": lambda m, t: m.update(computed=""),
    "a word computed": lambda m, t: m.update(computed="x"),
    "less than nothing computed": lambda m, t: m.update(computed="-1"),
    "more computed than there is": lambda m, t: m.update(computed="4"),
    "digits of another script": lambda m, t: m.update(computed="\u0663"),
    "a number of 5000 digits": lambda m, t: m.update(computed="9" * 5000),
    "another kind of file": lambda m, t: m.update(format="pt"),
    "no format": lambda m, t: m.pop("format"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_is_not_this_models_state_is_refused_by_name(model, saved, change) -> None:
    metadata, tensors = read(saved)
    change(metadata, tensors)
    write(saved, metadata, tensors)
    with pytest.raises(flashmoe.CheckpointError, match=r"a\.safetensors"):
        flashmoe.State.load(model, saved)
    assert len(ids(model, [1, 2, 3], 2, None)) == 2


ARRAYS: dict[str, Callable[[dict[str, Any]], object]] = {
    "too long": lambda t: t.update({"layers.0.conv": np.zeros(1 << 20, np.float32)}),
    "too short": lambda t: t.update({"layers.3.keys": np.zeros((2, 2, 64), np.uint16)}),
    "of nothing": lambda t: t.update({"layers.3.keys": np.zeros((2, 0, 64), np.uint16)}),
    "transposed": lambda t: t.update({"layers.0.conv": np.zeros((128, 3), np.float32)}),
    "not contiguous": lambda t: t.update({"layers.0.conv": np.zeros((128, 3), np.float32).T}),
    "of doubles": lambda t: t.update({"layers.0.conv": np.zeros((3, 128), np.float64)}),
    "of halves for bfloat16": lambda t: t.update({"layers.3.keys": np.zeros((2, 3, 64), "f2")}),
    "a list": lambda t: t.update({"layers.0.conv": [[0.0] * 128] * 3}),
    "none": lambda t: t.update({"layers.0.conv": None}),
    "absent": lambda t: t.pop("layers.0.conv"),
    "logits too short": lambda t: t.update(logits=np.zeros(3, np.float32)),
}


@pytest.mark.parametrize("change", ARRAYS.values(), ids=ARRAYS)
def test_the_native_core_takes_no_array_of_another_shape_or_type(model, change) -> None:
    state = model.new_state()
    list(model.generate([1, 2, 3], max_tokens=0, state=state))
    tensors = state._native.export()
    fresh = model._native.new_state()
    change(tensors)
    with pytest.raises(ValueError, match="restore: "):
        fresh.restore(3, tensors)
    fresh.restore(3, state._native.export())
    assert np.array_equal(fresh.logits, state._native.logits)


@pytest.mark.parametrize("position", [-1, 2, 4, 1 << 31, (1 << 63) - 1])
def test_the_native_core_takes_no_position_that_arrays_do_not_have(model, position) -> None:
    state = model.new_state()
    list(model.generate([1, 2, 3], max_tokens=0, state=state))
    with pytest.raises(ValueError, match="restore: "):
        model._native.new_state().restore(position, state._native.export())


def test_a_changed_byte_anywhere_is_seen(model, saved) -> None:
    whole = saved.read_bytes()
    for at in np.random.default_rng(1).integers(0, len(whole), 200).tolist():
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(flashmoe.FlashMoeError, match=r"a\.safetensors"):
            flashmoe.State.load(model, saved)
    saved.write_bytes(whole)
    assert flashmoe.State.load(model, saved).tokens == (1, 2, 3)


@pytest.mark.parametrize("keep", [0, 7, 100, 2000, -1])
def test_a_truncated_file_is_refused(model, saved, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(flashmoe.CheckpointError, match=r"a\.safetensors"):
        flashmoe.State.load(model, saved)


@pytest.mark.parametrize("version", ["1", "3"])
def test_a_state_of_another_version_is_refused_by_its_name(model, saved, version) -> None:
    metadata, tensors = read(saved)
    write(saved, metadata | {"format": f"flashmoe.state.{version}"}, tensors)
    with pytest.raises(flashmoe.CheckpointError, match=rf"flashmoe\.state\.{version}.* reads fla"):
        flashmoe.State.load(model, saved)


def test_a_foreign_text_is_shown_cut_and_without_what_a_terminal_obeys(model, saved) -> None:
    metadata, tensors = read(saved)
    for key in ("source", "precision", "format", "computed"):
        foreign = {key: "\x1b[2J\x1b]0;x\x07" + "A" * 5_000_000}
        model_name = {"model": "x"} if key == "source" else {}
        write(saved, metadata | foreign | model_name, tensors)
        with pytest.raises(flashmoe.FlashMoeError) as raised:
            flashmoe.State.load(model, saved)
        assert str(raised.value).isprintable() and len(str(raised.value)) < 1000


def test_another_models_state_is_refused(model, saved, maker, directory, tmp_path) -> None:
    maker.make_checkpoint(tmp_path / "other", maker.PRESETS["tiny"], seed=2)
    with flashmoe.Model(tmp_path / "other", threads=1) as other:
        with pytest.raises(flashmoe.StateError, match="another model"):
            flashmoe.State.load(other, saved)
        with pytest.raises(flashmoe.StateError, match="another model"):
            other.generate([1], state=model.new_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts_per_token": 2}, "experts_per_token='4'"),
        ({"precision": "float32"}, "computed with precision='int8'"),
        ({"context": 2}, "holds 3 tokens, and the context of this model 2"),
    ],
)
def test_a_state_of_another_setting_is_refused(directory, saved, options, message) -> None:
    other = flashmoe.Model(directory, threads=1, **options)
    with other, pytest.raises(flashmoe.StateError, match=message):
        flashmoe.State.load(other, saved)


def test_saving_replaces_and_leaves_nothing_beside(model, saved) -> None:
    state = flashmoe.State.load(model, saved)
    list(model.generate([1, 2], max_tokens=0, state=state))
    state.save(saved)
    assert flashmoe.State.load(model, saved).position == 5
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_saving_keeps_permissions(model, saved) -> None:
    saved.chmod(0o600)
    flashmoe.State.load(model, saved).save(saved)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "device"])
def test_saving_replaces_only_files(model, saved, tmp_path, kind) -> None:
    path, victim = tmp_path / "there", tmp_path / "victim"
    victim.write_text("precious")
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path = Path("/dev/null")
    before = path.lstat()
    with pytest.raises(flashmoe.WriteError, match=r"(there|null): (is|cannot)"):
        flashmoe.State.load(model, saved).save(path)
    assert (before.st_ino, before.st_mode) == (path.lstat().st_ino, path.lstat().st_mode)
    assert victim.read_text() == "precious"


def test_saving_does_not_follow_a_link_at_its_temporary_name(
    model, saved, tmp_path, monkeypatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "guessed")
    (tmp_path / ".flashmoe-guessed.part").symlink_to(victim)
    with pytest.raises(flashmoe.WriteError, match="File exists"):
        flashmoe.State.load(model, saved).save(tmp_path / "b.safetensors")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("call", ["pwrite", "fsync", "close", "rename", "fchmod"])
def test_a_state_is_saved_or_the_error_is_told(model, saved, monkeypatch, call) -> None:
    """What the system says only when a file is synced or closed counts like what it says first."""
    state = flashmoe.State.load(model, saved)
    list(model.generate([1, 2], max_tokens=0, state=state))
    before = saved.read_bytes()
    real = getattr(os, call)

    def fail(*arguments: Any, **options: Any) -> None:
        if call == "close":
            real(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(flashmoe.WriteError, match="cannot be written: No space left"):
        state.save(saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_state_that_cannot_be_written_is_an_error_with_its_path(model, tmp_path) -> None:
    with pytest.raises(flashmoe.WriteError, match=r"no-such.*cannot be written"):
        model.new_state().save(tmp_path / "no-such" / "a.safetensors")
    with pytest.raises(flashmoe.WriteError, match="is a directory"):
        model.new_state().save("")
    with pytest.raises(flashmoe.WriteError, match="too long"):
        model.new_state().save(tmp_path / ("x" * 300))
    with pytest.raises(flashmoe.ArgumentError, match="NUL"):
        model.new_state().save("a\0b")
    model.new_state().save(tmp_path / ("x" * 250))


def test_threads_that_save_to_one_name_leave_one_whole_file(model, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    states = [model.new_state() for _ in range(4)]
    for length, state in enumerate(states, 1):
        list(model.generate([7] * length, max_tokens=0, state=state))
    errors: list[BaseException] = []

    def work(state: flashmoe.State) -> None:
        try:
            for _ in range(20):
                state.save(path)
                flashmoe.State.load(model, path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
