"""The application: what is at which address, who may ask, and what is said of errors."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import socket
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashmoe.checkpoint.json import strict_json
from flashmoe.errors import FlashMoeError, printable
from flashmoe.generate.background import AsyncChat
from flashmoe.serve import anthropic, openai
from flashmoe.serve.anthropic import MessageReply
from flashmoe.serve.ask import Ask, failure_of
from flashmoe.serve.fields import Fields, RequestError
from flashmoe.serve.openai_reply import ChatReply, CompletionReply
from flashmoe.serve.reply import Event, Reply, new_id, to_json
from flashmoe.serve.stream import EventStream, run_to_end

if TYPE_CHECKING:
    from flashmoe.generate.chat import Chat
    from flashmoe.generate.model import Model

log = logging.getLogger("flashmoe.serve")

MOST_BYTES = 64 << 20
"""Of a request's body."""
MOST_AT_ONCE = 128
"""Requests that are answered at once; each has a thread and a state."""
_LOCAL_ORIGIN = r"https?://(localhost|[a-z0-9-]+\.localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?"
_LOCAL_NAMES = {"localhost", "host.docker.internal"}
"""The latter is what a container calls the machine it runs on."""

_T = TypeVar("_T")
Parse = Callable[[Fields], Ask]


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        host: the address that the server listens at.
        origins: of pages whose scripts may ask; None for those of this machine.
        key: that clients must have; None for none.
    """

    host: str = "127.0.0.1"
    origins: Sequence[str] | None = None
    key: str | None = None


def make_app(model: Model, access: Access, *, log_prompts: bool = False) -> Starlette:
    """The application for a model, which stays its caller's to close."""
    return Service(model, log_prompts).app(access)


def name_of(model: Model) -> str:
    """What clients call a model: its hub id, or its directory's name."""
    path = Path(model.source)
    return path.resolve().name if path.is_dir() else model.source


