"""What `xz -9e` needs for the held-out text when the training text stands before it.

    python xz_bound.py WORK

The training text in front is its last 64 MiB: the dictionary of `xz -9e` reaches no further back.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def compressed(data: bytes) -> int:
    done = subprocess.run(["xz", "-9e", "-T1", "-c"], input=data, capture_output=True, check=True)
    return len(done.stdout)


def main(work: Path) -> None:
    lines = map(json.loads, (work / "corpus.jsonl").open())
    train = "\n\n".join(d["text"] for d in lines if d["split"] == "train").encode()[-(64 << 20) :]
    heldout = (work / "heldout.txt").read_bytes()
    alone, behind = compressed(heldout), compressed(train + heldout) - compressed(train)
    for name, size in (("alone", alone), ("behind the training text", behind)):
        print(f"xz -9e, {name}: {8 * size / len(heldout):.3f} bits per byte ({size} bytes)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
