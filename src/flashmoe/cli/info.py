"""`flashmoe info`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flashmoe.cli.options import Experts, Json, Source, parse_experts


def info(
    source: Source,
    experts_per_token: Experts = "auto",
    disk_rate: Annotated[
        float | None,
        typer.Option(metavar="GB/S", help="Of the SSD; measured or assumed if not given."),
    ] = None,
    memory_rate: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Of memory; measured if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a model is, and whether and how fast it runs here, before downloading it.

    Of a model on the hub only its config and the headers of its files are fetched.

    \b
    Examples:
      flashmoe info mlx-community/Qwen3.5-397B-A17B-4bit
      flashmoe info ./packed --disk-rate 6.5 --json
    """
    from flashmoe.cli.report import info_lines  # noqa: PLC0415
    from flashmoe.measure.info import describe  # noqa: PLC0415

    found = describe(
        source,
        experts_per_token=parse_experts(experts_per_token),
        disk_rate=None if disk_rate is None else disk_rate * 1e9,
        memory_rate=None if memory_rate is None else memory_rate * 1e9,
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        typer.echo("\n".join(info_lines(found)))
