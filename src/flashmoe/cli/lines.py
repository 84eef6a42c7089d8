"""Lines that a person types: with history and editing where they type them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

from flashmoe.errors import ArgumentError


def reader() -> Callable[[str], str]:
    """A function that shows a prompt and gives the next line; EOFError behind the last one.

    With prompt_toolkit, if it is installed, else with what Python has. Where nobody types, lines
    are read as they are, and no prompt is shown.
    """
    if not sys.stdin.isatty():
        return _piped
    try:
        from prompt_toolkit import PromptSession  # noqa: PLC0415
        from prompt_toolkit.output import create_output  # noqa: PLC0415
    except ImportError:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401, PLC0415  (input() then edits lines and has a history)
        return input
    # stdout is for answers, which may be piped somewhere else.
    session: PromptSession[str] = PromptSession(output=create_output(sys.stderr))
    return session.prompt


def _piped(prompt: str) -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise ArgumentError(f"standard input is not text: {error}") from error
    if not line:
        raise EOFError
    return line.rstrip("\n")
