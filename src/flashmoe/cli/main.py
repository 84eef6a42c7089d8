"""The command line. Text and results go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from flashmoe.cli.progress import Bar
from flashmoe.errors import ArgumentError, FlashMoeError

if TYPE_CHECKING:
    from flashmoe.generate.model import Model, Token

DEMO_PROMPT = "What is a mixture of experts?"
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE = 1, 2, 130, 141


class Commands(TyperGroup):
    """Turns what a command raises into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FlashMoeError as error:
            typer.secho("error: ", err=True, fg="red", bold=True, nl=False)
            typer.echo(str(error), err=True)
            code = EXIT_USAGE if isinstance(error, ArgumentError) else EXIT_ERROR
            raise typer.Exit(code) from error
        except KeyboardInterrupt:
            typer.echo("\nstopped", err=True)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # Who read the output has gone, as `head` does. Python would complain when it flushes.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_PIPE) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The `flashmoe` program."""
    app(prog_name="flashmoe")


def _version(wanted: bool) -> None:
    if wanted:
        import flashmoe  # noqa: PLC0415

        typer.echo(f"flashmoe {flashmoe.__version__}")
        raise typer.Exit


@app.callback()
def flashmoe(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Run Mixture-of-Experts language models far larger than memory.

    Exit codes: 0 done, 1 an error, 2 wrong usage, 130 stopped by Ctrl-C, 141 output closed early.
    """


Source = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a directory, or 'demo'.")]
ExpertsPerToken = Annotated[
    int,
    typer.Option(
        "--experts-per-token",
        "-k",
        min=0,
        metavar="N",
        help="Experts a layer runs, at most the model's own number; 0 for all of those.",
    ),
]
Precision = Annotated[
    str,
    typer.Option(metavar="NAME", help="int8, or float32: activations unquantised, the reference."),
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="To compute with; all physical cores if not given."),
]
Cache = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory for experts, as 4GB; 0 leaves it to the page cache. If not given, what 70 % "
        "of the available memory have room for.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Most tokens of a sequence; the model's own if not given."
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", "-n", min=0, metavar="N", help="To generate at most.")
]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", help="0 is greedy. This and what follows: the model's if not given."),
]
Seed = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="The same seed draws the same tokens.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, for programs.")]


@app.command()
def demo(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer.")] = DEMO_PROMPT,
    max_tokens: MaxTokens = 200,
    temperature: Temperature = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Stream text from the small model that comes with flashmoe. No network.

    \b
    Examples:
      flashmoe demo
      flashmoe demo "Continue: The old man looked at the sea." --seed 1
    """
    with _open("demo") as model:
        messages = [{"role": "user", "content": prompt}]
        tokens = model.chat(messages, max_tokens=max_tokens, temperature=temperature, seed=seed)
        typer.secho(f"> {prompt}", err=True, bold=True)
        _stream(model, tokens, as_json)


@app.command()
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


@app.command()
def generate(
    source: Source,
    prompt: Annotated[
        str | None,
        typer.Argument(
            metavar="PROMPT", help="What to answer; standard input if '-' or not given."
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Render the prompt as a user's turn, or take it as it is. If neither is given: "
            "--chat where the model has a chat template.",
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
        int | None, typer.Option(metavar="K", help="Keep the K most probable tokens; 0: all.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Keep the most probable tokens that sum to P; 1: all."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(metavar="P", help="Keep tokens P times as probable as the first; 0: all."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Divides the logits of tokens seen; 1: off.")
    ] = None,
    presence_penalty: Annotated[
        float | None,
        typer.Option(metavar="X", help="Subtracted from logits of tokens generated; 0: off."),
    ] = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End before this text; may be given several times."),
    ] = None,
    experts_per_token: ExpertsPerToken = 4,
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
    with _open(source, experts_per_token, precision, threads, cache, context) as model:
        conversing = system is not None or think is not None
        chatting = conversing or model.chat_template() is not None if chat is None else chat
        options: dict[str, Any] = {
            **sampling,
            "max_tokens": max_tokens,
            "seed": seed,
            "stop": stop or None,
        }
        with Bar("reading the prompt", "tokens") as options["progress"]:
            if chatting:
                messages = [{"role": "user", "content": prompt}]
                if system is not None:
                    messages.insert(0, {"role": "system", "content": system})
                variables = {} if think is None else {"enable_thinking": think}
                tokens = model.chat(messages, variables=variables, **options)
            else:
                tokens = model.generate(prompt, **options)
            _stream(model, tokens, as_json)


@app.command()
def pack(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A hub id, or a directory: bf16, or MLX's affine.")
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="A new directory, or one that pack began to fill.")
    ],
    bits: Annotated[int, typer.Option(metavar="2|4|8|16", help="16 quantises nothing.")] = 4,
    group_size: Annotated[
        int, typer.Option(metavar="32|64|128", help="Weights that share a scale and a bias.")
    ] = 64,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a model in the layout that reads best, quantised as MLX does.

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


@app.command()
def info(
    source: Source,
    experts_per_token: ExpertsPerToken = 4,
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
        experts_per_token=experts_per_token or None,
        disk_rate=None if disk_rate is None else disk_rate * 1e9,
        memory_rate=None if memory_rate is None else memory_rate * 1e9,
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    else:
        typer.echo("\n".join(info_lines(found)))


@app.command()
def bench(
    source: Source,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Tokens of the prompt.")
    ] = 256,
    tokens: Annotated[int, typer.Option(min=2, metavar="N", help="Tokens to generate.")] = 64,
    runs: Annotated[int, typer.Option(min=1, metavar="N", help="Of which medians are shown.")] = 3,
    experts_per_token: ExpertsPerToken = 4,
    precision: Precision = "int8",
    threads: Threads = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Measure prefill, decode, time to first token, bytes read, hit rate and peak memory.

    \b
    Examples:
      flashmoe bench demo
      flashmoe bench ./packed --tokens 128 --runs 5 --json
    """
    from flashmoe.cli.report import bench_lines  # noqa: PLC0415
    from flashmoe.measure.bench import run_bench  # noqa: PLC0415

    with _open(source, experts_per_token, precision, threads, cache) as model:
        result = run_bench(
            model,
            prompt_tokens=prompt_tokens,
            tokens=tokens,
            runs=runs,
            done=lambda i, run: typer.echo(
                f"run {i} of {runs}: {run['decode_rate']:.2f} tok/s", err=True
            ),
        )
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        typer.echo("\n".join(bench_lines(result)))


@app.command("eval")
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
        int | None,
        typer.Option(
            min=0,
            metavar="N",
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
    experts_per_token: ExpertsPerToken = 4,
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
      flashmoe eval ./packed -k 4 --text notes.txt --reference-experts 0
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
        model = stack.enter_context(_open(source, experts_per_token, precision, threads, cache))
        result["model"] = _setting(model)
        other = None
        if compared:
            experts = experts_per_token if reference_experts is None else reference_experts
            other = stack.enter_context(
                _open(
                    reference or source,
                    experts,
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


@contextlib.contextmanager
def _open(
    source: str,
    experts_per_token: int = 4,
    precision: str = "int8",
    threads: int | None = None,
    cache: str | None = None,
    context: int | None = None,
) -> Iterator[Model]:
    """A model, opened with progress on stderr, that says what is in force."""
    from flashmoe.generate.model import Model  # noqa: PLC0415

    with Bar("loading", "bytes") as progress:
        model = Model(
            source,
            experts_per_token=experts_per_token or None,
            precision=precision,
            threads=threads,
            cache=cache,
            context=context,
            progress=progress,
        )
    with model:
        own = model.config.num_experts_per_tok
        typer.echo(
            f"{source}: {model.experts_per_token} of {model.config.num_experts} experts per token "
            f"(the model's own: {own}), {model.precision}, threads: {model.threads}",
            err=True,
        )
        yield model


def _stream(model: Model, tokens: Generator[Token, None, None], as_json: bool) -> None:
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
