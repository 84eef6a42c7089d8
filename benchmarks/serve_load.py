"""A server under load: eight clients at once, some of which leave, and requests that are none.

    python benchmarks/serve_load.py --seconds 600

Says how long headers take with nobody else there and with all clients, for prompts of several
lengths, and what rendering and encoding such a prompt takes alone; how many tokens each client got;
and memory, threads, sockets and snapshots of the server before and after. It serves the demo model,
with room for prompts of 16,000 tokens, on this machine only. What it counts of the server is
Linux's.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flashmoe
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.generate.prompt import Prompts

LENGTHS = (100, 1000, 4000, 16000)
"""Tokens of prompts, about."""
MALFORMED = (b"", b"{", b"[]", b'{"messages": 5}', b'{"messages": [], "n": "x"}', b"\xff" * 100)


class Server:
    """`flashmoe serve` in a process of its own."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "flashmoe", "serve", str(model), "--port", "0"]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        match = re.match(r"http://127\.0\.0\.1:(\d+) ", self.process.stdout.readline())
        assert match is not None, "the server did not start"
        self.port = int(match[1])

    def health(self) -> dict[str, Any]:
        with self.connection() as connection:
            connection.request("GET", "/health")
            return dict(json.loads(connection.getresponse().read()))

    def connection(self) -> contextlib.closing[http.client.HTTPConnection]:
        return contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120))

    def holds(self) -> dict[str, Any]:
        """What the process holds."""
        directory = Path(f"/proc/{self.process.pid}")
        status = (directory / "status").read_text()
        links = [link.readlink().name for link in (directory / "fd").iterdir() if link.is_symlink()]
        found = self.health()
        return {
            "memory MB": int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) // 1024,
            "threads": int(re.findall(r"Threads:\s+(\d+)", status)[0]),
            "sockets": sum(name.startswith("socket:") for name in links),
            "snapshots": found["snapshots"],
            "snapshots MB": found["snapshot_bytes"] >> 20,
            "busy": found["busy"],
        }

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)


class Client(threading.Thread):
    """Asks, reads and leaves until it is told to stop."""

    def __init__(self, server: Server, number: int, until: float) -> None:
        super().__init__()
        self.server, self.until, self.number = server, until, number
        self.random = random.Random(number)
        self.headers: dict[int, list[float]] = {length: [] for length in LENGTHS}
        self.pieces = self.answers = self.left = self.refused = 0
        self.silences: list[float] = []
        """Seconds between any two lines of a stream."""
        self.gaps: list[float] = []
        """Seconds between two pieces of an answer."""
        self.wrong: list[str] = []

    def run(self) -> None:
        while time.monotonic() < self.until:
            try:
                if self.random.random() < 0.15:
                    self._malformed()
                else:
                    self._ask()
            except Exception as error:  # is told at the end
                self.wrong.append(repr(error))

    def _malformed(self) -> None:
        path = self.random.choice(("/v1/chat/completions", "/v1/messages"))
        with self.server.connection() as connection:
            connection.request("POST", path, self.random.choice(MALFORMED))
            status = connection.getresponse().status
        self.refused += 1
        if status != 400:
            self.wrong.append(f"malformed: {status}")

    def _ask(self) -> None:
        length = self.random.choices(LENGTHS, (8, 4, 2, 1))[0]
        leaves = self.random.random() < 0.3
        stream = self.random.random() < 0.8
        with self.server.connection() as connection:
            took, response = ask(connection, self.random, length, stream)
            if stream:
                self.headers[length].append(took)
            if response.status != 200:
                self.wrong.append(f"{response.status}: {response.read()[:200]!r}")
                return
            after = self.random.randrange(30) if leaves else 10**9
            last, piece = time.monotonic(), None
            while after and (line := response.readline()):
                after -= 1
                now = time.monotonic()
                if stream:
                    self.silences.append(now - last)
                last = now
                is_piece = line.startswith(b'data: {"type":"content_block_delta"')
                if is_piece or b'"delta":{"content":' in line:
                    self.pieces += 1
                    if piece is not None:
                        self.gaps.append(now - piece)
                    piece = now
        self.left += leaves
        self.answers += not leaves


def ask(
    connection: http.client.HTTPConnection, rng: random.Random, length: int, stream: bool
) -> tuple[float, http.client.HTTPResponse]:
    """Asks something of about so many tokens; how long headers took, and the response."""
    messages = question(rng, length)
    body = {"model": "demo", "messages": messages, "max_tokens": 60, "stream": stream}
    path = rng.choice(("/v1/chat/completions", "/v1/messages"))
    data = json.dumps(body).encode()
    start = time.monotonic()
    connection.request("POST", path, data)
    response = connection.getresponse()
    return time.monotonic() - start, response


