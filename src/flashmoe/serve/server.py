"""Listening: an address, uvicorn, and the end."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING

import uvicorn

from flashmoe.errors import ArgumentError
from flashmoe.generate.constraint import prepare
from flashmoe.serve.access import Access
from flashmoe.serve.app import make_app

if TYPE_CHECKING:
    from flashmoe.generate.model import Model

_GRACE = 1  # seconds that answers may still take once the server is to end


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address, which refuses connections until it is served.

    Raises:
        ArgumentError: there is no such address here, or somebody else has it.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ArgumentError(
            f"cannot listen at {host}, port {port}: {error.strerror or error}; give another with "
            "--host and --port"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where clients find a bound socket."""
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def make_server(model: Model, access: Access, *, log_prompts: bool = False) -> uvicorn.Server:
    """What answers: `run(sockets=[listener])` does so until Ctrl-C, or until `should_exit`.

    The model stays its caller's to close. What takes long at a first request is begun now.
    """
    prepare(model.checkpoint)
    if model.chat_template is not None:
        model.prompt_ids([{"role": "user", "content": "Hello"}])
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # requests are logged by the app
    config = uvicorn.Config(
        make_app(model, access, log_prompts=log_prompts),
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,  # seconds, longer than clients keep a connection for another use
        timeout_graceful_shutdown=_GRACE,
    )
    return uvicorn.Server(config)
