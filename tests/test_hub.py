"""Hub ids become directories, against a hub on this machine; every failure says what to do."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flashmoe.checkpoint.open import Checkpoint

pytestmark = pytest.mark.reference
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one directory as the model tests/model; `served` lists the files asked for."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory
        self.served: list[str] = []
        self.cut_once: str | None = None


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/tests/gated"):
            self.refuse(403, "GatedRepo", "Access to model tests/gated is restricted")
        elif match := re.fullmatch(r"/api/models/tests/model/(revision|tree)/\w+", path):
            self.list_files(match.group(1))
        elif path.startswith("/tests/model/resolve/"):
            self.send_file(self.server.directory / path.split("/")[-1])
        else:
            self.refuse(404, "RepoNotFound", "Repository not found")

    def refuse(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def list_files(self, kind: str) -> None:
        files = sorted(self.server.directory.iterdir())
        listing: Any = [
            {
                "type": "file",
                "path": file.name,
                "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            }
            for file in files
        ]
        if kind == "revision":
            siblings = [{"rfilename": file.name} for file in files]
            listing = {"id": "tests/model", "sha": COMMIT, "siblings": siblings}
        body = json.dumps(listing).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, file: Path) -> None:
        if not file.exists():
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        data = file.read_bytes()
        start = 0
        if (wanted := self.headers.get("Range")) and self.command == "GET":
            start = int(re.findall(r"\d+", wanted)[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.server.served.append(file.name)
        if file.name == self.server.cut_once:
            self.server.cut_once = None
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data[start:])


@pytest.fixture
def hub(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Hub]:
    directory = Path(shutil.copytree(checkpoint("nested-bf16-sharded"), tmp_path / "published"))
    (directory / "pytorch_model.bin").write_bytes(b"the same weights again")
    (directory / "README.md").write_text("# A model")
    server = Hub(directory)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def run_download(hub: Hub, source: str, **environment: str) -> tuple[str, str]:
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
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        },
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
