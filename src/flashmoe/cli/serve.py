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
        typer.Option(metavar="ADDRESS", help="To listen at; 0.0.0.0 for every one there is."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="0 for any that is free.")
    ] = 8080,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="A page's origin, as https://chat.example, whose scripts may ask, or *; may be "
            "given several times. If not given: pages of this machine.",
        ),
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="That clients must send; none if not given.")
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log what is asked and answered too.")
    ] = False,
    experts_per_token: Experts = "auto",
    backend: Backend = "auto",
    precision: Precision = "int8",
    threads: Threads = None,
    cache: Cache = None,
    context: Context = None,
) -> None:
    """Serve a model to clients of OpenAI's and Anthropic's API, until Ctrl-C.

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