class Service:
    """A model at its addresses.

    Attributes:
        busy: requests that are being answered.
    """

    def __init__(self, model: Model, log_prompts: bool) -> None:
        self.busy = 0
        self._model = model
        self._name = name_of(model)
        self._vocab_size = model.config.vocab_size
        self._created = int(time.time())
        self._fingerprint = f"fp_{model.checkpoint.fingerprint[:10]}"
        self._log_prompts = log_prompts
        # Prompts are rendered and encoded here; the tokens of an answer have a thread of their own.
        self._threads = ThreadPoolExecutor(32, "flashmoe-serve")

    def app(self, access: Access) -> Starlette:
        routes = [
            Route("/health", self._health),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._one_model),
            Route("/v1/chat/completions", self._caught(self._chat), methods=["POST"]),
            Route("/v1/completions", self._caught(self._completion), methods=["POST"]),
            Route("/v1/messages", self._caught(self._message), methods=["POST"]),
            Route("/v1/messages/count_tokens", self._caught(self._count), methods=["POST"]),
        ]
        origins: dict[str, Any] = {"allow_origin_regex": _LOCAL_ORIGIN}
        if access.origins is not None:
            origins = {"allow_origins": access.origins}
        cors = Middleware(
            CORSMiddleware,
            **origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,  # browsers ask for it where a public page asks this machine
            expose_headers=["request-id", "x-request-id"],
        )
        return Starlette(
            routes=routes,
            middleware=[Middleware(_Logged), cors, Middleware(_Guard, access=access)],
            exception_handlers={HTTPException: _no_such_address},
        )

    async def _health(self, request: Request) -> Response:
        held = self._model.conversations
        return _json(
            {
                "status": "ok",
                "model": self._name,
                "context": self._model.context,
                "busy": self.busy,
                "snapshots": len(held),
                "snapshot_bytes": held.nbytes,
            }
        )

    def _described(self) -> dict[str, Any]:
        """The model in the words of both APIs, and of other servers that say its context."""
        created = datetime.fromtimestamp(self._created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        context = self._model.context
        return {
            "id": self._name,
            "object": "model",
            "created": self._created,
            "owned_by": "flashmoe",
            "context_length": context,
            "max_model_len": context,
            "type": "model",
            "display_name": self._name,
            "created_at": created,
            "lifecycle": "active",
            "max_input_tokens": context,
            "max_tokens": context,
        }

    async def _models(self, request: Request) -> Response:
        return _json(
            {
                "object": "list",
                "data": [self._described()],
                "has_more": False,
                "first_id": self._name,
                "last_id": self._name,
            }
        )

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name == self._name:
            return _json(self._described())
        return _error(
            request.scope,
            RequestError(
                f"The model {name[:200]!r} does not exist; this server has {self._name!r}",
                "model",
                status=404,
                code="model_not_found",
            ),
        )

    async def _chat(self, request: Request) -> ASGIApp:
        return await self._answer(
            request, lambda body: openai.chat_of(body, self._name, self._vocab_size), ChatReply
        )

    async def _completion(self, request: Request) -> ASGIApp:
        def parse(body: Fields) -> Ask:
            return openai.completion_of(body, self._name, self._vocab_size)

        return await self._answer(request, parse, CompletionReply)

    async def _message(self, request: Request) -> ASGIApp:
        return await self._answer(
            request, lambda body: anthropic.message_of(body, self._name), MessageReply
        )

    async def _count(self, request: Request) -> ASGIApp:
        data = await _body(request)

        def count() -> int:
            body = self._fields(data)
            return anthropic.message_of(body, self._name, count=True).count(self._model)

        return _json({"input_tokens": await self._in_thread(count)})

    async def _answer(self, request: Request, parse: Parse, kind: type[Reply]) -> ASGIApp:
        if self.busy >= MOST_AT_ONCE:
            raise RequestError(
                f"{self.busy} requests are being answered; try again later", status=503
            )
        data = await _body(request)

        def begin() -> tuple[Ask, list[Chat]]:
            ask = parse(self._fields(data))
            return ask, ask.begin(self._model)

        self.busy += 1
        try:
            ask, chats = await self._in_thread(begin)
        finally:
            self.busy -= 1
        reply = kind(ask, self._model.checkpoint.tokenizer, self._fingerprint)
        events = self._events(chats, reply)
        if ask.stream:
            return EventStream(events, reply, _logged_failure)
        if await run_to_end(events, request.receive):
            return _json(reply.whole())
        return Response(status_code=499)  # nobody is there to read it

    async def _events(self, chats: Sequence[Chat], reply: Reply) -> AsyncGenerator[Event, None]:
        """The events of a reply, while its answers are computed one after another."""
        self.busy += 1
        try:
            for event in reply.begin(chats):
                yield event
            for index, chat in enumerate(chats):
                pieces = AsyncChat(chat)
                try:
                    for event in reply.choice(index):
                        yield event
                    async for delta in pieces:
                        for event in reply.piece(index, delta):
                            yield event
                    answer = await pieces.answer()
                finally:
                    await pieces.aclose()
                if self._log_prompts:
                    log.info("%s answer: %s", reply.id, answer)
                for event in reply.ended(index, answer):
                    yield event
            for event in reply.finish():
                yield event
        finally:
            self.busy -= 1

    def _fields(self, data: bytes) -> Fields:
        try:
            value = strict_json(data.decode("utf-8-sig"))
        except ValueError as error:  # not UTF-8 either
            raise RequestError(f"the body is not valid JSON: {str(error)[:200]}") from None
        if self._log_prompts:
            log.info("request: %s", value)
        return Fields(value)

    async def _in_thread(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _caught(
        self, endpoint: Callable[[Request], Awaitable[ASGIApp]]
    ) -> Callable[[Request], Awaitable[ASGIApp]]:
        """An endpoint whose errors are replies."""

        async def caught(request: Request) -> ASGIApp:
            try:
                return await endpoint(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except Exception as error:
                return _error(request.scope, _logged_failure(error))

        return caught


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise RequestError(f"the body is larger than {MOST_BYTES} bytes", status=413)
    return bytes(data)


def _logged_failure(error: Exception) -> RequestError:
    """What a client is told; what went wrong here is logged, less what may quote a prompt."""
    failure = failure_of(error)
    if failure.status >= 500:
        frames = "".join(traceback.format_tb(error.__traceback__))
        # Of an error that is not ours the message may be anything.
        message = error if isinstance(error, FlashMoeError) else ""
        log.error("%s: %s\n%s", type(error).__name__, message, frames)
    return failure


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")


def _error(scope: Scope, error: RequestError) -> Response:
    """An error in the shape of the API that the request is of."""
    messages = scope["path"].startswith("/v1/messages")
    api: ModuleType = anthropic if messages or _header(scope, "anthropic-version") else openai
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    if error.status == 503:
        headers["retry-after"] = "1"
    return _json(api.error_body(error), error.status, headers)


async def _no_such_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {printable(request.url.path, 200)}"
    known = "see /v1/models, /v1/chat/completions, /v1/completions, /v1/messages, /health"
    message = f"Unknown request URL: {what}; {known}"
    code = "unknown_url"
    if error.status_code == 405:
        message, code = f"Method not allowed: {what}", "method_not_supported"
    response = _error(request.scope, RequestError(message, status=error.status_code, code=code))
    response.headers.update(error.headers or {})
    return response


def _header(scope: Scope, name: str) -> str | None:
    return Headers(scope=scope).get(name)


class _Logged:
    """Gives every reply an id, and logs every request by its address and status alone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, id = time.monotonic(), 0, new_id("req_")

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ids = [(name, id.encode()) for name in (b"request-id", b"x-request-id")]
                message = {**message, "headers": [*message["headers"], *ids]}
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            took = time.monotonic() - start
            path = printable(scope["path"], 200)
            log.info("%s %s %s %d %.2f s", id, scope["method"], path, status, took)


class _Guard:
    """Refuses requests with a foreign Host, and those without the key.

    A page whose name its owner points at this machine would else read what it likes.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._open = not _is_loopback(access.host)
        own = socket.gethostname().lower()
        self._names = _LOCAL_NAMES | {access.host.lower(), own, f"{own}.local"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: ASGIApp = self._app
        if scope["type"] == "http":
            response = self._refusal(scope) or self._app
        await response(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        if not self._is_ours(_header(scope, "host") or ""):
            return _error(
                scope,
                RequestError(
                    "the Host header names another machine; this server answers to localhost and "
                    "to the address that --host gave it",
                    status=403,
                    code="host_not_allowed",
                ),
            )
        if self._access.key is None or scope["path"] == "/health":
            return None
        scheme, _, token = (_header(scope, "authorization") or "").partition(" ")
        given = [_header(scope, "x-api-key") or ""]
        if scheme.lower() == "bearer":
            given.append(token.strip())
        key = self._access.key.encode()
        if any(hmac.compare_digest(text.encode("latin-1"), key) for text in given):
            return None
        return _error(
            scope,
            RequestError(
                "Incorrect API key provided: give the key that the server was started with, as "
                "Authorization: Bearer KEY or as x-api-key",
                status=401,
                code="invalid_api_key",
            ),
        )

    def _is_ours(self, host: str) -> bool:
        match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::\d+)?", host.strip().lower())
        name = match[1].strip("[]").removesuffix(".") if match else ""
        if name in self._names or name.endswith(".localhost") or _is_loopback(name):
            return name != ""
        # Where it listens to others they call it by whatever address it has.
        return self._open and _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)
