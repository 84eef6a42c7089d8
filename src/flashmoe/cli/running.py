"""What every command that runs a model does: open it with a bar, say what is in force, stream."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from flashmoe.cli.options import parse_experts
from flashmoe.cli.progress import Bar

if TYPE_CHECKING:
    from flashmoe.generate.answer import Token
    from flashmoe.generate.model import Model
    from flashmoe.generate.steps import Tokens


@contextlib.contextmanager
def open_model(
    source: str,
    experts_per_token: str = "auto",
    backend: str = "auto",
    precision: str = "int8",
    threads: int | None = None,
    cache: str | None = None,
    context: int | None = None,
) -> Iterator[Model]:
    """A model, opened with progress on stderr, that says what is in force."""
    from flashmoe.generate.model import Model  # noqa: PLC0415

    with _log_on_stderr(), Bar("loading", "bytes") as progress:
        model = Model(
            source,
            experts_per_token=parse_experts(experts_per_token),
            backend=backend,
            precision=precision,
            threads=threads,
            cache=cache,
            context=context,
            progress=progress,
        )
    with model:
        yield model


@contextlib.contextmanager
def _log_on_stderr() -> Iterator[None]:
    """What the library logs goes to stderr: what is in force, and warnings."""
    log, handler = logging.getLogger("flashmoe"), logging.StreamHandler()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


def stream(model: Model, tokens: Tokens, as_json: bool) -> None:
    """Prints texts as they come and statistics at the end; all of it at the end for JSON."""
    taken: list[Token] = []
    try:
        for token in tokens:
            taken.append(token)
            if not as_json:
                sys.stdout.write(token.text)
                sys.stdout.flush()
    finally:
        # Stops the work at once where the output was closed or Ctrl-C came.
        tokens.close()
    if as_json:
        answer = {
            "text": "".join(token.text for token in taken),
            "tokens": [{"id": t.id, "text": t.text, "logprob": t.logprob} for t in taken],
            "stats": model.stats.to_dict(),
        }
        typer.echo(json.dumps(answer))
        return
    typer.echo()
    from flashmoe.cli.report import stats_line  # noqa: PLC0415

    typer.secho(stats_line(model.stats), err=True, dim=True)
