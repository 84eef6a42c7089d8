"""The application: what is at which address."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from flashmoe.checkpoint.json import strict_json
from flashmoe.errors import printable
from flashmoe.generate.background import AsyncChat
from flashmoe.serve import anthropic, openai
from flashmoe.serve.access import Access, middleware
from flashmoe.serve.anthropic import MessageReply
from flashmoe.serve.ask import Ask
from flashmoe.serve.fields import Fields, RequestError
from flashmoe.serve.openai_reply import ChatReply, CompletionReply
from flashmoe.serve.reply import Event, Reply
from flashmoe.serve.responses import error_response, json_response, logged_failure
from flashmoe.serve.stream import EventStream, run_to_end

if TYPE_CHECKING:
    from flashmoe.generate.chat import Chat
    from flashmoe.generate.model import Model

log = logging.getLogger("flashmoe.serve")

MOST_BYTES = 64 << 20
"""Of a request's body."""
MOST_AT_ONCE = 128
"""Requests that are answered at once; each has a thread and a state."""
_T = TypeVar("_T")
Parse = Callable[[Fields], Ask]


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
        return Starlette(
            routes=routes,
            middleware=middleware(access),
            exception_handlers={HTTPException: _no_such_address},
        )

    async def _health(self, request: Request) -> Response:
        held = self._model.conversations
        return json_response(
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
        return json_response(
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
            return json_response(self._described())
        return error_response(
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

        return json_response({"input_tokens": await self._in_thread(count)})

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
            return EventStream(events, reply, logged_failure)
        if await run_to_end(events, request.receive):
            return json_response(reply.whole())
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
                return error_response(request.scope, logged_failure(error))

        return caught


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise RequestError(f"the body is larger than {MOST_BYTES} bytes", status=413)
    return bytes(data)


async def _no_such_address(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {printable(request.url.path, 200)}"
    known = "see /v1/models, /v1/chat/completions, /v1/completions, /v1/messages, /health"
    message = f"Unknown request URL: {what}; {known}"
    code = "unknown_url"
    if error.status_code == 405:
        message, code = f"Method not allowed: {what}", "method_not_supported"
    response = error_response(
        request.scope, RequestError(message, status=error.status_code, code=code)
    )
    response.headers.update(error.headers or {})
    return response