def question(rng: random.Random, length: int) -> list[dict[str, str]]:
    """Half of it begins as others do, so that some of it was computed before."""
    words = ("the", "city", "of", "old", "men", "looked", "at", "sea", "and", "said")
    shared = " ".join(words[i % len(words)] for i in range(length // 2))
    own = " ".join(rng.choice(words) for _ in range(length - length // 2))
    return [{"role": "user", "content": f"{shared} {own}"}]


def long_demo(directory: Path) -> Path:
    """The demo model, with room for more tokens than it was trained with."""
    copy = Path(shutil.copytree(Path(flashmoe.__file__).parent / "demo_model", directory / "demo"))
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 32768
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def alone(model: Path) -> dict[int, float]:
    """Seconds that rendering and encoding a prompt of each length take."""
    prompts, rng = Prompts(Checkpoint.open(model)), random.Random(1)
    prompts.make(question(rng, 10))
    found = {}
    for length in LENGTHS:
        times = []
        for _ in range(5):
            messages, start = question(rng, length), time.perf_counter()
            prompts.make(messages)
            times.append(time.perf_counter() - start)
        found[length] = statistics.median(times)
    return found


def idle(server: Server, count: int) -> dict[int, list[float]]:
    """Seconds to headers with nobody else there."""
    rng, found = random.Random(2), {length: [] for length in LENGTHS}
    with server.connection() as connection:
        ask(connection, rng, 10, True)[1].read()  # the first one is not counted
    for length in LENGTHS:
        for _ in range(count):
            with server.connection() as connection:
                found[length].append(ask(connection, rng, length, True)[0])
            while server.health()["busy"]:
                time.sleep(0.02)
    return found


def percentile(times: list[float], share: float) -> float:
    ordered = sorted(times)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


@contextlib.contextmanager
def running(model: Path) -> Iterator[Server]:
    server = Server(model)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=8)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = long_demo(Path(directory))
        rendered = alone(model)
        with running(model) as server:
            quiet = idle(server, 20)
            before = server.holds()
            until = time.monotonic() + arguments.seconds
            clients = [Client(server, number, until) for number in range(arguments.clients)]
            for client in clients:
                client.start()
            healths = []
            while time.monotonic() < until:
                start = time.monotonic()
                server.health()
                healths.append(time.monotonic() - start)
                time.sleep(0.5)
            for client in clients:
                client.join()
            end = time.monotonic() + 30
            while server.health()["busy"] and time.monotonic() < end:
                time.sleep(0.1)
            time.sleep(2)
            after = server.holds()
            code = server.stop()
    print(f"{'ms to headers, p50 / p95':28}{'alone':>8}{'idle':>16}{'busy':>16}")
    for length in LENGTHS:
        times = (quiet[length], [t for client in clients for t in client.headers[length]])
        columns = [
            f"{1e3 * percentile(t, 0.5):.0f} / {1e3 * percentile(t, 0.95):.0f}" for t in times
        ]
        name = f"{length} tokens"
        print(f"{name:28}{1e3 * rendered[length]:8.0f}{columns[0]:>16}{columns[1]:>16}")
    gaps = [gap for client in clients for gap in client.gaps]
    print(
        f"/health, p95 / max: {1e3 * percentile(healths, 0.95):.0f} / {1e3 * max(healths):.0f} ms"
    )
    silences = [gap for client in clients for gap in client.silences]
    for name, times in (("silence on the wire", silences), ("between two pieces", gaps)):
        print(f"{name}, p95 / max: {percentile(times, 0.95):.2f} / {max(times):.2f} s")
    print(f"{'client':10}{'answers':>10}{'left':>10}{'refused':>10}{'pieces':>10}")
    for client in clients:
        row = (client.answers, client.left, client.refused, client.pieces)
        print(f"{client.number:<10}" + "".join(f"{value:10}" for value in row))
    print(f"{'the server holds':20}{'before':>12}{'after':>12}")
    for name, value in before.items():
        print(f"{name:20}{value:>12}{after[name]:>12}")
    less = [held["memory MB"] - held["snapshots MB"] for held in (before, after)]
    print(f"{'less snapshots MB':20}{less[0]:>12}{less[1]:>12}")
    print(f"exit code after Ctrl-C: {code}")
    for line in sorted({line for client in clients for line in client.wrong}):
        print("WRONG:", line)


if __name__ == "__main__":
    main()
