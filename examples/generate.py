"""Stream an answer, then say what it took.

python examples/generate.py [MODEL] [PROMPT]
"""

import sys

import flashmoe

source = sys.argv[1] if len(sys.argv) > 1 else "demo"
prompt = sys.argv[2] if len(sys.argv) > 2 else "What is a mixture of experts?"

with flashmoe.Model(source) as model:
    for delta in model.chat([{"role": "user", "content": prompt}], max_tokens=200):
        print(delta.text, end="", flush=True)
    stats = model.stats
    print(
        f"\n\n{stats.generated_tokens} tokens at {stats.decode_rate or 0:.1f} a second, "
        f"{stats.bytes_read / 1e6:.1f} MB of experts read, {stats.hit_rate or 0:.0%} from memory, "
        f"{stats.experts_per_token} experts per token"
    )
