"""Inputs damaged at random, from a seed: checkpoints, tokenizers, templates, states, packs."""

import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from workers import Case, WrongError

import flashmoe
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.template import ChatTemplate
from flashmoe.checkpoint.tokenizer import Tokenizer
from flashmoe.pack.pack import pack

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a mixture of experts?"},
]
NUMBERS = [0, 1, -1, 2, 7, 64, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30]
VALUES: list[Any] = [
    *NUMBERS,
    0.5,
    -0.0,
    1e308,
    True,
    False,
    None,
    "",
    "x",
    "\x1b[2J",
    [],
    {},
    [[]],
]
PIECES = ["{% for i in range(99999) %}", "{% endfor %}", "{{ x ** 9 }}", "{% if", "%}", "|", "}}"]
PIECES += ["{{ 'x' * 99999999 }}", "{{ messages", "|tojson(indent=9999)", "(", ")", "[", "\x00"]
WORDS = "the quick brown fox jumps over the lazy dog é \U0001f600"


class Bases:
    """Sound inputs to damage, and what they give undamaged.

    `make` is called in a process of its own, for it opens models.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model = directory / "model"
        self.packed = directory / "packed"
        self.state = directory / "a.state"
        self.expected: dict[str, list[int]] = {}
        if (directory / "expected.json").exists():
            self.expected = json.loads((directory / "expected.json").read_text())
        self.files: dict[Path, bytes] = {
            path: path.read_bytes()
            for folder in (self.model, self.packed)
            if folder.exists()
            for path in folder.iterdir()
        }

    def make(self, maker: Any) -> None:
        maker.make_checkpoint(self.model, maker.Shape(64, 2, 4, 2, 64, 64, 512, 2, 1, 32, 1, 2, 32,
                                                      full_attention_interval=2))  # fmt: skip
        (self.model / "chat_template.jinja").write_text(_template())
        pack(self.model, self.packed, bits=4, group_size=32, threads=1)
        with flashmoe.Model(self.model, threads=1, cache=0) as model:
            state = model.new_state()
            generated = greedy(model, [1, 2, 3], 4, state)
            state.save(self.state)
            after = greedy(model, [], 4, state)
            said = greedy(model, WORDS, 4, None)
        (self.directory / "expected.json").write_text(
            json.dumps({"tokens": generated, "after": after, "said": said})
        )

    def put(self, folder: Path, name: str, data: bytes, *, packed: bool = False) -> Path:
        """A copy of the model whose file `name` holds `data`; the others are links."""
        source = self.packed if packed else self.model
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in source.iterdir():
            if path.name != name:
                (folder / path.name).symlink_to(path)
        (folder / name).write_bytes(data)
        return folder


def _template() -> str:
    return (
        "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
        "{{ message.content|trim }}<|im_end|>\n{% endfor %}"
        "{%- if tools %}{{ tools|tojson(indent=2) }}{% endif %}"
        "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def greedy(model: flashmoe.Model, prompt: Any, count: int, state: Any) -> list[int]:
    options = {"max_tokens": count, "temperature": 0, "ignore_eos": True}
    return [token.id for token in model.generate(prompt, state=state, **options)]


def damaged_bytes(draw: random.Random, data: bytes, begin: int, end: int) -> bytes:
    """Bytes between two places changed, removed, doubled or overwritten."""
    out = bytearray(data)
    end = min(end, len(out))
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(begin, max(begin + 1, end))
        kind = draw.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = draw.randrange(256)
        elif kind == 2:
            del out[at : at + draw.choice((1, 4, 64))]
        elif kind == 3:
            out[at:at] = out[at : at + draw.choice((1, 8, 64))]
        elif kind == 4:
            patch = draw.choice((b"\xff", b"\x00", b"\xc0\x7f", b"\x7f")) * draw.choice(
                (2, 16, 256)
            )
            out[at : at + len(patch)] = patch
        else:
            del out[at:]
    return bytes(out)


def damaged_json(draw: random.Random, value: Any) -> Any:
    """A JSON value, one place of it changed: another value, a key gone, doubled or renamed."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in list(items):
            places.append((node, key))
            if isinstance(child, (dict, list)):
                walk(child)

    walk(value)
    if not places:
        return draw.choice(VALUES)
    for _ in range(draw.choice((1, 1, 1, 3))):
        node, key = draw.choice(places)
        if isinstance(node, list) and key >= len(node):
            continue
        kind = draw.randrange(5)
        if kind == 0 and key in (node if isinstance(node, dict) else range(len(node))):
            del node[key]
        elif kind == 1 and isinstance(node, dict):
            node[f"{key}x"] = node.get(key)
        elif kind == 2 and isinstance(node, list):
            node.insert(key, draw.choice(VALUES))
        elif kind == 3 and isinstance(node.get(key) if isinstance(node, dict) else None, int):
            node[key] = node[key] + draw.choice((-1, 1, node[key], 4096))
        else:
            node[key] = draw.choice(VALUES)
    return value


