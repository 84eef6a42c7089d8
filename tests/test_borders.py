"""Where libraries and the system meet a user's files: whatever they raise is flashmoe's error."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fake_engine import make_directory, make_tokenizer

import flashmoe
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.template import ChatTemplate
from flashmoe.checkpoint.tokenizer import Tokenizer
from flashmoe.machine.files import is_there, names_in, read_file, regular_file_size
from flashmoe.pack.pack import pack

Json = dict[str, Any]


@pytest.fixture(scope="module")
def tiny(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("borders") / "tiny"
    maker.make_checkpoint(directory, maker.PRESETS["tiny"])
    return directory


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


# Tokenizers


def put(directory: Path, change: Callable[[Json], object]) -> Path:
    """A sound tokenizer.json, changed."""
    path = directory / "tokenizer.json"
    make_tokenizer().save(str(path))
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    return directory


TEXT = "the quick brown fox jumps over the lazy dog " * 30
PAD = {"pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "!"}


@pytest.mark.parametrize("length", [12, 2**34])
def test_padding_that_a_file_asks_for_is_not_done(tmp_path, length) -> None:
    expected = Tokenizer(make_tokenizer()).encode(TEXT)
    padding = {"strategy": {"Fixed": length}, "direction": "Left", **PAD}
    directory = put(tmp_path, lambda value: value.update(padding=padding))
    assert Tokenizer.load(directory).encode(TEXT) == expected


def test_truncation_that_a_file_asks_for_is_not_done(tmp_path) -> None:
    truncation = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    directory = put(tmp_path, lambda value: value.update(truncation=truncation))
    assert Tokenizer.load(directory).encode(TEXT) == Tokenizer(make_tokenizer()).encode(TEXT)


@pytest.mark.parametrize("count", [5, 40])
def test_a_normalizer_that_doubles_texts_is_refused(tmp_path, count) -> None:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    normalizer = {"type": "Sequence", "normalizers": [double] * count}
    directory = put(tmp_path, lambda value: value.update(normalizer=normalizer))
    if count == 5:
        assert len(Tokenizer.load(directory).encode("a")) == 32
        return
    with pytest.raises(flashmoe.CheckpointError, match=r"tokenizer\.json: its normalizer may leng"):
        Tokenizer.load(directory)


def test_damaged_tokenizers_are_named(tmp_path) -> None:
    """Bytes changed at random, and values that the library's Rust does not expect."""
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    whole = (tmp_path / "tokenizer.json").read_bytes()
    draw = np.random.default_rng(5)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for at in draw.integers(0, len(data), draw.integers(1, 30)).tolist():
            data[at] = draw.integers(32, 127)
        (tmp_path / "tokenizer.json").write_bytes(bytes(data))
        try:
            Tokenizer.load(tmp_path).encode(TEXT)
        except flashmoe.CheckpointError as error:
            assert str(error).startswith(f"{tmp_path}/tokenizer.json: ")
            refused += 1
    assert refused > 50


class Panic(BaseException):
    """As pyo3's PanicException: no Exception."""


@pytest.mark.parametrize("error", [Panic("index out of bounds"), MemoryError(), TypeError("x")])
@pytest.mark.parametrize("call", ["encode", "id_to_token"])
def test_whatever_the_library_raises_names_the_file(tmp_path, error, call) -> None:
    class Library:
        normalizer = None

        def __getattr__(self, name: str) -> Callable[..., Any]:
            def method(*_: object, **__: object) -> Any:
                if name == call:
                    raise error
                return {}

            return method

    tokenizer = Tokenizer(Library(), tmp_path / "tokenizer.json")  # type: ignore[arg-type]
    with pytest.raises(flashmoe.CheckpointError, match=rf"tokenizer\.json.*{type(error).__name__}"):
        _ = tokenizer.encode("x") if call == "encode" else tokenizer.piece(1)


