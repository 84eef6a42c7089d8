"""Checkpoints as they are published, converted and kept: each kind was a public bug report."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import TestEngine, random_ids
from fake_engine import install, make_directory, make_tokenizer, spelling
from programs import environment
from tensors import Tensor, load, save

import flashmoe
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.template import ChatTemplate
from flashmoe.checkpoint.tokenizer import Tokenizer
from flashmoe.errors import ArgumentError, CheckpointError
from flashmoe.generate.messages import prepare
from flashmoe.generate.sampling import Sampling
from flashmoe.generate.text import TextStream
from flashmoe.machine.files import replacing
from flashmoe.pack.pack import pack

Get = Callable[[str], Path]
USER = {"role": "user", "content": "Hi"}
INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4998\n"


@pytest.fixture
def copy(checkpoint: Get, tmp_path: Path) -> Get:
    """Likewise, but a copy to change."""
    return lambda name: Path(shutil.copytree(checkpoint(name), tmp_path / "model"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value))


# What ends an answer


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory whose model says "Hi there." and then <|im_end|>, again and again."""
    install(monkeypatch, spelling("Hi there.", make_tokenizer()))
    directory = make_directory(tmp_path / "spoken")
    edit(directory / "config.json", lambda config: config.pop("eos_token_id"))
    return directory


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("token", ["<|im_end|>", {"content": "<|im_end|>"}], ids=str)
def test_the_tokenizers_own_end_of_sequence_ends_an_answer(spoken, name, token) -> None:
    other = make_tokenizer().token_to_id("<|endoftext|>")
    edit(spoken / "config.json", lambda config: config.update(eos_token_id=other))
    edit(spoken / name, lambda values: values.update(eos_token=token))
    with flashmoe.Model(spoken) as model:
        said = "".join(token.text for token in model.chat([USER], max_tokens=40))
        assert (said, model.stats.finish_reason) == ("Hi there.", "eos")
        assert set(model.checkpoint.eos_token_ids) == {
            other,
            make_tokenizer().token_to_id("<|im_end|>"),
        }


@pytest.mark.parametrize(
    "given",
    ["<|im_end|>", ["<|im_end|>"], "id", iter(["<|im_end|>"])],
    ids=["text", "list", "id", "iterator"],
)
def test_eos_adds_tokens_that_end_an_answer(spoken, given) -> None:
    given = make_tokenizer().token_to_id("<|im_end|>") if given == "id" else given
    with flashmoe.Model(spoken) as model:
        tokens = list(model.generate("x", max_tokens=40, eos=given, ignore_eos=True))
        assert "".join(token.text for token in tokens) == "Hi there."
        for wrong in ("<|no_token|>", -1, 512, 1.5, [None]):
            with pytest.raises(ArgumentError, match="eos names tokens"):
                model.generate("x", eos=wrong if isinstance(wrong, (int, str, list)) else [wrong])


@pytest.mark.parametrize("stop", ["<|im_end|>", ".<|im_end|>", ["no", "<|im_end|><|im_start|>"]])
def test_a_stop_string_with_special_tokens_in_it_stops(stop) -> None:
    tokenizer = make_tokenizer()
    end, start = (tokenizer.token_to_id(f"<|im_{word}|>") for word in ("end", "start"))
    ids = [*tokenizer.encode("the fox.").ids, end, start, *tokenizer.encode("user").ids]
    stream = TextStream(Tokenizer(tokenizer), stop)
    said = ""
    for token in ids:
        said += stream.push(token)
        if stream.stopped:
            break
    assert stream.stopped and token in (end, start)
    assert said == ("the fox" if stop == ".<|im_end|>" else "the fox.")


def test_a_stop_string_of_special_tokens_holds_no_other_text_back_for_good() -> None:
    tokenizer = make_tokenizer()
    end = tokenizer.token_to_id("<|im_end|>")
    ids = [*tokenizer.encode("a fox").ids, end, *tokenizer.encode(" b <|im").ids]
    stream = TextStream(Tokenizer(tokenizer), ["<|im_end|>\nuser", "xyz"])
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == "a fox b <|im" and not stream.stopped


