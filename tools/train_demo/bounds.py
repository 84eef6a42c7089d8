"""What a language model has to beat on the held-out text: `xz -9e`, and a unigram of its tokens.

    python bounds.py WORK

xz is given the training text in front, its last 64 MiB: the dictionary of `xz -9e` reaches no
further back. The unigram is fitted to the held-out tokens themselves.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer


def compressed(data: bytes) -> int:
    done = subprocess.run(["xz", "-9e", "-T1", "-c"], input=data, capture_output=True, check=True)
    return len(done.stdout)


def main(work: Path) -> None:
    heldout = (work / "heldout.txt").read_bytes()
    ids = Tokenizer.from_file(str(work / "tokenizer/tokenizer.json")).encode(heldout.decode()).ids
    bits = -sum(n * math.log2(n / len(ids)) for n in Counter(ids).values())
    print(f"unigram of the tokens: {bits / len(heldout):.3f} bits per byte")
    lines = map(json.loads, (work / "corpus.jsonl").open())
    train = "\n\n".join(d["text"] for d in lines if d["split"] == "train").encode()[-(64 << 20) :]
    alone, behind = compressed(heldout), compressed(train + heldout) - compressed(train)
    for name, size in (("alone", alone), ("behind the training text", behind)):
        print(f"xz -9e, {name}: {8 * size / len(heldout):.3f} bits per byte ({size} bytes)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
