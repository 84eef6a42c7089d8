"""Tokenizer and token streams from the gathered text.

    python prepare.py WORK --vocab 6144

trains WORK/tokenizer/ (byte-level BPE with the Qwen family's pre-tokeniser) on a sample of the
training split, and writes WORK/data/: `literature`, `manual`, `dialogue` and `valid` as
compressed uint16 arrays, with meta.json; and WORK/heldout.txt.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import shutil
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

HERE = Path(__file__).parent
# The pre-tokeniser of the Qwen tokenizers (tokenizer.json of Qwen3.5).
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
# Id 0 is <|endoftext|>. The last four are ordinary text to a decoder that skips special tokens.
SPECIAL = [END, START, STOP]
MARKUP = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
]


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(t, special=True) for t in SPECIAL + MARKUP],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
    )
    tokenizer.train_from_iterator(texts, trainer)
    saved = json.loads(tokenizer.to_str())
    for token in saved["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    return Tokenizer.from_str(json.dumps(saved))


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(HERE / "tokenizer/chat_template.jinja", folder)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": STOP,
        "pad_token": END,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    generation = {
        "eos_token_id": [tokenizer.token_to_id(STOP), tokenizer.token_to_id(END)],
        "pad_token_id": tokenizer.token_to_id(END),
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.95,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--vocab", type=int, default=6144)
    args = parser.parse_args()
    texts: dict[str, list[str]] = {name: [] for name in ("literature", "manual", "dialogue")}
    valid: list[str] = []
    heldout: list[str] = []
    for name in ("corpus.jsonl", "dialogues.jsonl"):
        for line in (args.work / name).open():
            document = json.loads(line)
            kind = document["kind"] if name == "corpus.jsonl" else "dialogue"
            if document["split"] == "train":
                texts[kind].append(document["text"])
            elif kind != "dialogue":  # bits per byte are of prose
                (valid if document["split"] == "valid" else heldout).append(document["text"])
    r = random.Random(0)
    for stream in texts.values():
        r.shuffle(stream)
    r.shuffle(heldout)
    (args.work / "heldout.txt").write_text("\n\n".join(heldout) + "\n")

    sample = [t for name, share in (("literature", 8e6), ("manual", 16e6), ("dialogue", 3e6))
              for t in take(texts[name], share)]  # fmt: skip
    tokenizer = train_tokenizer(sample, args.vocab)
    write_tokenizer(tokenizer, args.work / "tokenizer")

    data = args.work / "data"
    data.mkdir(exist_ok=True)
    meta: dict[str, float] = {"vocab": tokenizer.get_vocab_size()}
    for name, stream in [*texts.items(), ("valid", valid)]:
        ids = [0]
        for start in range(0, len(stream), 1000):
            for encoding in tokenizer.encode_batch(stream[start : start + 1000]):
                ids += encoding.ids
                ids.append(0)
        size = sum(len(text.encode()) for text in stream)
        meta[f"{name}_bytes"], meta[f"{name}_tokens"] = size, len(ids)
        with lzma.open(data / f"{name}.npy.xz", "wb", preset=1) as file:
            np.save(file, np.array(ids, dtype=np.uint16))
    meta["valid_tokens_per_byte"] = meta["valid_tokens"] / meta["valid_bytes"]
    (data / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    print(json.dumps(meta, indent=1))


def take(texts: list[str], size: float) -> list[str]:
    taken = []
    for text in texts:
        if size < 0:
            break
        taken.append(text)
        size -= len(text)
    return taken


if __name__ == "__main__":
    main()
