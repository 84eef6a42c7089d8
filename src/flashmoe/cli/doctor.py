"""`flashmoe doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from flashmoe.cli.options import Json


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes: right or wrong, but not how fast.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Report what this machine is, whether every backend is right here, and how fast. No network.

    Every kernel is compared with numpy and timed at the shapes of the published models; the demo
    model runs on every backend; reads are timed on a file of 1 GB, which is removed again. Takes a
    few minutes. Exit code 1 if something is wrong.
    """
    from flashmoe.cli.report_doctor import doctor_lines  # noqa: PLC0415
    from flashmoe.measure.doctor import examine  # noqa: PLC0415

    report = examine(quick=quick)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        typer.echo("\n".join(doctor_lines(report)))
    raise typer.Exit(0 if report.good else 1)
