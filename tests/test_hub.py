"""Hub ids become directories, against a hub on this machine; every failure says what to do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub
from programs import environment

from flashmoe.checkpoint.open import Checkpoint


def run_download(
    hub: Hub, source: str, *, look: str = "open", before: str = "", **more: str
) -> tuple[str, str]:
    """(path or error message, what was shown meanwhile), in a process of its own, since
    huggingface_hub reads its environment once."""
    script = (
        f"{before}\nimport sys\n"
        "from flashmoe.errors import CheckpointError\n"
        "from flashmoe.checkpoint.open import Checkpoint\n"
        f"try: print(Checkpoint.{look}(sys.argv[1]).directory)\n"
        "except CheckpointError as error: print(error)"
    )
    home = hub.directory.with_name("home")
    result = subprocess.run(
        [sys.executable, "-c", script, source],
        env=environment(
            **{
                "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_XET": "1",
                **more,
            }
        ),
        cwd=hub.directory.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip(), result.stderr


def test_a_hub_id_is_downloaded_once_and_only_what_is_needed(hub: Hub) -> None:
    path, shown = run_download(hub, "tests/model")
    stored = Checkpoint.open(path)
    assert len(stored.config.layer_types) == 4
    assert "%" in shown
    # The last shard holds vision and multi-token prediction and nothing else.
    assert set(hub.served) == {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        *(file.name for file in stored.files),
    }
    assert len(stored.files) < len(list(hub.directory.glob("*.safetensors")))
    assert hub.served[0].endswith(".json")

    served = len(hub.served)
    assert run_download(hub, "tests/model")[0] == path
    assert len(hub.served) == served


def test_an_interrupted_download_goes_on_with_what_is_missing(hub: Hub) -> None:
    cut = next(hub.directory.glob("model-00003-of-*")).name
    hub.cut_once = cut
    path, _ = run_download(hub, "tests/model")
    if not Path(path).is_dir():  # else huggingface_hub has tried again by itself
        assert "Run the same command again" in path
        path, _ = run_download(hub, "tests/model")
    assert Checkpoint.open(path)
    assert {name for name in hub.served if hub.served.count(name) > 1} == {cut}


def test_an_unsupported_model_is_refused_before_its_weights_are_downloaded(hub: Hub) -> None:
    (hub.directory / "config.json").write_text('{"model_type": "llama"}')
    message, _ = run_download(hub, "tests/model")
    assert "model_type is 'llama'" in message
    assert not [name for name in hub.served if name.endswith(".safetensors")]


def test_what_was_downloaded_opens_offline(hub: Hub) -> None:
    path, _ = run_download(hub, "tests/model")
    assert run_download(hub, "tests/model", HF_HUB_OFFLINE="1")[0] == path


@pytest.mark.parametrize(
    ("source", "environment", "words"),
    [
        ("tests/model", {"HF_HUB_OFFLINE": "1"}, ["cannot be reached", "HF_HUB_OFFLINE"]),
        ("tests/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, ["cannot be reached"]),
        ("tests/nothing", {}, ["nor a model on the Hugging Face hub", "hf auth login"]),
        ("tests/a/b", {}, ["no such directory", "a hub id such as"]),
        ("tests/gated", {}, ["asks for an agreement", "hf auth login"]),
        ("tests/model@v3", {}, ["has no such revision", "a branch, a tag or a whole commit"]),
    ],
)
def test_a_download_that_cannot_be_says_what_to_do(
    hub: Hub, source: str, environment: dict[str, str], words: list[str]
) -> None:
    message, _ = run_download(hub, source, **environment)
    assert message.startswith(source)
    for word in words:
        assert word in message


def test_a_revision_stands_behind_an_at(hub: Hub) -> None:
    path, _ = run_download(hub, "tests/model@v1.0")
    assert Path(path).name == COMMIT
    assert set(hub.asked) == {"v1.0", COMMIT}


@pytest.mark.parametrize("look", ["open", "look"])
def test_a_stale_index_or_none_on_the_hub_is_no_obstacle(hub: Hub, look: str) -> None:
    index = hub.directory / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00001.safetensors"}}))
    assert "left aside" in run_download(hub, "tests/model")[1]
    shutil.rmtree(hub.directory.with_name("home"))
    index.unlink()
    assert Path(run_download(hub, "tests/model", look=look)[0]).name == COMMIT
    assert len(whole["weight_map"]) > 10


def test_what_holds_no_checkpoint_says_what_to_take(hub: Hub) -> None:
    for file in hub.directory.iterdir():
        file.unlink()
    (hub.directory / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for look in ("open", "look"):
        message, _ = run_download(hub, "tests/model", look=look)
        assert "GGUF" in message and "safetensors edition" in message


NO_SOCKETS = """
import socket
def refuse(*_, **__):
    raise AssertionError("a socket")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
"""


def test_offline_no_socket_is_opened(hub: Hub) -> None:
    path, _ = run_download(hub, "tests/model")
    asked = len(hub.asked)
    for look in ("open", "look"):
        for source in ("tests/model", "tests/model@main", f"tests/model@{COMMIT}"):
            found, _ = run_download(hub, source, look=look, before=NO_SOCKETS, HF_HUB_OFFLINE="1")
            assert found == path, source
        message, _ = run_download(
            hub, "tests/other", look=look, before=NO_SOCKETS, HF_HUB_OFFLINE="1"
        )
        assert "HF_HUB_OFFLINE" in message and "a socket" not in message
    assert len(hub.asked) == asked
