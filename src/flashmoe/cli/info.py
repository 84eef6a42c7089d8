"""`flashmoe info`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flashmoe.cli.options import MAX_THREADS, Experts, Json, parse_experts


def info(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A hub id, a directory, or 'demo'; if not given, the published models.",
            show_default=False,
        ),
    ] = None,
    experts_per_token: Experts = "auto",
    machine: Annotated[
        str | None,
        typer.Option(metavar="MAC", help="Ask about another machine, such as 'M3 Max 48GB'."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=MAX_THREADS, metavar="N", help="CPU threads; if not given, all cores."
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory for experts, as when running."),
    ] = None,
    disk_rate: Annotated[
        float | None,
        typer.Option(metavar="GB/S", help="Speed of the SSD; if not given, measured or assumed."),
    ] = None,
    memory_rate: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Speed of memory; if not given, measured.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a model is, and whether and how fast it runs here, before downloading it.

    Of a model on the hub only its config and the headers of its files are fetched. Speeds are
    predicted from this machine's measured rates, or from a table of Macs.

    \b
    Examples:
      flashmoe info
      flashmoe info mlx-community/Qwen3.5-397B-A17B-4bit --machine "M3 Max 48GB"
      flashmoe info ./packed --disk-rate 6.5 --json
    """
    from flashmoe.cli.report_info import family_lines, info_lines  # noqa: PLC0415
    from flashmoe.measure.fit import Target, fit_family  # noqa: PLC0415
    from flashmoe.measure.info import describe  # noqa: PLC0415

    target = Target(
        machine=machine,
        disk_rate=None if disk_rate is None else disk_rate * 1e9,
        memory_rate=None if memory_rate is None else memory_rate * 1e9,
        threads=threads,
        cache=cache,
    )
    if source is None:
        family = fit_family(target)
        models = [
            {"model": model.name.strip(), "disk": model.disk, "resident": model.resident}
            | {"fit": fit.to_dict()}
            for model, fit in family
        ]
        typer.echo(json.dumps(models, indent=2) if as_json else "\n".join(family_lines(family)))
        return
    found = describe(source, experts_per_token=parse_experts(experts_per_token), target=target)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        typer.echo("\n".join(info_lines(found)))
