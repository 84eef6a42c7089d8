"""Readers: a file of a package in, documents (lists of raw paragraphs) out.

A paragraph that starts with `# ` is a heading. What is prose and what is not is decided later,
in `corpus.py`, for all readers alike.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from lxml import etree
from lxml import html as lxml_html

Document = list[str]

BLOCKS = {"p", "li", "dd", "dt", "blockquote", "td", "h1", "h2", "h3", "h4", "h5", "title"}
HEADINGS = {"h1", "h2", "h3", "h4", "h5"}
SKIPPED = {
    "script", "style", "pre", "nav", "header", "footer", "table", "form", "math", "svg",
    "noscript", "select", "button", "title",
}  # fmt: skip
SKIPPED_CLASSES = re.compile(
    r"highlight|literallayout|programlisting|screen|navheader|navfooter|toc\b|sidebar|related|"
    r"breadcrumb|sphinxsidebar|headerlink|admonition-title|footer|copyright|docblock-short"
)
SPACE = re.compile(r"\s+")


def read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data


def read_text(path: Path) -> str:
    data = read_bytes(path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def html(path: Path) -> Iterator[Document]:
    try:
        root = lxml_html.fromstring(read_bytes(path))
    except (etree.LxmlError, ValueError):
        return
    paragraphs: Document = []
    text: list[str] = []

    def flush(heading: bool = False) -> None:
        joined = SPACE.sub(" ", "".join(text)).strip()
        text.clear()
        if joined:
            paragraphs.append(f"# {joined}" if heading else joined)

    def walk(node: etree._Element) -> None:
        tag = node.tag
        if not isinstance(tag, str) or tag in SKIPPED:
            return
        if SKIPPED_CLASSES.search(node.get("class") or node.get("id") or ""):
            return
        block = tag in BLOCKS or tag in {"div", "ul", "ol", "dl", "body", "section", "br"}
        if block and tag != "br":
            flush()
        if tag == "br":
            text.append(" ")
        text.append(node.text or "")
        for child in node:
            walk(child)
            text.append(child.tail or "")
        if block and tag != "br":
            flush(heading=tag in HEADINGS)

    try:
        walk(root)
    except RecursionError:
        return
    flush()
    yield paragraphs


def mallard(path: Path) -> Iterator[Document]:
    try:
        root = etree.fromstring(read_bytes(path))
    except etree.LxmlError:
        return
    paragraphs = []
    for node in root.iter():
        if not isinstance(node.tag, str):
            continue
        name = etree.QName(node).localname
        if name in {"p", "title"} and "info" not in {
            etree.QName(a).localname for a in node.iterancestors()
        }:
            joined = SPACE.sub(" ", "".join(node.itertext())).strip()
            paragraphs.append(f"# {joined}" if name == "title" else joined)
    yield paragraphs


def paragraphs_of(text: str) -> Document:
    """Blank-line separated paragraphs; code (deeply indented) is left out."""
    blocks = re.split(r"\n\s*\n", text)
    return [SPACE.sub(" ", b).strip() for b in blocks if not re.match(r"\n?(\t| {6,})", b)]


def plain(path: Path) -> Iterator[Document]:
    yield paragraphs_of(read_text(path))


def sotu(path: Path) -> Iterator[Document]:
    """State of the Union address. The file has no line breaks: six sentences make a paragraph."""
    speech = json.loads(read_text(path))
    sentences = re.split(r"(?<=[.!?]) +(?=[A-Z])", speech["text"])
    title = f"# {speech['name']}: State of the Union address, {speech['year']}"
    yield [title, *(" ".join(sentences[i : i + 6]) for i in range(0, len(sentences), 6))]


def bible(_: Path) -> Iterator[Document]:
    """The King James Bible, printed by Debian's `bible` program, one chapter a document."""
    command = ["bible", "-l", "100000", "gen1:1-rev22:21"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    chapter: Document = []
    for line in text.splitlines():
        if verse := re.match(r"\s+\d+ (.*)", line):
            chapter.append(verse[1].strip())
        elif line.strip():
            if len(chapter) > 1:
                yield [chapter[0], " ".join(chapter[1:])]
            chapter = [f"# {line.strip()}"]
    yield [chapter[0], " ".join(chapter[1:])]


def r_data(path: Path) -> Iterator[Document]:
    """Character vectors of an R lazy-load database: novels, one line of the book an element.

    Each record is a zlib stream behind a 4-byte length; a CHARSXP in R's XDR serialisation is
    the flags word 0x000x0009, a 4-byte length and the bytes (R Internals, 1.8).
    """
    data, at = path.read_bytes(), 0
    while (start := data.find(b"\x78\x9c", at)) >= 0:
        stream = zlib.decompressobj()
        try:
            record = stream.decompress(data[start:])
        except zlib.error:
            at = start + 2
            continue
        at = len(data) - len(stream.unused_data)
        lines = []
        for match in re.finditer(rb"\x00[\x04\x00][\x00-\x01\x40]\x09(....)", record, re.DOTALL):
            size = int.from_bytes(match[1], "big")
            if size < 200:
                lines.append(record[match.end() : match.end() + size].decode("utf-8", "replace"))
        if len(lines) < 1000:
            continue
        chapters: list[list[str]] = [[]]
        for line in lines:
            if re.match(r"(CHAPTER|Chapter|VOLUME|Volume) ", line):
                chapters.append([])
            chapters[-1].append(line)
        yield from (paragraphs_of("\n".join(chapter)) for chapter in chapters)


def dictd(path: Path) -> Iterator[Document]:
    """A dictionary in dictd's format: a headword at the margin, its text indented."""
    entry: list[str] = []
    for line in [*read_text(path).splitlines(), "end"]:
        if line and not line[0].isspace():
            body = re.sub(r"[{}]|<[^>]{1,40}>", "", "\n".join(entry[1:]))
            if entry and body.strip():
                yield [f"# {entry[0].strip()}", *map(str.strip, re.split(r"\n\s*\n", body))]
            entry = []
        entry.append(line)


def gcide(path: Path) -> Iterator[Document]:
    """The 1913 Webster of dict-gcide: definitions and quotations, without their markup."""
    for head, *body in dictd(path):
        word = re.match(r"# ([A-Za-z' -]+)", head)
        text = SPACE.sub(" ", " ".join(body))
        text = re.sub(r"\[(1913 Webster|PJC|WordNet[^]]*|[A-Z][^]]{0,20})\]|\\[^\\]*\\", "", text)
        text = re.sub(r"^.*?(?=\b1\. )|^.*?\]|--\w+\.", "", text, count=1)
        if word and len(text) > 120:
            yield [head, *re.split(r"(?= \d+\. )", text)]


def entries(path: Path) -> Iterator[Document]:
    """Dungeon Crawl's descriptions: entries between lines of `%%%%`."""
    for entry in re.split(r"^%%%%.*$", read_text(path), flags=re.MULTILINE):
        lines = [line for line in entry.strip().splitlines() if not line.startswith(("#", ":"))]
        if not re.search(r"[{}<>$@]|w:\d", entry):
            yield paragraphs_of("\n".join(lines[1:]))


def quoted(path: Path) -> Iterator[Document]:
    """Endless Sky's missions: strings in backquotes."""
    for block in re.split(r"\n(?=\w)", read_text(path)):
        yield [s for s in re.findall(r"`([^`]+)`", block) if "<" not in s]


def stringtable(path: Path) -> Iterator[Document]:
    for text in re.findall(r"'''(.*?)'''", read_text(path), re.DOTALL):
        if "%" not in text:
            yield paragraphs_of(re.sub(r"\[\[[^]]*\]\]|<[^>]*>", "", text))


def wesnoth(path: Path) -> Iterator[Document]:
    """The translatable strings of a Battle for Wesnoth scenario, in their order."""
    strings = re.findall(r'_\s*"((?:[^"]|"")*)"', read_text(path))
    strings = [re.sub(r"<[^>]*>|\^.*", "", s.replace('""', '"')) for s in strings]
    yield [SPACE.sub(" ", s).strip() for s in strings if "$" not in s]


def pod(path: Path) -> Iterator[Document]:
    paragraphs = []
    for block in re.split(r"\n\s*\n", read_text(path)):
        if heading := re.match(r"=(?:head\d|item) +([^*\d].*)", block):
            block = f"# {heading[1]}"
        elif block.startswith(("=", " ", "\t", "#")):
            continue
        for _ in range(3):
            block = re.sub(r"[A-Z]<<+ (.*?) >>+", r"\1", block, flags=re.DOTALL)
            block = re.sub(r"L<(?:([^|<>]*)\|)?([^<>]*)>", lambda m: m[1] or m[2], block)
            block = re.sub(r"E<lt>", "<", re.sub(r"[BCFIS]<([^<>]*)>", r"\1", block))
        paragraphs.append(SPACE.sub(" ", block).strip())
    yield paragraphs


def info(path: Path) -> Iterator[Document]:
    for node in read_text(path).split("\x1f"):
        text = re.sub(r"\n(.+)\n[=*.-]{4,}\n", r"\n\n# \1\n\n", node.split("\n", 2)[-1])
        yield paragraphs_of(re.sub(r"[‘’]", "'", text))


def lyx(path: Path) -> Iterator[Document]:
    layouts = re.findall(
        r"\\begin_layout (Standard|Itemize|Enumerate|Section|Subsection)\n(.*?)\\end_layout",
        read_text(path), re.DOTALL,
    )  # fmt: skip
    paragraphs = []
    for kind, body in layouts:
        if "\\begin_inset" in body:
            continue
        text = "".join(line for line in body.splitlines() if not re.match(r"\\(?!Sp)", line))
        text = text.replace("\\SpecialChar ", "")
        paragraphs.append(f"# {text}" if "ection" in kind else text)
    yield paragraphs


READERS: dict[str, Callable[[Path], Iterator[Document]]] = {
    function.__name__: function
    for function in (
        html, mallard, plain, sotu, bible, r_data, dictd, gcide, entries, quoted, stringtable,
        wesnoth, pod, info, lyx,
    )
}  # fmt: skip
