"""Hub ids become directories, against a hub on this machine; every failure says what to do."""

import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Hub
from programs import environment

from flashmoe.checkpoint.open import Checkpoint


def run_download(hub: Hub, source: str, **more: str) -> tuple[str, str]:
    """(path or error message, what was shown meanwhile), in a process of its own, since
    huggingface_hub reads its environment once."""
    script = (
        "import sys\n"
        "from flashmoe.errors import CheckpointError\n"
        "from flashmoe.checkpoint.open import Checkpoint\n"
        "try: print(Checkpoint.open(sys.argv[1]).directory)\n"
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
    ],
)
def test_a_download_that_cannot_be_says_what_to_do(
    hub: Hub, source: str, environment: dict[str, str], words: list[str]
) -> None:
    message, _ = run_download(hub, source, **environment)
    assert message.startswith(source)
    for word in words:
        assert word in message
