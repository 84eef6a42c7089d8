"""The program: its commands, and how what they raise becomes one line and an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flashmoe.cli import bench, chat, doctor, evaluate, generate, info, pack, serve, verify
from flashmoe.errors import ArgumentError, FlashMoeError

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
        except OSError as error:  # of printing: what reads and writes files has its own errors
            raise typer.Exit(_cannot_print(error)) from None


def _cannot_print(error: OSError) -> int:
    """The exit code where output goes nowhere, which is said if that is of any use."""
    _drop_output()
    # Who read the output has gone, as `head` does. Python would complain when it flushes.
    if isinstance(error, BrokenPipeError):
        return EXIT_PIPE
    where = error.filename or "standard output"
    with contextlib.suppress(OSError):  # stderr may be on the same full disk
        typer.secho("error: ", err=True, fg="red", bold=True, nl=False)
        typer.echo(f"{where}: cannot be written: {error.strerror or error}", err=True)
    return EXIT_ERROR


def _drop_output() -> None:
    """What is still to be flushed goes nowhere."""
    with contextlib.suppress(OSError, ValueError):  # it is no file, but a test's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run() -> int:
    """The `flashmoe` program; its exit code."""
    # A stream that is closed is None to Python.
    sys.stdin = sys.stdin or io.StringIO()
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a character of the answer shows another in its place.
            stream.reconfigure(errors="replace")
    try:
        try:
            app(prog_name="flashmoe")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else EXIT_ERROR
        sys.stdout.flush()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:  # --help and --version are printed before a command is run
        return _cannot_print(error)
    return code


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


app.command("demo")(generate.demo)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("doctor")(doctor.doctor)
app.command("generate")(generate.generate)
app.command("pack")(pack.pack)
app.command("verify")(verify.verify)
app.command("info")(info.info)
app.command("bench")(bench.bench)
app.command("eval")(evaluate.evaluate)
