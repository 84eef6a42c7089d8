"""Tables in a page of the docs, each between `<!-- NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---")


def fill(page: Path, tables: dict[str, str]) -> None:
    """Writes every table into its place. Raises ValueError where the page has none for it."""
    text = page.read_text()
    for name, body in tables.items():
        place = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = place.subn(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"{page}: {count} places for the table {name}")
    page.write_text(text)