def test_ctrl_c_in_the_library_stays_one(tmp_path) -> None:
    class Library:
        normalizer = None
        no_padding = no_truncation = lambda self: None
        get_added_tokens_decoder = lambda self: {}  # noqa: E731

        def encode(self, *_: object, **__: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tokenizer(Library(), tmp_path).encode("x")  # type: ignore[arg-type]


def test_ids_that_the_tokenizer_has_and_the_model_lacks_leave_the_state_as_it_is(
    maker, tmp_path
) -> None:
    directory = tmp_path / "small"
    maker.make_checkpoint(directory, replace(maker.PRESETS["tiny"], vocab=272))
    make_tokenizer().save(str(directory / "tokenizer.json"))
    with flashmoe.Model(directory, threads=1) as model:
        state = model.new_state()
        list(model.generate([1, 2], max_tokens=2, state=state, ignore_eos=True))
        before = state.tokens
        for text in ("<|endoftext|>", "a<|im_start|>"):
            with pytest.raises(flashmoe.CheckpointError, match=r"tokenizer\.json: gives token id"):
                model.generate(text, state=state)
        assert state.tokens == before
        assert len(list(model.generate([], max_tokens=3, state=state, ignore_eos=True))) == 3


# Iterators


def test_messages_and_stop_may_be_iterators(tmp_path) -> None:
    template = ChatTemplate.load(Metadata(make_directory(tmp_path)))
    assert template is not None
    messages = [{"role": "user", "content": "Hello"}]
    assert template.render(iter(messages)) == template.render(messages)  # type: ignore[arg-type]
    from flashmoe.generate.text import TextStream  # noqa: PLC0415

    tokenizer = Tokenizer(make_tokenizer())
    stream = TextStream(tokenizer, iter(["qu"]))  # type: ignore[arg-type]
    said = "".join(stream.push(i) for i in tokenizer.encode("the quick") if not stream.stopped)
    assert (said, stream.stopped) == ("the ", True)


# Files


LOOKS: dict[str, Callable[[Path], object]] = {
    "is_there": is_there,
    "size": regular_file_size,
    "read": lambda path: read_file(path, 100),
    "list": names_in,
    "open": Checkpoint.open,
    "pack": lambda path: pack(path, path / "out"),
    "save": lambda path: flashmoe.Model("demo", threads=1).new_state().save(path),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("name", ["nul\0", "x" * 300, "loop/loop", "file/below"])
def test_names_that_the_system_refuses_are_our_errors(tmp_path, look, name) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    try:
        assert look(tmp_path / name) in (False, None)
    except flashmoe.FlashMoeError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize("source", [3, None, b"x", object()])
def test_what_is_no_path_is_an_argument_error(source) -> None:
    with pytest.raises(flashmoe.ArgumentError, match="a path is text"):
        flashmoe.Model(source)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_file_of_a_terabyte_is_not_read(copy, name) -> None:
    (copy / name).touch()
    os.truncate(copy / name, 1 << 40)
    with pytest.raises(flashmoe.CheckpointError, match=rf"{name}: 1099511627776 bytes"):
        checkpoint = Checkpoint.open(copy)
        _ = checkpoint.tokenizer, checkpoint.template


_NOBODY = """
import os, sys
from pathlib import Path
import flashmoe, flashmoe.pack.pack, numpy.random, tokenizers, jinja2.sandbox
from flashmoe.checkpoint.tokenizer import Tokenizer
from flashmoe import _native
model, packed, state = map(Path, sys.argv[1:])
opened = flashmoe.Model(model, threads=1)
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
def attempt(call):
    try:
        call(); print("ok")
    except flashmoe.FlashMoeError as error:
        print(type(error).__name__)
pack = lambda: flashmoe.pack.pack.pack(model, packed, bits=4, group_size=32)
model.chmod(0o444); attempt(lambda: flashmoe.Model(model)); attempt(pack); model.chmod(0o755)
packed.chmod(0o555); attempt(pack); packed.chmod(0o755)
(model / "tokenizer.json").chmod(0); attempt(pack); attempt(lambda: opened.generate("x"))
(model / "config.json").chmod(0); attempt(lambda: flashmoe.Model(model)); attempt(pack)
state.chmod(0o555); attempt(lambda: opened.new_state().save(state / "a.state"))
"""


def test_what_permissions_forbid_is_our_error(copy, tmp_path) -> None:
    packed, state = tmp_path / "packed", tmp_path / "states"
    pack(copy, packed, bits=4, group_size=32)
    (packed / "config.json").unlink()
    (packed / ".flashmoe-0.part").touch()
    state.mkdir()
    if os.getuid() == 0:
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, 65534, 65534)
        for path in tmp_path.parents:
            if path.stat().st_mode & 0o5 != 0o5 and path != Path("/"):
                path.chmod(path.stat().st_mode | 0o5)  # those of pytest are its user's alone
    run = subprocess.run(
        [sys.executable, "-c", _NOBODY, copy, packed, state],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    said = run.stdout.split()
    assert len(said) == 8 and not {"ok"} & set(said), said


# Packing


def test_a_source_that_is_replaced_while_it_is_packed_gives_no_pack(copy, tmp_path) -> None:
    changed = []

    def replace_all(done: int, total: int) -> None:
        if done > total // 2 and not changed:
            for file in copy.glob("*.safetensors"):
                data = bytearray(file.read_bytes())
                data[-100:] = bytes(100)
                (tmp_path / "new").write_bytes(bytes(data))
                os.replace(tmp_path / "new", file)
                changed.append(file)

    with pytest.raises(flashmoe.ReadError, match="changed or replaced while it was being packed"):
        pack(copy, tmp_path / "out", bits=4, group_size=32, threads=1, progress=replace_all)
    assert changed
    with pytest.raises(flashmoe.CheckpointError, match="unfinished pack"):
        Checkpoint.open(tmp_path / "out")


def test_a_companion_that_links_to_elsewhere_is_not_published(copy, tmp_path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of this machine")
    (copy / "merges.txt").symlink_to(secret)
    with pytest.raises(flashmoe.CheckpointError, match=r"merges\.txt: is a link to .*secret"):
        pack(copy, tmp_path / "out", bits=4, group_size=32)
    assert not (tmp_path / "out/merges.txt").exists()


def test_companions_of_the_hubs_cache_are_packed(copy, tmp_path) -> None:
    blobs, snapshot = tmp_path / "hub/blobs", tmp_path / "hub/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(copy.iterdir())):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(blobs / str(number))
    pack(snapshot, tmp_path / "out", bits=4, group_size=32)
    assert Tokenizer.load(tmp_path / "out").encode("a") == Tokenizer.load(snapshot).encode("a")


def test_packing_does_not_follow_links_at_the_names_it_writes(copy, tmp_path) -> None:
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    pack(copy, out, bits=4, group_size=32)
    for name in ("config.json", "tokenizer.json"):
        (out / name).unlink()
        (out / name).symlink_to(victim)
    (out / "layer-000.safetensors").unlink()
    with pytest.raises(flashmoe.WriteError, match="is a symbolic link"):
        pack(copy, out, bits=4, group_size=32)
    assert victim.read_text() == "precious"


def test_a_thread_that_is_not_granted_is_our_error(copy, tmp_path, monkeypatch) -> None:
    import threading  # noqa: PLC0415

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(flashmoe.OutOfMemoryError, match="grants no thread"):
        pack(copy, tmp_path / "out", bits=4, group_size=32)


# Messages


def test_messages_show_no_control_characters_and_end() -> None:
    for kind in (flashmoe.ArgumentError, flashmoe.ReadError, flashmoe.CheckpointError):
        text = str(kind("a\x1b[2J\udc80\x00 é\nb" + "x" * 100_000))
        assert text.startswith("a\\x1b[2J\\udc80\\x00 é\nb") and len(text) < 5000
        assert text.replace("\n", "").isprintable()
