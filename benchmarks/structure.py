"""How often answers have the structure that was asked for, free and under a constraint.

    pip install '.[chat]' jsonschema
    python benchmarks/structure.py WORK

asks the demo model, at its own 4 bits and packed to 2, for 1,000 answers to the 20 schemas of
tests/data/schemas and for 500 tool calls of tests/data/prompts.jsonl, each with the model's own
sampling, `max_tokens=512` and a seed of its own; a fifth of them also without a constraint. It
writes docs/structure.json and the table of docs/quality.md. WORK keeps what is done: stopped, the
same command goes on. `--cost` only measures what a constraint costs at a vocabulary of 248,320.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from tables import fill, table

import flashmoe
from flashmoe.checkpoint.find import demo_directory
from flashmoe.generate import constraint
from flashmoe.generate.answer import Answer
from flashmoe.generate.dialect import Dialect
from flashmoe.generate.parse import AnswerParser
from flashmoe.generate.tools import tools_of
from flashmoe.measure.evaluate import proportion, read_prompts
from flashmoe.pack.pack import pack

ROOT = Path(__file__).parents[1]
SCHEMAS = sorted((ROOT / "tests/data/schemas").glob("*.json"))
CALLS = [p for p in read_prompts(ROOT / "tests/data/prompts.jsonl") if p.call is not None]
EACH = {"JSON": 50, "call": 5}  # answers to each schema, and to each prompt that wants a call
FREE = {"JSON": 10, "call": 1}  # of these asked for without a constraint too
MOST = 512  # tokens
VOCAB = 248_320


def requests(kind: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """A name, a seed and what to ask `Model.chat` for."""
    for seed in range(EACH[kind]):
        if kind == "JSON":
            for path in SCHEMAS:
                schema = json.loads(path.read_text())
                asked = f"Return only JSON that matches this schema:\n{json.dumps(schema)}"
                messages = [{"role": "user", "content": asked}]
                yield path.stem, seed, {"messages": messages, "schema": schema}
        else:
            for number, prompt in enumerate(CALLS):
                asked = {"messages": prompt.messages, "tools": prompt.tools}
                yield f"call {number}", seed, asked | {"tool_choice": "required"}


def answer(model: flashmoe.Model, asked: dict[str, Any], seed: int, constrained: bool) -> Answer:
    if constrained:
        return model.chat(**asked, max_tokens=MOST, seed=seed).answer
    tools = tools_of(asked.get("tools"))
    parser = AnswerParser(Dialect.of(model.chat_template), tools)
    ids = model.prompt_ids(asked["messages"], tools=asked.get("tools"))
    deltas = []
    for token in model.generate(ids, max_tokens=MOST, seed=seed):
        deltas += parser.push(token.text)
    reason = "stop" if model.stats.finish_reason == "eos" else "length"
    return Answer.of([*deltas, *parser.finish()], reason)


def judge(asked: dict[str, Any], given: Answer) -> dict[str, bool]:
    """Whether an answer finished, was hurried, and is what its schema says."""
    try:
        if "schema" in asked:
            jsonschema.validate(json.loads(given.text), asked["schema"])
        else:
            schemas = {tool.name: tool.parameters for tool in tools_of(asked["tools"])}
            if given.text.strip() or given.invalid_tool_calls or not given.tool_calls:
                raise ValueError("not a call")
            for call in given.tool_calls:
                jsonschema.validate(call.arguments, schemas[call.name])
        valid = True
    except (ValueError, KeyError, jsonschema.ValidationError):
        valid = False
    return {
        "finished": given.finish_reason in {"stop", "tool_calls"},
        "hurried": given.hurried,
        "valid": valid,
    }


def measure(directory: Path, bits: str, out: Path) -> None:
    """Adds a line to `out` for each answer that is not there yet."""
    done = set()
    if out.exists():
        done = {tuple(json.loads(line)["key"]) for line in out.read_text().splitlines()}
    with flashmoe.Model(directory, threads=1) as model, out.open("a") as lines:
        for kind in EACH:
            for name, seed, asked in requests(kind):
                for how in ("constrained", "free")[: 1 + (seed < FREE[kind])]:
                    key = (bits, kind, how, name, seed)
                    if key in done:
                        continue
                    given = answer(model, asked, seed, how == "constrained")
                    line = {"key": key, "text": given.text[-200:], **judge(asked, given)}
                    lines.write(json.dumps(line) + "\n")
                    lines.flush()


def summary(files: list[Path]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for file in files:
        for line in map(json.loads, file.read_text().splitlines()):
            bits, kind, how, name, _ = line["key"]
            groups.setdefault((bits, kind, how), []).append(line)
            if kind == "JSON":
                groups.setdefault((bits, name.split("_")[0], how), []).append(line)
    rows = []
    for (bits, kind, how), lines in groups.items():
        finished = [line for line in lines if line["finished"]]
        rows.append(
            {
                "bits": bits,
                "kind": kind,
                "how": how,
                "answers": len(lines),
                "finished": len(finished),
                "hurried": sum(line["hurried"] for line in finished),
                "valid": sum(line["valid"] for line in finished),
            }
        )
    return rows


def large_vocabulary(work: Path) -> Path:
    """The demo model with a vocabulary of 248,320: what is added is never likely to come."""
    directory = work / "large"
    if (directory / "config.json").exists():
        return directory
    demo = demo_directory()
    directory.mkdir(exist_ok=True)
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, directory / name)
    tokenizer = json.loads((demo / "tokenizer.json").read_text())
    vocab, rng = tokenizer["model"]["vocab"], random.Random(1)
    old = len(vocab)
    known = list(vocab)
    words = [word for word in known if re.fullmatch("Ġ?[A-Za-z]{2,}", word)]
    ends = [word for word in words if word[0] != "Ġ"]
    while len(vocab) < VOCAB:  # pairs of words; of anything, every seventh
        first, second = rng.choice(words), rng.choice(ends)
        if rng.random() < 0.15:
            second = rng.choice(known[9:])
        if first + second not in vocab:
            vocab[first + second] = len(vocab)
            tokenizer["model"]["merges"].append([first, second])
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = (demo / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header, parts, at = json.loads(data[8 : 8 + size]), [], 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        begin, end = tensor["data_offsets"]
        part = data[8 + size + begin : 8 + size + end]
        if tensor["shape"][0] == old and ("embed_tokens" in name or "lm_head" in name):
            part += bytes((VOCAB - old) * (end - begin) // old)
            tensor["shape"][0] = VOCAB
        tensor["data_offsets"] = [at, at := at + len(part)]
        parts.append(part)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head + b"".join(parts))
    config = json.loads((demo / "config.json").read_text())
    for section in (config, config.get("text_config", {})):
        if "vocab_size" in section:
            section["vocab_size"] = VOCAB
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def cost(work: Path) -> dict[str, Any]:
    """Milliseconds of a token, and of the constraint within it, at 248,320 tokens.

    Processor time of one thread, which other work on the machine does not change much.
    """
    spent = 0.0

    def timed(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal spent
            start = time.process_time()
            try:
                return function(*arguments)
            finally:
                spent += time.process_time() - start

        return call

    mask, advance = constraint.Constraint.mask, constraint.Constraint.advance
    constraint.Constraint.mask = timed(mask)
    constraint.Constraint.advance = timed(advance)
    result: dict[str, Any] = {}
    with flashmoe.Model(large_vocabulary(work), threads=1) as model:
        start = time.perf_counter()
        constraint.prepare(model.checkpoint).result()
        result["tokenizer_seconds"] = time.perf_counter() - start
        for kind in EACH:
            rows = []
            for _, seed, asked in list(requests(kind))[:40]:
                chat = model.chat(**asked, max_tokens=MOST, seed=seed)
                next(chat)  # the prompt is not counted
                spent, start = 0.0, time.process_time()
                generated = chat.answer.generated_tokens
                rows.append((generated - 1, time.process_time() - start, spent))
            tokens, seconds, constrained = np.sum(rows, axis=0)
            result[kind] = {
                "tokens": int(tokens),
                "milliseconds": 1000 * seconds / tokens,
                "constraint": 1000 * constrained / tokens,
                "share": constrained / seconds,
            }
    constraint.Constraint.mask, constraint.Constraint.advance = mask, advance
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--bits", choices=("4", "2"), help="only these, and no tables")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.cost:
        print(json.dumps(cost(options.work), indent=1))
        return
    two = options.work / "2bit"
    if not (two / "config.json").exists():
        pack(demo_directory(), two, bits=2)
    checkpoints = {"4": demo_directory(), "2": two}
    if options.bits:
        checkpoints = {options.bits: checkpoints[options.bits]}
    files = [options.work / f"{bits}.jsonl" for bits in checkpoints]
    for (bits, directory), file in zip(checkpoints.items(), files, strict=True):
        measure(directory, bits, file)
    if options.bits:
        return
    result = {"answers": summary(files), "cost": cost(options.work)}
    (ROOT / "docs/structure.json").write_text(json.dumps(result, indent=1) + "\n")
    fill(ROOT / "docs/quality.md", {"structure": counted(result["answers"])})


def counted(answers: list[dict[str, Any]]) -> str:
    names = {
        "JSON": "JSON, all 20 schemas",
        "unbounded": "of these 10 with strings or lists without a limit",
        "nested": "of these 10 nested four deep or deeper",
        "call": "tool calls",
    }
    rows = []
    for name, said in names.items():
        for row in answers:
            if row["kind"] == name:
                share = proportion(row["finished"], row["answers"]).value
                valid = row["valid"] / max(row["finished"], 1)
                rows.append(
                    [
                        said,
                        f"{row['bits']} bits",
                        row["how"],
                        str(row["answers"]),
                        f"{row['finished']} ({share:.1%})",
                        str(row["hurried"]) if row["how"] == "constrained" else "",
                        f"{row['valid']} ({valid:.1%})",
                    ]
                )
    head = ["asked for", "weights", "answer", "answers", "finished", "of these hurried"]
    return table([*head, "of the finished valid"], rows)


if __name__ == "__main__":
    main()
