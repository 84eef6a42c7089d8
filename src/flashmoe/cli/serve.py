"""`flashmoe serve`."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from flashmoe.cli.options import Backend, Cache, Context, Experts, Precision, Source, Threads
from flashmoe.cli.running import open_model
from flashmoe.errors import ArgumentError


def serve(
    source: Source,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Address to listen at; 0.0.0.0: all of them."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port to listen at; 0: any free one.")
    ] = 8080,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Origin of web pages that may call the server, such as https://chat.example, or "
            "*; can be repeated. If not given, only pages of this machine may.",
        ),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Key that clients must send; if not given, none."),
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Also log prompts and answers.")
    ] = False,
    experts_per_token: Experts = "auto",
    backend: Backend = "auto",
    precision: Precision = "int8",
    threads: Threads = None,
    cache: Cache = None,
    context: Context = None,
) -> None:
    """Serve a model over OpenAI's and Anthropic's API, until Ctrl-C.

    \b
    Examples:
      flashmoe serve mlx-community/Qwen3.5-397B-A17B-4bit
      flashmoe serve demo --port 8000 --api-key secret
    """
    try:
        from flashmoe.serve.access import Access  # noqa: PLC0415
        from flashmoe.serve.server import bind, make_server, url_of  # noqa: PLC0415
    except ImportError as error:
        raise ArgumentError(
            f"serving needs starlette and uvicorn ({error}): pip install 'flashmoe[serve]'"
        ) from None
    if api_key is not None and not api_key.strip():
        raise ArgumentError("--api-key is empty; leave it out if clients need none")
    # Before the model, which may take minutes.
    with (
        bind(host, port) as listener,
        open_model(source, experts_per_token, backend, precision, threads, cache, context) as model,
    ):
        logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s")
        logging.getLogger("flashmoe.serve").setLevel(logging.INFO)
        server = make_server(model, Access(host, cors, api_key), log_prompts=log_prompts)
        listener.listen()  # who reads the line may connect
        typer.echo(f"{url_of(listener)} serves {model.source}, context: {model.context} tokens")
        sys.stdout.flush()
        server.run(sockets=[listener])
