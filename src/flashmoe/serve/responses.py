"""Responses of one piece: JSON, and errors in the shape of the API that was asked."""

from __future__ import annotations

import logging
import traceback
from types import ModuleType
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

from flashmoe.errors import FlashMoeError
from flashmoe.serve import anthropic, openai
from flashmoe.serve.ask import failure_of
from flashmoe.serve.fields import RequestError
from flashmoe.serve.reply import to_json

log = logging.getLogger("flashmoe.serve")


def logged_failure(error: Exception) -> RequestError:
    """What a client is told; what went wrong here is logged, less what may quote a prompt."""
    failure = failure_of(error)
    if failure.status >= 500:
        frames = "".join(traceback.format_tb(error.__traceback__))
        # Of an error that is not ours the message may be anything.
        message = error if isinstance(error, FlashMoeError) else ""
        log.error("%s: %s\n%s", type(error).__name__, message, frames)
    return failure


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), status, headers, "application/json")


def error_response(scope: Scope, error: RequestError) -> Response:
    """An error in the shape of the API that the request is of."""
    messages = scope["path"].startswith("/v1/messages")
    api: ModuleType = anthropic if messages or header(scope, "anthropic-version") else openai
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
    if error.status == 503:
        headers["retry-after"] = "1"
    return json_response(api.error_body(error), error.status, headers)


def header(scope: Scope, name: str) -> str | None:
    return Headers(scope=scope).get(name)
