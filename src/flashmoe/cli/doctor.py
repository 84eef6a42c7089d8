"""`flashmoe doctor`."""

from __future__ import annotations

import typer


def doctor() -> None:
    """Check that every backend of this machine computes what the CPU does. No network.

    Exit code 1 if one does not.
    """
    from flashmoe.measure.doctor import examine  # noqa: PLC0415

    good = True
    for finding in examine():
        typer.echo(str(finding))
        good = good and finding.good
    raise typer.Exit(0 if good else 1)
