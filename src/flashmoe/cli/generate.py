"""`flashmoe demo` and `flashmoe generate`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from flashmoe.cli.options import (
    Backend,
    Cache,
    Context,
    Eos,
    Experts,
    Json,
    MaxTokens,
    Precision,
    Seed,
    Source,
    Temperature,
    Threads,
    parse_eos,
)
from flashmoe.cli.progress import Bar
from flashmoe.cli.running import open_model, stream
from flashmoe.errors import ArgumentError

DEMO_PROMPT = "What is a mixture of experts?"


def demo(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The prompt.")] = DEMO_PROMPT,
    max_tokens: MaxTokens = 200,
    temperature: Temperature = None,
    seed: Seed = None,
    backend: Backend = "auto",
    as_json: Json = False,
) -> None:
    """Stream text from the small model that comes with flashmoe. No network.

    \b
    Examples:
      flashmoe demo
      flashmoe demo "Continue: The old man looked at the sea." --seed 1
    """
    with open_model("demo", backend=backend) as model:
        messages = [{"role": "user", "content": prompt}]
        ids = model.prompt_ids(messages)
        tokens = model.generate(ids, max_tokens=max_tokens, temperature=temperature, seed=seed)
        typer.secho(f"> {prompt}", err=True, bold=True)
        stream(model, tokens, as_json)


def generate(
    source: Source,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="The prompt; read from standard input if '-' or not given."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Answer the prompt as a chat message, or continue it as plain text. If neither is "
            "given: --chat if the model has a chat template.",
        ),
    ] = None,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system message of the conversation.")
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Whether the model reasons before it answers."),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_k: Annotated[
        int | None,
        typer.Option(metavar="K", help="Sample from the K most probable tokens; 0: all."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Sample from the most probable tokens that sum to P; 1: all."
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="P", help="Drop tokens less than P times as probable as the top one; 0: none."
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(metavar="X", help="Divide the logits of tokens already seen; 1: off."),
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(metavar="X", help="Subtract from the logits of generated tokens; 0: off."),
    ] = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; can be repeated."),
    ] = None,
    eos: Eos = None,
    experts_per_token: Experts = "auto",
    backend: Backend = "auto",
    precision: Precision = "int8",
    threads: Threads = None,
    cache: Cache = None,
    context: Context = None,
    as_json: Json = False,
) -> None:
    """Answer a prompt, streaming the text to stdout.

    \b
    Examples:
      flashmoe generate mlx-community/Qwen3.5-397B-A17B-4bit "Explain quantum computing"
      flashmoe generate ./packed "Say hello" --no-think -n 50 --temperature 0
      cat notes.txt | flashmoe generate ./packed --system "Summarise the text."
      flashmoe generate ./packed --raw "def fibonacci(n):" --stop END
    """
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise ArgumentError(
                "no prompt; write it after the model, or pipe it in: "
                'flashmoe generate MODEL "Explain quantum computing"'
            )
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise ArgumentError(f"standard input is not text: {error}") from error
    from flashmoe.generate.sampling import Sampling  # noqa: PLC0415

    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
    }
    Sampling().override(**sampling)  # refuses bad values before a large model is loaded
    if chat is False and (system is not None or think is not None):
        raise ArgumentError("--system and --think belong to a conversation; leave out --raw")
    with open_model(
        source, experts_per_token, backend, precision, threads, cache, context
    ) as model:
        conversing = system is not None or think is not None
        chatting = conversing or model.chat_template is not None if chat is None else chat
        options: dict[str, Any] = {
            **sampling,
            "max_tokens": max_tokens,
            "seed": seed,
            "stop": stop or None,
            "eos": parse_eos(eos),
        }
        with Bar("reading the prompt", "tokens") as options["progress"]:
            if chatting:
                messages = [{"role": "user", "content": prompt}]
                if system is not None:
                    messages.insert(0, {"role": "system", "content": system})
                tokens = model.generate(model.prompt_ids(messages, think=think), **options)
            else:
                tokens = model.generate(prompt, **options)
            stream(model, tokens, as_json)
