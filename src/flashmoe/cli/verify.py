"""`flashmoe verify`."""

from __future__ import annotations

import json

import typer

from flashmoe.cli.options import Json, Source
from flashmoe.cli.progress import Bar

SHOWN = 20
"""Faults that are shown: a hole may go through thousands of experts."""


def verify(source: Source, as_json: Json = False) -> None:
    """Read every byte of a model, and say whether its files are whole.

    Files are compared with the hub's hashes where a download left them; weights of others are
    searched for stretches of zeros, which a download leaves where it wrote nothing. A model that
    is not here is downloaded. Exit code 1 if something is wrong.

    \b
    Examples:
      flashmoe verify mlx-community/Qwen3.5-397B-A17B-4bit
      flashmoe verify ./packed --json
    """
    from flashmoe.cli.report import size  # noqa: PLC0415
    from flashmoe.measure.verify import verify as look  # noqa: PLC0415

    with Bar("verifying", "bytes") as progress:
        found = look(source, progress=progress)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        said = {
            True: "as on the hub",
            False: "NOT AS ON THE HUB",
            None: "the download left no hash",
        }
        for file in found.files:
            typer.echo(f"{file.name}: {size(file.nbytes)}, {said[file.published]}")
        if found.searched:
            typer.echo(f"searched {size(found.searched)} of weights for holes")
        for fault in found.faults[:SHOWN]:
            typer.echo(f"wrong: {fault}")
        if len(found.faults) > SHOWN:
            typer.echo(f"and {len(found.faults) - SHOWN} more")
        typer.echo(f"{source}: {'good' if found.good else 'DAMAGED'}")
    raise typer.Exit(0 if found.good else 1)
