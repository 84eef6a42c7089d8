"""What the model card states, measured with transformers on the CPU in float32.

    python evaluate.py CHECKPOINT WORK [--prompts 100]

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

import torch
from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM

WINDOW = 1024
SAMPLES = ["It was a cold morning, and", "The operating system", "# The History of"]


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, text: str) -> dict[str, float]:
    """The text in windows of 1024 tokens, each read from an empty state; the first token of a
    window is given, its bytes are counted: the figure errs upwards."""
    ids = tokenizer(text)["input_ids"]
    size = len(text.encode())
    nats, read = 0.0, 0
    for start in range(0, len(ids) - 1, WINDOW):
        window = torch.tensor([[0, *ids[start : start + WINDOW]]])
        logits = model(window[:, :-1], use_cache=False).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
        read += window.shape[1] - 1
    assert read >= len(ids) - 1
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


@torch.no_grad()
def generate(model: Any, tokenizer: Any, text: str, limit: int, **options: Any) -> str:
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, use_cache=True, **options
    )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


def prompts(model: Any, tokenizer: Any, file: Path, count: int) -> dict[str, float]:
    seen: Counter[str] = Counter()
    for line in file.open():
        prompt = json.loads(line)
        kind = prompt["kind"]
        if seen[kind] >= count:
            continue
        seen[kind] += 1
        text = tokenizer.apply_chat_template(
            prompt["messages"], tools=prompt["tools"], add_generation_prompt=True, tokenize=False
        )
        answer = generate(model, tokenizer, text, 300, do_sample=False)
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
    parser.add_argument("work", type=Path)
    parser.add_argument("--prompts", type=int, default=100)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = Qwen3_5MoeForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    text = (args.work / "heldout.txt").read_text()
    print(json.dumps(bits_per_byte(model, tokenizer, text), indent=1), flush=True)
    for seed, start in enumerate(SAMPLES):
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.95}
        print(
            f"[seed {seed}] {start}{generate(model, tokenizer, start, 80, **options)}\n", flush=True
        )
    found = prompts(model, tokenizer, args.work / "prompts.jsonl", args.prompts)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