# Conversations and templates


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": [{"type": "image", "text": "a cat", "image": "cat.png"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "user", "content": [{"image_url": {"url": "cat.png"}}]},
        {"role": "user", "content": [{"type": "text", "text": "What?", "video": "cat.mp4"}]},
        {"role": "user", "content": "What?", "images": ["cat.png"]},
    ],
    ids=str,
)
def test_an_image_is_refused_wherever_it_is(turn) -> None:
    template = ChatTemplate("{% for m in messages %}<|image_pad|>{% endfor %}", Path("t.jinja"))
    for look in (prepare, lambda turns, template: template.render(turns)):
        with pytest.raises(
            ArgumentError, match=r"messages\[0\].*not supported, only parts of text"
        ):
            look([turn], template)


def test_messages_that_are_an_iterator_are_all_read() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", Path("t.jinja"))
    parts = iter([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    turns = iter([USER, {"role": "assistant", "content": parts}])
    assert [turn["content"] for turn in prepare(turns, template)] == ["Hi", "ab"]


def test_variables_that_a_template_does_not_read_are_said_once(spoken, caplog) -> None:
    (spoken / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with caplog.at_level(logging.WARNING, "flashmoe"), flashmoe.Model(spoken) as model:
        for _ in range(2):
            model.prompt_ids([USER], think=False, variables={"reasonning_effort": "low"})
        model.render([USER], enable_thinkin=True)
    assert len(caplog.messages) == 3
    for name in ("enable_thinking", "reasonning_effort", "enable_thinkin"):
        assert sum(f"no variable {name}: it has no effect" in m for m in caplog.messages) == 1
    caplog.clear()
    text = "{% set mine = 1 %}{% if enable_thinking is defined and effort %}{{ mine }}{% endif %}"
    ChatTemplate(text, Path("t.jinja")).render([USER], enable_thinking=True, effort="low")
    assert not caplog.messages


def test_what_marks_text_for_training_is_taken_as_transformers_takes_it() -> None:
    text = (
        "{% for m in messages %}{{ m.role }}: {% generation %}{% set x = m.content %}{{ x }}"
        "{% endgeneration %}{{ x is defined }};{% endfor %}"
    )
    assert ChatTemplate(text, Path("t.jinja")).render([USER]) == "user: HiFalse;"


def test_additional_chat_templates_are_named_by_their_files(tmp_path) -> None:
    def loaded(**options: bool) -> str | None:
        template = ChatTemplate.load(Metadata(tmp_path), **options)
        return template and template.text

    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("tools")
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("rag")
    assert (loaded(), loaded(tools=True)) == (None, "tools")
    (tmp_path / "chat_template.jinja").write_text("plain")
    assert (loaded(), loaded(tools=True)) == ("plain", "tools")


def test_a_template_that_is_an_lfs_pointer_is_not_rendered(tmp_path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(LFS)
    with pytest.raises(CheckpointError, match="jinja: is a Git LFS pointer"):
        ChatTemplate.load(Metadata(tmp_path))


# Weights


@pytest.mark.parametrize("name", ["base", "mlx-4"])
def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_used(
    copy, checkpoint, caplog, name
) -> None:
    directory = copy(name)

    def tie(config: dict[str, Any]) -> None:
        for section in (config, config.get("text_config", {})):
            section["tie_word_embeddings"] = True

    edit(directory / "config.json", tie)
    opened = Checkpoint.open(directory)
    assert not opened.config.tie_word_embeddings and "lm_head differs" in caplog.text
    ids = random_ids(300, 5)
    expected = TestEngine(checkpoint(name)).logits(ids)
    assert np.array_equal(TestEngine(directory).logits(ids), expected)
    pack(directory, directory.with_name("pack"), bits=16)
    assert "lm_head" in Checkpoint.open(directory.with_name("pack")).matrices


def test_a_head_that_is_a_copy_of_the_embedding_is_left_out(copy) -> None:
    directory = copy("tied")
    tensors = load(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save(tensors, directory / "model.safetensors")
    opened = Checkpoint.open(directory)
    assert "lm_head" not in opened.matrices and opened.config.tie_word_embeddings


SAID: dict[str, Callable[[dict[str, Any]], object]] = {
    "nothing": lambda q: q.clear(),
    "no group": lambda q: q.pop("group_size"),
    "other bits": lambda q: q.update(bits=8),
    "another group": lambda q: q.update(group_size=32),
    "routers as the rest": lambda q: [q.pop(k) for k in [*q] if "gate" in k],
    "routers not quantized": lambda q: q.update({k: False for k in q if "gate" in k}),
    "routers spelled otherwise": lambda q: q.update(
        {
            k.replace("language_model.model", "model.language_model"): q.pop(k)
            for k in [*q]
            if "gate" in k
        }
    ),
    "quant_method": lambda q: q.update(quant_method="mlx"),
    "vision of 6 bits": lambda q: q.update({"vision_tower.x": {"bits": 6, "group_size": 64}}),
    "MTP of mxfp8": lambda q: q.update({"language_model.mtp.fc": {"bits": 8, "mode": "mxfp8"}}),
}


@pytest.mark.parametrize("said", SAID)
def test_bits_and_groups_are_those_of_the_shapes_whatever_the_config_says(
    copy, checkpoint, said
) -> None:
    def change(config: dict[str, Any]) -> None:
        SAID[said](config["quantization"])
        config["quantization_config"] = config.pop("quantization")

    directory = copy("mlx-4")
    edit(directory / "config.json", change)
    found, expected = (Checkpoint.open(d).matrices for d in (directory, checkpoint("mlx-4")))
    assert {k: m.format for k, m in found.items()} == {k: m.format for k, m in expected.items()}


def _rename_all(names: dict[str, str]) -> None:
    for name in names:
        names[name] = "model-00001-of-00002.safetensors"


def _move_one(names: dict[str, str]) -> None:
    files = sorted(set(names.values()))
    name = next(iter(names))
    names[name] = next(file for file in files if file != names[name])


STALE: dict[str, tuple[str, Callable[[dict[str, str]], object]]] = {
    "of the source, beside one file": (
        "base",
        lambda names: names.update({"x": "model-2.safetensors"}),
    ),
    "names files that were merged": ("mlx-4", _rename_all),
    "places a tensor elsewhere": ("sharded", _move_one),
    "lacks a tensor": ("sharded", lambda names: names.pop(next(iter(names)))),
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_index_beside_complete_files_is_left_aside(copy, checkpoint, caplog, case) -> None:
    name, change = STALE[case]
    directory = copy(name)
    edit(directory / INDEX, lambda index: change(index.setdefault("weight_map", {})))
    assert Checkpoint.open(directory).fingerprint == Checkpoint.open(checkpoint(name)).fingerprint
    assert f"{INDEX}: does not say what the files beside it hold" in caplog.text


def test_shards_without_an_index_open(copy, checkpoint) -> None:
    directory = copy("nested-bf16-sharded")
    (directory / INDEX).rename(directory / f"{INDEX}.old")
    (directory / "._model-00001-of-00002.safetensors").write_bytes(b"of macOS")
    (directory / INDEX).symlink_to("../../blobs/gone")
    expected = Checkpoint.open(checkpoint("nested-bf16-sharded")).fingerprint
    assert Checkpoint.open(directory).fingerprint == expected


def test_vision_and_mtp_are_skipped_under_every_prefix_and_quantization(copy) -> None:
    directory = copy("mlx-4")
    tensors = load(directory / "model.safetensors")
    whole = Checkpoint.open(directory).fingerprint
    for name in ("vision_tower.x", "model.vision_tower.x", "language_model.model.mtp.fc", "mtp.fc"):
        tensors[f"{name}.weight"] = Tensor("U32", np.zeros((4, 6), np.uint32))
        tensors[f"{name}.scales"] = Tensor("U8", np.zeros((4, 1), np.uint8))
    save(tensors, directory / "model.safetensors")
    (directory / INDEX).unlink()
    assert Checkpoint.open(directory).fingerprint == whole


def test_a_link_to_a_shard_of_vision_that_was_deleted_does_no_harm(copy) -> None:
    directory = copy("base")
    size = Checkpoint.open(directory).disk_bytes
    (directory / "mtp.safetensors").symlink_to("../../blobs/gone")
    assert Checkpoint.open(directory).disk_bytes == size


def test_a_directory_whose_name_is_not_utf8_opens(copy) -> None:
    directory = copy("mlx-4")
    make_tokenizer().save(str(directory / "tokenizer.json"))
    odd = Path(os.fsdecode(os.fsencode(directory) + b"-mod\xe8le"))
    directory.rename(odd)
    with flashmoe.Model(odd, threads=1, cache=0) as model:
        state = model.new_state()
        model.logits(model.checkpoint.encode("fox"), state=state)
        state.save(odd / "a.state")
        flashmoe.State.load(model, odd / "a.state")
    os.truncate(odd / "model.safetensors", 10_000)
    with pytest.raises(CheckpointError, match=r"-mod\\udce8le"):
        flashmoe.Model(odd)


def test_an_error_of_the_native_core_may_name_a_path_that_is_not_utf8(copy, tmp_path) -> None:
    odd = Path(os.fsdecode(os.fsencode(copy("mlx-4")) + b"-\xe8"))
    (tmp_path / "model").rename(odd)
    opened = Checkpoint.open(odd)
    _ = opened.native
    shutil.rmtree(odd)
    with pytest.raises(flashmoe.ReadError, match=r"-\\udce8"):
        from flashmoe.generate.engine import open_engine  # noqa: PLC0415
        from flashmoe.generate.setting import Setting  # noqa: PLC0415

        open_engine(opened, Setting(4, "cpu", "int8", 1, 0, 128), None)


# What stands in the place of something else


FOREIGN: dict[str, tuple[str, bytes, str]] = {
    "weights that are a pointer": ("model.safetensors", LFS, "git lfs pull"),
    "a config that is a pointer": ("config.json", LFS, "git lfs pull"),
    "an index that is a pointer": (INDEX, LFS, "git lfs pull"),
    "weights that are a page": ("model.safetensors", b"<!DOCTYPE html><html>No", "web page"),
    "a config that is a page": ("config.json", b"\n<HTML><body>401", "web page"),
    "weights of which only the room was made": (
        "model.safetensors",
        bytes(9999),
        "begins with zeros",
    ),
    "a config of which only the room was made": ("config.json", bytes(99), "begins with zeros"),
    "weights that a server had not": (
        "model.safetensors",
        b"Entry not found",
        "is text.*Entry not",
    ),
    "weights that are an error": ("model.safetensors", b'{"error":"Unauthorized"}', "is text"),
    "weights of PyTorch": ("model.safetensors", b"PK\x03\x04" + bytes(99), "zip file"),
    "weights that are GGUF": ("model.safetensors", b"GGUF" + bytes(99), "GGUF file"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_is_not_the_file_is_named_for_what_it_is(copy, case) -> None:
    name, data, words = FOREIGN[case]
    directory = copy("mlx-4")
    (directory / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name}: (is a .*)?{words}"):
        Checkpoint.open(directory)


def test_a_config_that_begins_with_the_mark_of_windows_editors_is_read(copy) -> None:
    directory = copy("base")
    path = directory / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    Checkpoint.open(directory)


def test_a_tokenizer_that_is_a_pointer_says_so(tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a Git LFS pointer"):
        Tokenizer.load(tmp_path)


def test_gguf_is_named_and_what_to_take_instead(copy, tmp_path) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a/Qwen3.5-35B-A3B-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    beside = copy("base")
    (beside / "model.safetensors").rename(beside / "model.gguf")
    for source in (file.parent, file, beside):
        with pytest.raises(CheckpointError, match=r"GGUF.*take the .*safetensors edition"):
            Checkpoint.open(source)


def test_modelopt_is_named_where_only_its_own_file_says_so(copy) -> None:
    directory = copy("base")
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (directory / "hf_quant_config.json").write_text(json.dumps(said))
    with pytest.raises(
        CheckpointError, match=r"hf_quant_config.json: quantization.quant_algo is 'FP8'"
    ):
        Checkpoint.open(directory)


# Defaults of sampling


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"top_k": -1}, Sampling(temperature=1)),
        ({"top_p": 1.5, "min_p": -1, "repetition_penalty": 0}, Sampling(temperature=1)),
        ({"top_p": 0}, Sampling(temperature=1, top_p=1e-9)),
        ({"do_sample": None}, Sampling()),
        ({"top_k": None, "top_p": None, "temperature": 0.5}, Sampling(temperature=0.5)),
    ],
    ids=str,
)
def test_what_means_off_elsewhere_means_off(given, expected) -> None:
    assert Sampling.from_generation_config({"do_sample": True, **given}) == expected


# Disks


@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS, errno.EBADF], ids=str)
def test_a_file_system_without_locks_can_be_packed_to(copy, tmp_path, monkeypatch, code) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    pack(copy("mlx-4"), tmp_path / "pack")
    Checkpoint.open(tmp_path / "pack")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP], ids=str)
def test_a_file_system_that_syncs_nothing_can_be_written_to(tmp_path, monkeypatch, code) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    for name in ("fsync", "fchmod"):
        monkeypatch.setattr(os, name, refuse)
    (tmp_path / "a").write_text("old")
    with replacing(tmp_path / "a") as out:
        os.write(out, b"new")
    assert (tmp_path / "a").read_text() == "new"
    code = errno.EIO
    with pytest.raises(flashmoe.WriteError), replacing(tmp_path / "a"):
        pass


def test_a_source_that_changes_stops_the_pack_at_the_next_file(copy, tmp_path) -> None:
    directory = copy("sharded")
    seen = []

    def change(done: int, total: int) -> None:
        if done > 0 and max(seen) == 0:
            os.utime(sorted(directory.glob("*.safetensors"))[-1], ns=(1, 1))
        seen.append(done / total)

    with pytest.raises(
        flashmoe.ReadError, match="was changed or replaced while it was being packed"
    ):
        pack(directory, tmp_path / "pack", progress=change)
    assert max(seen) < 0.9
    assert not (tmp_path / "pack/config.json").exists()


def test_templates_that_are_named_are_packed_and_none_from_elsewhere(copy, tmp_path) -> None:
    directory = copy("mlx-4")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates/tool_use.jinja").write_text("tools")
    pack(directory, tmp_path / "pack")
    template = Checkpoint.open(tmp_path / "pack").tools_template
    assert template is not None and template.text == "tools"
    shutil.move(directory / "additional_chat_templates", tmp_path / "elsewhere")
    (directory / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja: is a link to"):
        pack(directory, tmp_path / "again")


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/types.h>

// Refuses direct reads behind the first LATE bytes of a file, as some file systems do.
static ssize_t refuse(const char* name, int fd, void* to, size_t n, off_t at) {
  if ((fcntl(fd, F_GETFL) & O_DIRECT) && at >= atoll(getenv("LATE"))) {
    errno = ENOTSUP;
    return -1;
  }
  return ((ssize_t(*)(int, void*, size_t, off_t))dlsym(RTLD_NEXT, name))(fd, to, n, at);
}
ssize_t pread(int fd, void* to, size_t n, off_t at) { return refuse("pread", fd, to, n, at); }
ssize_t pread64(int fd, void* to, size_t n, off_t at) { return refuse("pread64", fd, to, n, at); }
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.parametrize("late", ["0", "4096"])
def test_direct_reads_that_a_file_system_refuses_become_others(checkpoint, tmp_path, late) -> None:
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c", "-ldl"], check=True)
    code = (
        "import flashmoe, hashlib, sys\n"
        "model = flashmoe.Model(sys.argv[1], threads=1, cache='1MB')\n"
        "print(hashlib.sha1(model.logits([1, 2, 3])).hexdigest())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code, str(checkpoint("mlx-4"))],
            env=environment(**preload),
            capture_output=True,
            text=True,
            check=False,
        )
        for preload in ({}, {"LD_PRELOAD": str(shim), "LATE": late})
    ]
    assert runs[0].stdout and runs[1].stdout == runs[0].stdout, runs[1].stderr
