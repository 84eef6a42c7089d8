"""`flashmoe eval`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmoe.cli.options import Backend, Cache, Experts, Json, Precision, Source, Threads
from flashmoe.cli.progress import Bar
from flashmoe.cli.running import open_model
from flashmoe.errors import ArgumentError

if TYPE_CHECKING:
    from flashmoe.generate.model import Model


def evaluate(
    source: Source,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text to predict, token by token.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to answer greedily, a JSON object a line: messages, and a schema that "
            "the answer is to follow, or tools and the call that is right.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Compare predictions with this model's."),
    ] = None,
    reference_experts: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Experts per token of the reference. What is not given of the reference is as in "
            "MODEL; giving any of it asks for the comparison.",
        ),
    ] = None,
    reference_precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Precision of the reference.")
    ] = None,
    window: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Tokens predicted from one state, at first empty."),
    ] = 1024,
    nbytes: Annotated[
        int | None,
        typer.Option("--bytes", min=1, metavar="N", help="Only so many bytes of the text."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only so many prompts with a schema, and of calls."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", min=1, metavar="N", help="Of an answer.")
    ] = 512,
    experts_per_token: Experts = "auto",
    backend: Backend = "auto",
    precision: Precision = "int8",
    threads: Threads = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Measure how well a model predicts a text and answers prompts, and what a setting changes.

    Of a text: bits per byte and perplexity; against a reference also the KL divergence from it and
    how often both find the same token likeliest. Of prompts: the share of valid JSON, of JSON that
    follows its schema, of right tool calls. Every number has a 95 % interval.

    \b
    Examples:
      flashmoe eval demo --text notes.txt
      flashmoe eval ./packed -e 4 --text notes.txt --reference-experts 0
      flashmoe eval ./packed-2bit --reference ./packed --text notes.txt --prompts prompts.jsonl
    """
    from flashmoe.cli.report import eval_lines  # noqa: PLC0415
    from flashmoe.measure import evaluate as module  # noqa: PLC0415

    if text is None and prompts is None:
        raise ArgumentError("nothing to measure; give --text FILE, --prompts FILE or both")
    compared = (reference, reference_experts, reference_precision) != (None, None, None)
    if compared and text is None:
        raise ArgumentError("a reference is compared on a text; give --text FILE")
    asked = None if prompts is None else module.read_prompts(prompts)
    if asked is not None and count is not None:
        asked = module.first_of_each(asked, count)
    content = None if text is None else module.read_text(text, nbytes)
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(
            open_model(source, experts_per_token, backend, precision, threads, cache)
        )
        result["model"] = _setting(model)
        other = None
        if compared:
            experts = experts_per_token if reference_experts is None else reference_experts
            other = stack.enter_context(
                open_model(
                    reference or source,
                    experts,
                    backend,
                    reference_precision or precision,
                    threads,
                    cache,
                )
            )
            result["reference"] = _setting(other)
        if content is not None:
            with Bar("reading the text", "tokens") as progress:
                score = module.score_text(
                    model, content, reference=other, window=window, progress=progress
                )
            result["text"] = {"file": str(text), "window": window, **score.to_dict()}
        if asked is not None:
            with Bar("answering", "prompts") as progress:
                shares = module.answer_prompts(
                    model, asked, max_tokens=max_tokens, progress=progress
                )
            result["prompts"] = {
                "file": str(prompts),
                "count": len(asked),
                **{name: vars(share) for name, share in shares.items()},
            }
    typer.echo(json.dumps(result, indent=2) if as_json else "\n".join(eval_lines(result)))


def _setting(model: Model) -> dict[str, Any]:
    return {
        "source": model.source,
        "experts_per_token": model.experts_per_token,
        "precision": model.precision,
    }