def split(data: bytes) -> tuple[Any, bytes]:
    """Header and payload of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


class Damage:
    """Makes cases; `folder` is where a child writes what it damages."""

    def __init__(self, bases: Bases, folder: Path) -> None:
        self.bases = bases
        self.folder = folder

    def case(self, seed: int) -> tuple[str, bool, Case]:
        """A kind, whether the damage lies past the header of its file, and what to do."""
        draw = random.Random(seed)
        kinds: list[tuple[str, bool, Callable[[random.Random], str]]] = [
            ("checkpoint: bytes of a header", False, self.header_bytes),
            ("checkpoint: a header's JSON", False, self.header_json),
            ("checkpoint: bytes of weights", True, self.payload),
            ("checkpoint: a file that is cut", True, self.cut),
            ("checkpoint: index", False, partial(self.json_file, "model.safetensors.index.json")),
            ("checkpoint: config.json", True, partial(self.json_file, "config.json")),
            ("checkpoint: sampling", True, partial(self.json_file, "generation_config.json")),
            ("pack: bytes of its files", True, self.packed),
            ("pack: half done and damaged", True, self.resumed),
            ("tokenizer: bytes", True, self.tokenizer_bytes),
            ("tokenizer: JSON", True, self.tokenizer_json),
            ("tokenizer: its config", True, partial(self.json_file, "tokenizer_config.json")),
            ("template", True, self.template),
            ("state: bytes of the header", False, self.state_header),
            ("state: the header's JSON", False, self.state_json),
            ("state: the header's JSON, signed", False, partial(self.state_json, signed=True)),
            ("state: bytes of tensors", True, self.state_payload),
            ("state: bytes of tensors, signed", True, partial(self.state_payload, signed=True)),
        ]
        name, past, function = kinds[seed % len(kinds)]
        return name, past, partial(function, draw)

    # What is done with each

    def run(self, directory: Path, *, same: bool = False) -> str:
        """Opens a checkpoint and generates; `same`: what it gives must be the undamaged tokens."""
        with flashmoe.Model(directory, threads=1, cache=0, context=64) as model:
            tokens = greedy(model, [1, 2, 3], 4, None)
        if same and tokens != self.bases.expected["tokens"]:
            raise WrongError(f"tokens {tokens}")
        return "runs"

    def weights(self, draw: random.Random, packed: bool = False) -> Path:
        names = [p for p in self.bases.files if p.suffix == ".safetensors"]
        folder = self.bases.packed if packed else self.bases.model
        return draw.choice([p for p in names if p.parent == folder])

    def header_bytes(self, draw: random.Random) -> str:
        path = self.weights(draw)
        data = self.bases.files[path]
        end = 8 + int.from_bytes(data[:8], "little")
        return self.run(self.bases.put(self.folder, path.name, damaged_bytes(draw, data, 0, end)))

    def header_json(self, draw: random.Random) -> str:
        path = self.weights(draw)
        header, payload = split(self.bases.files[path])
        data = join(damaged_json(draw, header), payload)
        return self.run(self.bases.put(self.folder, path.name, data))

    def payload(self, draw: random.Random) -> str:
        path = self.weights(draw)
        data = self.bases.files[path]
        begin = 8 + int.from_bytes(data[:8], "little")
        out = bytearray(data)
        for _ in range(draw.choice((1, 4, 32))):
            patch = draw.choice((b"\xff", b"\x00", b"\xc0\x7f", b"\x80\xff", draw.randbytes(4)))
            at = draw.randrange(begin, len(out))
            patch = (patch * 64)[: min(draw.choice((1, 2, 64, 256)), len(out) - at)]
            out[at : at + len(patch)] = patch
        return self.run(self.bases.put(self.folder, path.name, bytes(out)))

    def cut(self, draw: random.Random) -> str:
        """While the model is open: as a file that changes under it."""
        path = self.weights(draw)
        data = self.bases.files[path]
        folder = self.bases.put(self.folder, path.name, data)
        with flashmoe.Model(folder, threads=1, cache=draw.choice((0, 1)), context=64) as model:
            state = model.new_state()
            greedy(model, [1, 2, 3], 1, state)
            os.truncate(folder / path.name, draw.randrange(len(data)))
            before = state.tokens
            try:
                greedy(model, [], 3, state)
            except flashmoe.ReadError:
                if state.tokens[: len(before)] != before:
                    raise WrongError("the state lost tokens") from None
            (folder / path.name).write_bytes(data)
            if (tokens := greedy(model, [1, 2, 3], 4, None)) != self.bases.expected["tokens"]:
                raise WrongError(f"tokens {tokens} after the file is whole again")
        return "runs"

    def json_file(self, name: str, draw: random.Random) -> str:
        path = self.bases.model / name
        data = self.bases.files.get(path, b"{}")
        if draw.randrange(3):
            data = json.dumps(damaged_json(draw, json.loads(data))).encode()
        else:
            data = damaged_bytes(draw, data, 0, len(data))
        folder = self.bases.put(self.folder, name, data)
        checkpoint = Checkpoint.open(folder)
        if checkpoint.template is not None:
            checkpoint.template.render(MESSAGES)
        return self.run(folder)

    def packed(self, draw: random.Random) -> str:
        path = self.weights(draw, packed=True)
        data = self.bases.files[path]
        data = damaged_bytes(draw, data, 8 + int.from_bytes(data[:8], "little"), len(data))
        return self.run(self.bases.put(self.folder, path.name, data, packed=True))

    def resumed(self, draw: random.Random) -> str:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.bases.packed, self.folder)
        (self.folder / "config.json").unlink()
        job = self.folder / "pack.json"
        job.write_bytes(damaged_bytes(draw, job.read_bytes(), 0, job.stat().st_size))
        layer = self.folder / "layer-001.safetensors"
        os.truncate(layer, draw.randrange(layer.stat().st_size))
        pack(self.bases.model, self.folder, bits=4, group_size=32, threads=1)
        for path in self.folder.iterdir():
            if (
                path.name != "pack.json"
                and path.read_bytes() != self.bases.files[self.bases.packed / path.name]
            ):
                raise WrongError(f"{path.name} differs after the pack was continued")
        return "is finished"

    def tokenizer_bytes(self, draw: random.Random) -> str:
        data = self.bases.files[self.bases.model / "tokenizer.json"]
        return self.tokenize(damaged_bytes(draw, data, 0, len(data)))

    def tokenizer_json(self, draw: random.Random) -> str:
        value = json.loads(self.bases.files[self.bases.model / "tokenizer.json"])
        kind = draw.randrange(4)
        if kind == 0:
            value["padding"] = {
                "strategy": {"Fixed": draw.choice(NUMBERS[:-1])},
                "direction": draw.choice(("Left", "Right")),
                "pad_to_multiple_of": draw.choice((None, 0, 2**40)),
                "pad_id": 1,
                "pad_type_id": 0,
                "pad_token": "!",
            }
        elif kind == 1:
            value["truncation"] = {
                "direction": "Right",
                "max_length": draw.choice((0, 1, 2**40)),
                "strategy": draw.choice(("LongestFirst", "OnlySecond")),
                "stride": draw.choice((0, 1, 2**40)),
            }
        else:
            value = damaged_json(draw, value)
        return self.tokenize(json.dumps(value).encode())

    def tokenize(self, data: bytes) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "tokenizer.json").unlink(missing_ok=True)
        (self.folder / "tokenizer.json").write_bytes(data)
        tokenizer = Tokenizer.load(self.folder)
        ids = tokenizer.encode(WORDS)
        "".join(tokenizer.piece(token) for token in [*ids, 0, 2**31, 2**32 - 1])
        return "reads"

    def template(self, draw: random.Random) -> str:
        text = _template()
        for _ in range(draw.choice((1, 1, 2, 5))):
            at = draw.randrange(len(text))
            kind = draw.randrange(4)
            if kind == 0:
                text = text[:at] + draw.choice(PIECES) + text[at:]
            elif kind == 1:
                text = text[:at] + text[at + draw.choice((1, 3, 20)) :]
            elif kind == 2:
                text = text[:at] + text[at : at + 40] * draw.choice((2, 50)) + text[at:]
            else:
                text = text[:at] + chr(draw.choice((0, 27, 0x7B, 0x25, 0xD7FF))) + text[at:]
        ChatTemplate(text, Path("t.jinja")).render(MESSAGES, tools=[{"name": "f"}])
        return "renders"

    def load(self, data: bytes, *, same: bool) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "b.state"
        path.write_bytes(data)
        with flashmoe.Model(self.bases.model, threads=1, cache=0) as model:
            state = flashmoe.State.load(model, path)
            tokens = greedy(model, [], 4, state)
        if same and tokens != self.bases.expected["after"]:
            raise WrongError(f"tokens {tokens}")
        return "loads"

    def state_header(self, draw: random.Random) -> str:
        data = self.bases.state.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        return self.load(damaged_bytes(draw, data, 0, end), same=True)

    def state_json(self, draw: random.Random, *, signed: bool = False) -> str:
        header, payload = split(self.bases.state.read_bytes())
        header = damaged_json(draw, header)
        if signed:
            sign(header, payload)
        return self.load(join(header, payload), same=not signed)

    def state_payload(self, draw: random.Random, *, signed: bool = False) -> str:
        header, payload = split(self.bases.state.read_bytes())
        out = bytearray(payload)
        for _ in range(draw.choice((1, 4, 32))):
            out[draw.randrange(len(out))] ^= draw.randrange(1, 256)
        payload = bytes(out)
        if signed:
            sign(header, payload)
        return self.load(join(header, payload), same=not signed)


def sign(header: Any, payload: bytes) -> None:
    """Gives a state's header the digest of what it says and holds, as far as it says anything."""
    try:
        metadata = header["__metadata__"]
        said = {key: value for key, value in metadata.items() if key != "sha256"}
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        layout = {name: (entry["dtype"], entry["shape"]) for name, entry in tensors.items()}
        digest = hashlib.sha256(json.dumps([said, layout], sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(payload[slice(*tensors[name]["data_offsets"])])
        metadata["sha256"] = digest.hexdigest()
    except (KeyError, TypeError, AttributeError):
        pass  # it will be refused for what it is
