"""States on disk: what is loaded is what was saved, and belongs to the model that loads it."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from fake_engine import install, make_directory

import flashmoe


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> flashmoe.Model:
    install(monkeypatch)
    return flashmoe.Model(make_directory(tmp_path / "model"))


def _ids(tokens) -> list[int]:
    return [token.id for token in tokens]


def test_a_saved_state_goes_on_as_the_state_itself(model, tmp_path) -> None:
    state = model.new_state()
    list(model.generate([1, 2, 3], max_tokens=4, temperature=0, state=state))
    path = tmp_path / "a.safetensors"
    state.save(path)
    loaded = flashmoe.State.load(model, str(path))
    assert loaded.tokens == state.tokens
    expected = _ids(model.generate([9], max_tokens=6, temperature=0, state=state))
    assert _ids(model.generate([9], max_tokens=6, temperature=0, state=loaded)) == expected


def test_any_safetensors_reader_reads_the_file(model, tmp_path) -> None:
    state = model.new_state()
    list(model.generate([1, 2, 3], max_tokens=0, state=state))
    path = tmp_path / "a.safetensors"
    state.save(path)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["experts_per_token"] == "6"
        assert file.get_tensor("tokens").tolist() == [1, 2, 3]
        assert file.get_slice("layers.1.keys").get_dtype() == "BF16"


def test_an_empty_state_is_saved_and_loaded(model, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    model.new_state().save(path)
    loaded = flashmoe.State.load(model, path)
    assert loaded.tokens == ()
    assert len(list(model.generate([1], max_tokens=2, state=loaded))) == 2


def test_saving_replaces_and_leaves_nothing_beside(model, tmp_path) -> None:
    state = model.new_state()
    path = tmp_path / "a.safetensors"
    state.save(path)
    list(model.generate([1, 2], max_tokens=0, state=state))
    state.save(path)
    assert flashmoe.State.load(model, path).position == 2
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.safetensors"]


def test_a_state_that_cannot_be_written_is_an_error_with_its_path(model, tmp_path) -> None:
    with pytest.raises(flashmoe.WriteError, match=r"no-such.*cannot be written"):
        model.new_state().save(tmp_path / "no-such" / "a.safetensors")
    with pytest.raises(flashmoe.WriteError, match="cannot be written"):
        model.new_state().save("")


def test_another_models_state_is_refused(model, tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.safetensors"
    model.new_state().save(path)
    other = flashmoe.Model(make_directory(tmp_path / "other", num_experts=16))
    with pytest.raises(flashmoe.StateError, match="another model"):
        flashmoe.State.load(other, path)
    with pytest.raises(flashmoe.StateError, match="another model"):
        other.generate([1], state=model.new_state())


def test_a_state_of_other_routing_is_refused(model, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    model.new_state().save(path)
    other = flashmoe.Model(model.directory, experts_per_token=2)
    with pytest.raises(flashmoe.StateError, match="experts_per_token=6"):
        flashmoe.State.load(other, path)


def test_a_state_of_another_precision_is_refused(model, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    model.new_state().save(path)
    other = flashmoe.Model(model.directory, precision="float32")
    with pytest.raises(flashmoe.StateError, match="computed with precision=int8"):
        flashmoe.State.load(other, path)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([1, 512], np.int32), "ids that are not below 512"),
        (np.array([-1, 2], np.int32), "ids that are not below 512"),
        (np.array([1, 2], np.float32), r"F32 \[2\], expected I32"),
        (np.array([[1, 2]], np.int32), r"I32 \[1, 2\], expected I32"),
    ],
)
def test_tokens_that_are_no_ids_are_refused(model, tmp_path, tokens, message) -> None:
    path = tmp_path / "a.safetensors"
    model.new_state().save(path)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    safetensors.numpy.save_file({"tokens": tokens}, path, metadata)
    with pytest.raises(flashmoe.CheckpointError, match=message):
        flashmoe.State.load(model, path)


def test_a_file_of_another_kind_is_refused(model, tmp_path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"tokens": np.zeros(3, np.int32)}, path)
    with pytest.raises(flashmoe.CheckpointError, match="not a state"):
        flashmoe.State.load(model, path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(model, tmp_path, keep: int) -> None:
    state = model.new_state()
    list(model.generate([1, 2, 3], max_tokens=0, state=state))
    path = tmp_path / "a.safetensors"
    state.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(flashmoe.CheckpointError, match=r"a\.safetensors"):
        flashmoe.State.load(model, path)


@pytest.mark.parametrize("computed", ["", "x", "-1", "4", "2"])
def test_a_position_that_does_not_fit_is_refused(model, tmp_path, computed: str) -> None:
    state = model.new_state()
    list(model.generate([1, 2, 3], max_tokens=0, state=state))
    path = tmp_path / "a.safetensors"
    state.save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["computed"] = computed
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(flashmoe.CheckpointError, match=r"a\.safetensors"):
        flashmoe.State.load(model, path)
