"""`flashmoe pack`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flashmoe.cli.options import Json, Threads
from flashmoe.cli.progress import Bar


def pack(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A hub id, a directory, or 'demo'.")],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="A new directory, or an unfinished pack.")
    ],
    bits: Annotated[
        int, typer.Option(metavar="2|4|8|16", help="Bits per weight; 16: do not quantize.")
    ] = 4,
    group_size: Annotated[
        int, typer.Option(metavar="32|64|128", help="Weights that share a scale and a bias.")
    ] = 64,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a model in the layout that reads best, quantized as MLX does.

    Stopped at any moment, the same command goes on where it was.

    \b
    Examples:
      flashmoe pack mlx-community/Qwen3.5-397B-A17B-4bit ./packed
      flashmoe pack ./Qwen3.5-35B-A3B ./packed-2bit --bits 2 --group-size 32
    """
    from flashmoe.cli.report import size  # noqa: PLC0415
    from flashmoe.pack.pack import pack as write  # noqa: PLC0415

    with Bar("packing", "bytes") as progress:
        made = write(
            source,
            destination,
            bits=bits,
            group_size=group_size,
            threads=threads,
            progress=progress,
        )
    if as_json:
        result = {
            "destination": str(made.destination),
            "nbytes": made.nbytes,
            "written": made.written,
            "dense": list(made.dense),
        }
        typer.echo(json.dumps(result))
        return
    for path in made.dense:
        typer.echo(f"kept at 16 bits, groups of {group_size} do not divide it: {path}", err=True)
    typer.echo(f"{made.destination}: {size(made.nbytes)}, {size(made.written)} of it written now")
