"""Options that several commands share, and what they mean to the library."""

from __future__ import annotations

from typing import Annotated

import typer

from flashmoe.checkpoint.config import ExpertsPerToken
from flashmoe.errors import ArgumentError

MAX_THREADS = 1024

Source = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a directory, or 'demo'.")]
Experts = Annotated[
    str,
    typer.Option(
        "--experts-per-token",
        "-e",
        metavar="N|auto",
        help="Experts that each layer runs for a token, at most the model's own number. 0: the "
        "model's own; auto: the same, but 4 of 10 for Qwen3.5-397B-A17B.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="cpu; metal, a Mac's GPU; or auto: the GPU on a Mac, else the CPU."
    ),
]
Precision = Annotated[
    str,
    typer.Option(metavar="NAME", help="int8, or float32: exact activations, the reference."),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MAX_THREADS,
        metavar="N",
        help="Threads to compute with; if not given, one per physical core.",
    ),
]
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for experts, such as 4GB; 0 leaves caching to the system. If not given, what "
        "fits in 70 % of the available memory.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Maximum tokens of a sequence; if not given, the model's own."
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option("--max-tokens", "-n", min=0, metavar="N", help="Generate at most N tokens."),
]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", help="0 is greedy; if not given, the model's own."),
]
Seed = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="The same seed draws the same tokens.")
]
Eos = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOKEN",
        help="Also end after this token, given as text or as an id; can be repeated.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


def parse_eos(given: list[str] | None) -> list[int | str]:
    """`eos` as the library takes it."""
    return [
        int(token) if token.isascii() and token.isdecimal() and len(token) < 10 else token
        for token in given or ()
    ]


def parse_experts(given: str) -> ExpertsPerToken:
    """`experts_per_token` as the library takes it; ArgumentError for what is no such thing."""
    if given == "auto":
        return "auto"
    if not (given.isascii() and given.isdecimal() and len(given) < 10):
        raise ArgumentError(f"--experts-per-token is a number, 0 or auto; got {given!r}")
    return int(given) or None
