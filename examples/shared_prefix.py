"""Compute a long beginning once, keep it on disk, and continue it in several ways.

python examples/shared_prefix.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

import flashmoe

source = sys.argv[1] if len(sys.argv) > 1 else "demo"
beginning = "The ship had been at sea for forty days when the wind died. " * 8

with flashmoe.Model(source) as model, tempfile.TemporaryDirectory() as folder:
    state = model.new_state()
    list(model.generate(beginning, max_tokens=0, state=state))
    print(f"{state.position} tokens computed in {model.stats.prefill_seconds:.2f} s")

    path = Path(folder) / "beginning.safetensors"
    state.save(path)
    kept = flashmoe.State.load(model, path)
    for continuation in ("The captain", "Nobody on board"):
        tokens = list(model.generate(continuation, max_tokens=40, seed=1, state=kept.fork()))
        print(f"\n{continuation}{''.join(token.text for token in tokens)}")
        print(f"  after {model.stats.prefill_seconds:.2f} s of prompt")
