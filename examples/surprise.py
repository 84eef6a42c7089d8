"""Which words of a text surprise the model: log-probabilities from `Model.logits`.

python examples/surprise.py [MODEL] [TEXT]
"""

import sys

import numpy as np

import flashmoe

source = sys.argv[1] if len(sys.argv) > 1 else "demo"
text = sys.argv[2] if len(sys.argv) > 2 else "The old man sat by the sea and looked at the ships."

with flashmoe.Model(source, experts_per_token=None, precision="float32") as model:
    ids = model.tokenizer.encode(text).ids
    logits = model.logits(ids)  # row i predicts token i + 1
    top = logits.max(axis=1, keepdims=True)
    logprobs = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    for i, token in enumerate(ids[1:]):
        nats = -float(logprobs[i, token])
        print(f"{nats:6.2f}  {'#' * round(nats):16}  {model.tokenizer.decode([token])!r}")
    predicted = logprobs[np.arange(len(ids) - 1), ids[1:]]
    print(f"\nperplexity {np.exp(-predicted.mean()):.1f} over {len(ids) - 1} tokens")
