"""A Hugging Face hub on this machine: enough of its HTTP for a model to be found and downloaded."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1.0", COMMIT)


class Hub(ThreadingHTTPServer):
    """Serves one directory as the model tests/model; `served` lists the files asked for."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.directory = directory
        self.served: list[str] = []
        self.asked: list[str] = []  # revisions
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
        elif match := re.fullmatch(r"/api/models/tests/model/(revision|tree)/([\w.]+)", path):
            self.server.asked.append(match.group(2))
            if match.group(2) in REVISIONS:
                self.list_files(match.group(1))
            else:
                self.refuse(404, "RevisionNotFound", "Invalid rev id")
        elif path.startswith("/tests/model/resolve/"):
            self.server.asked.append(path.split("/")[4])
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


@contextmanager
def serve(directory: Path) -> Iterator[Hub]:
    server = Hub(directory)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
