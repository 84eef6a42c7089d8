"""`flashmoe bench`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flashmoe.cli.options import Backend, Cache, Experts, Json, Precision, Source, Threads
from flashmoe.cli.running import open_model


def bench(
    source: Source,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Length of the prompt.")
    ] = 256,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens to generate.")] = 64,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="Runs to take the medians of.")] = 3,
    experts_per_token: Experts = "auto",
    backend: Backend = "auto",
    precision: Precision = "int8",
    threads: Threads = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Measure prefill, decode, time to first token, bytes read, hit rate and peak memory.

    \b
    Examples:
      flashmoe bench demo
      flashmoe bench ./packed --tokens 128 --runs 5 --json
    """
    from flashmoe.cli.report import bench_lines  # noqa: PLC0415
    from flashmoe.measure.bench import run_bench  # noqa: PLC0415

    with open_model(source, experts_per_token, backend, precision, threads, cache) as model:
        result = run_bench(
            model,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            runs=runs,
            done=lambda i, run: typer.echo(
                f"run {i} of {runs}: {run['decode_rate']:.2f} tok/s", err=True
            ),
        )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        typer.echo("\n".join(bench_lines(result)))
