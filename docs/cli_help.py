"""Writes each command's --help into docs/cli.md, between its markers; --check only compares.

python docs/cli_help.py
"""

import re
import sys
from pathlib import Path

import typer
from typer.testing import CliRunner

from flashmoe.cli.main import app

PAGE = Path(__file__).with_name("cli.md")
BLOCK = re.compile(r"(<!-- help (.*?)-->\n).*?(<!-- end -->)", re.DOTALL)


def _help(match: re.Match[str]) -> str:
    command = match[2].split()
    out = (
        CliRunner()
        .invoke(app, [*command, "--help"], prog_name="flashmoe", terminal_width=80)
        .stdout
    )
    return f"{match[1]}```text\n{out.strip()}\n```\n{match[3]}"


def main() -> None:
    page = PAGE.read_text()
    made = BLOCK.sub(_help, page)
    made = re.sub(r"typer [\d.]+\b", f"typer {typer.__version__}", made)
    if "--check" not in sys.argv:
        PAGE.write_text(made)
    elif made != page:
        sys.exit(f"{PAGE.name} is out of date; run: python docs/cli_help.py")


if __name__ == "__main__":
    main()
