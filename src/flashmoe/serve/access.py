"""Who may ask: hosts, pages and keys; and what the log tells of every request."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashmoe.errors import printable
from flashmoe.serve.fields import RequestError
from flashmoe.serve.reply import new_id
from flashmoe.serve.responses import error_response, header

log = logging.getLogger("flashmoe.serve")

_LOCAL_ORIGIN = r"https?://(localhost|[a-z0-9-]+\.localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?"
_LOCAL_NAMES = {"localhost", "host.docker.internal"}
"""The latter is what a container calls the machine it runs on."""


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


def middleware(access: Access) -> list[Middleware]:
    """What every request passes on its way to its address, the outermost first."""
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
    return [Middleware(_Logged), cors, Middleware(_Guard, access=access)]


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
        if not self._is_ours(header(scope, "host") or ""):
            return error_response(
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
        scheme, _, token = (header(scope, "authorization") or "").partition(" ")
        given = [header(scope, "x-api-key") or ""]
        if scheme.lower() == "bearer":
            given.append(token.strip())
        key = self._access.key.encode()
        if any(hmac.compare_digest(text.encode("latin-1"), key) for text in given):
            return None
        return error_response(
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
