"""A server on this machine, whose model says what a test wants, and raw requests to it."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from conversing import DEMO, Scripted, model_with_template

import flashmoe

REASONING = (
    (DEMO / "chat_template.jinja")
    .read_text()
    .replace(
        "{{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}",
        "{{- '<|im_start|>assistant\\n' }}"
        "{{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n' }}",
    )
    .replace(
        "'<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' ~ (message.content or '')",
        "'<|im_start|>assistant\\n<think>\\n' ~ (message.reasoning_content or '')"
        " ~ '\\n</think>\\n\\n' ~ (message.content or '')",
    )
)
"""The demo's template for a model that reasons unless told not to."""


@dataclass
class Reply:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[tuple[str | None, str]]:
        """Server-sent events as (event, data); a comment is (":", text)."""
        found = []
        for block in self.body.decode().split("\n\n"):
            name, data = None, None
            for line in filter(None, block.split("\n")):
                if line.startswith(":"):
                    name, data = ":", line[1:]
                elif line.startswith("event: "):
                    name = line[len("event: ") :]
                else:
                    assert line.startswith("data: "), line
                    assert data is None, "an event of one line"
                    data = line[len("data: ") :]
            if data is not None:
                found.append((name, data))
        return found

    @property
    def chunks(self) -> list[Any]:
        """The objects of a stream, without [DONE]."""
        return [json.loads(data) for name, data in self.events if data != "[DONE]" and name != ":"]


@dataclass
class Served:
    """A running server.

    Attributes:
        script: what the model says to a conversation, as `Scripted` takes it; None to let it say
            what it will.
        prompts: rendered conversations that were to be answered, as texts.
        before_token: called before each token is drawn.
    """

    model: flashmoe.Model
    port: int
    script: Callable[[Any], str | None] = lambda messages: None
    prompts: list[str] = field(default_factory=list)
    before_token: Callable[[], None] = lambda: None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def says(self, text: str | None) -> None:
        """From now on the model says this, to whatever it is asked."""
        self.script = lambda messages: text

    def request(
        self,
        path: str,
        body: Any = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **(headers or {})}
        with contextlib.closing(connection):
            connection.request(method or ("GET" if body is None else "POST"), path, data, sent)
            response = connection.getresponse()
            got = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, got, response.read())

    def chat(self, text: str = "Hello", **fields: Any) -> Reply:
        body = {"model": "m", "messages": [{"role": "user", "content": text}], **fields}
        return self.request("/v1/chat/completions", body)

    def message(self, text: str = "Hello", **fields: Any) -> Reply:
        turns = [{"role": "user", "content": text}]
        return self.request(
            "/v1/messages", {"model": "m", "max_tokens": 50, "messages": turns, **fields}
        )

    def health(self) -> Any:
        return self.request("/health").json

    def rows(self) -> int:
        """Rows that were passed through the layers so far."""
        return int(self.model._native.stats()["rows"])

    def wait_until_idle(self, seconds: float = 10) -> None:
        until = time.monotonic() + seconds
        while self.health()["busy"]:
            assert time.monotonic() < until, "still busy"
            time.sleep(0.01)


@contextlib.contextmanager
def served(model: flashmoe.Model, *, log_prompts: bool = False, **access: Any) -> Iterator[Served]:
    """A server for a model, in a thread of this process."""
    from flashmoe.serve.access import Access  # noqa: PLC0415  (needs starlette)
    from flashmoe.serve.server import bind, make_server  # noqa: PLC0415

    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        server = make_server(model, Access(**access), log_prompts=log_prompts)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        found = Served(model, listener.getsockname()[1])
        chat = model.chat
        _intercept(model, found)
        thread.start()
        try:
            yield found
        finally:
            server.should_exit = True
            thread.join(30)
            model.chat = chat  # type: ignore[method-assign]
            assert not thread.is_alive()


def _intercept(model: flashmoe.Model, served: Served) -> None:
    """Has the model's answers follow the script."""
    chat = model.chat

    def scripted(messages: Any, **options: Any) -> Any:
        def watch(ids: Any, logits: Any) -> Any:
            served.before_token()
            return logits

        text = served.script(messages)
        more = [watch] if text is None else [watch, Scripted(model, text)]
        made = chat(messages, **{**options, "processors": [*options["processors"], *more]})
        served.prompts.append(made._turn.prompt.text)
        return made

    model.chat = scripted  # type: ignore[method-assign]


def reasoning_model(directory: Path, maker: ModuleType) -> flashmoe.Model:
    """A small random model that reasons, as far as its template goes."""
    return flashmoe.Model(model_with_template(directory, maker, REASONING))
