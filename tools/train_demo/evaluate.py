"""What the model card states, measured through Flash-MoE: float32 activations, 10 experts a token.

    python evaluate.py CHECKPOINT HELDOUT PROMPTS [--bytes 100000] [--count 100]

Held-out bits per byte against a unigram of the same tokens, JSON validity and tool calls on the
held-out prompts (greedy), and samples at stated seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import TEMPLATE
from tokenizers import Tokenizer

import flashmoe

WINDOW = 1024
SAMPLES = ["It was a cold morning, and", "The operating system", "The President said that"]


def bits_per_byte(model: Any, tokenizer: Tokenizer, text: str) -> dict[str, float]:
    """The text in windows of 1024 tokens, each read from an empty state after <|endoftext|>."""
    ids = tokenizer.encode(text).ids
    size = len(text.encode())
    nats = 0.0
    for start in range(0, len(ids), WINDOW):
        window = [0, *ids[start : start + WINDOW]]
        logits = np.asarray(model.logits(window[:-1]), dtype=np.float64)
        top = logits.max(-1, keepdims=True)
        total = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
        nats += (total - logits[np.arange(len(window) - 1), window[1:]]).sum()
    counts = Counter(ids)
    unigram = -sum(n * math.log(n / len(ids)) for n in counts.values())
    return {
        "bytes": size,
        "tokens": len(ids),
        "bits_per_byte": nats / math.log(2) / size,
        "unigram_bits_per_byte": unigram / math.log(2) / size,  # fitted to this very text
    }


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value follows the part of JSON Schema that synthetic.py uses."""
    kind = schema["type"]
    if kind == "object":
        return (
            isinstance(value, dict)
            and set(value) == set(schema["required"])
            and all(fits(value[key], part) for key, part in schema["properties"].items())
        )
    if kind == "array":
        return isinstance(value, list) and all(fits(item, schema["items"]) for item in value)
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "string":
        return isinstance(value, str) and value in schema.get("enum", [value])
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (kind == "number" or isinstance(value, int))


def parse_call(text: str) -> dict[str, str] | None:
    """{"name": …, parameter: raw text …}, or None if it is not one well-formed call."""
    whole = re.fullmatch(
        r"<tool_call>\n<function=(\w+)>\n(.*)</function>\n</tool_call>", text.strip(), re.DOTALL
    )
    if not whole:
        return None
    parameters = re.findall(r"<parameter=(\w+)>\n(.*?)\n</parameter>\n", whole[2], re.DOTALL)
    return {"function": whole[1], **dict(parameters)}


def generate(model: Any, tokenizer: Tokenizer, text: str, **options: Any) -> str:
    return "".join(t.text for t in model.generate(tokenizer.encode(text).ids, **options))


def prompts(model: Any, tokenizer: Any, file: Path, count: int) -> dict[str, float]:
    seen: Counter[str] = Counter()
    for line in file.open():
        prompt = json.loads(line)
        kind = prompt["kind"]
        if seen[kind] >= count:
            continue
        seen[kind] += 1
        text = TEMPLATE.render(
            messages=prompt["messages"], tools=prompt["tools"], add_generation_prompt=True
        )
        answer = generate(model, tokenizer, text, max_tokens=330, temperature=0)
        if kind == "json":
            try:
                value = json.loads(answer)
            except json.JSONDecodeError:
                continue
            seen["json valid"] += 1
            seen["json follows its schema"] += fits(value, prompt["schema"])
            if prompt["value"] is not None:
                seen["json with stated values"] += 1
                seen["json values right"] += value == prompt["value"]
        else:
            call = parse_call(answer)
            seen["tool call well formed"] += call is not None
            right = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)
                     for k, v in prompt["call"]["arguments"].items()}  # fmt: skip
            seen["tool call right"] += call == {"function": prompt["call"]["name"], **right}
            seen["tool chosen"] += bool(call) and call["function"] == prompt["call"]["name"]
    return dict(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--bytes", type=int, default=100_000, help="of the held-out text")
    parser.add_argument("--count", type=int, default=100, help="prompts of each kind")
    args = parser.parse_args()
    model = flashmoe.Model(str(args.checkpoint), experts_per_token=None, precision="float32")
    tokenizer = Tokenizer.from_file(str(args.checkpoint / "tokenizer.json"))
    text = args.heldout.read_text()[: args.bytes]
    print(json.dumps(bits_per_byte(model, tokenizer, text), indent=1), flush=True)
    for seed, start in enumerate(SAMPLES):
        options = {"max_tokens": 70, "temperature": 0.7, "top_k": 20, "top_p": 0.95, "seed": seed}
        print(f"[seed {seed}] {start}{generate(model, tokenizer, start, **options)}\n", flush=True)
    print(json.dumps(prompts(model, tokenizer, args.prompts, args.count), indent=1))


if __name__ == "__main__":
    main()
