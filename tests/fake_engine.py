"""A model whose next token is a rule of the tokens before it, in place of the native engine.

`install` makes `flashmoe.Model` open it, on a checkpoint directory of config and tokenizer files.
Its states, exceptions and counters behave as `_native.pyi` says.
"""

import json
import threading
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from flashmoe import _native
from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.find import find_local
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.errors import StateError, StoppedError
from flashmoe.generate import model as model_module
from flashmoe.generate.engine import Engine
from flashmoe.generate.setting import Setting

CONFIG: dict[str, Any] = {
    "model_type": "qwen3_5_moe_text",
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "max_position_embeddings": 2048,
}

TEMPLATE = """\
{%- for message in messages %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{{ '<think>' if enable_thinking is not defined or enable_thinking else '' }}
{%- endif %}
"""

Rule = Callable[[list[int], int], np.ndarray]
"""Logits [512] after these tokens, of which the first so many are the prompt."""


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE with every byte, a few merges, and ChatML's tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 4], trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    return tokenizer


def make_directory(directory: Path, **config: Any) -> Path:
    """Config, tokenizer, template and generation defaults; no weights."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    values = CONFIG | {"vocab_size": 512, "eos_token_id": end} | config
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


def spelling(text: str, tokenizer: Tokenizer, end: str = "<|im_end|>") -> Rule:
    """The rule of a model that says exactly `text` after any prompt, byte by byte, then ends."""
    table = decoders_alphabet()
    said = [tokenizer.token_to_id(table[byte]) for byte in text.encode()]
    said.append(tokenizer.token_to_id(end))

    def rule(tokens: list[int], prompt: int) -> np.ndarray:
        logits = np.zeros(512, np.float32)
        logits[said[min(len(tokens) - prompt, len(said) - 1)]] = 20
        return logits

    return rule


def decoders_alphabet() -> dict[int, str]:
    """The character that stands for each byte, asked of the tokenizers library."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    table: dict[int, str] = {}
    for code in (*range(128), *range(0x80, 0x800, 0x3F), 0x800, 0xFFFD, 0x10000):
        pieces = "".join(piece for piece, _ in split.pre_tokenize_str(chr(code)))
        table.update(zip(chr(code).encode(), pieces, strict=True))
    for lead in range(0x80, 0x100):
        if lead not in table:
            for code in range(0x80, 0x110000, 0x40):
                if not 0xD800 <= code < 0xE000 and lead in chr(code).encode():
                    pieces = "".join(piece for piece, _ in split.pre_tokenize_str(chr(code)))
                    table.update(zip(chr(code).encode(), pieces, strict=True))
                    break
    return table


def hashed(tokens: list[int], prompt: int = 0) -> np.ndarray:
    """Logits that depend on every token so far, in their order."""
    seed = zlib.crc32(np.array(tokens, np.int32).tobytes())
    return np.random.default_rng(seed).normal(0, 3, 512).astype(np.float32)


class FakeState:
    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens
        self.prompt = 0
        self.logits: np.ndarray | None = None

    @property
    def position(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return 4 * len(self.tokens)

    @property
    def shared(self) -> tuple[int, int]:
        return id(self), 0

    def fork(self) -> "FakeState":
        copy = FakeState(list(self.tokens))
        copy.prompt, copy.logits = self.prompt, self.logits
        return copy


class FakeEngine:
    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.backend = "cpu"
        self.before_forward: Callable[[], None] = lambda: None
        self.calls: list[int] = []
        self._turn = threading.Lock()
        self.closed = False

    def _require_open(self) -> None:
        if self.closed:
            raise StateError("this model is closed; open it again with flashmoe.Model(...)")

    def new_state(self) -> FakeState:
        self._require_open()
        return FakeState([])

    def forward(
        self,
        state: FakeState,
        ids: np.ndarray,
        all_logits: bool = False,
        request: _native.Request | None = None,
    ) -> np.ndarray:
        with self._turn:
            return self._forward(state, ids, all_logits, request)

    def _forward(
        self, state: FakeState, ids: np.ndarray, all_logits: bool, request: _native.Request | None
    ) -> np.ndarray:
        self._require_open()
        if request is not None and request.cancelled:
            raise StoppedError("the work was cancelled")
        assert ids.dtype == np.int32
        self.before_forward()
        self.calls.append(len(ids))
        before = list(state.tokens)
        state.tokens += ids.tolist()
        if len(ids) > 1 or not before:
            state.prompt = len(state.tokens)
        state.logits = self.rule(state.tokens, state.prompt)
        if not all_logits:
            return state.logits
        return np.stack([self.rule(before + ids[: i + 1].tolist(), 0) for i in range(len(ids))])

    def stats(self) -> dict[str, float]:
        self._require_open()
        forwards = len(self.calls)
        return {
            "reads": 10 * forwards,
            "bytes_read": 1000 * forwards,
            "bytes_cached": 500 * forwards,
            "read_seconds": 0.1 * forwards,
            "wait_seconds": 0.01 * forwards,
            "expert_hits": 2 * forwards,
            "expert_misses": 6 * forwards,
            "rows": sum(self.calls),
            "forward_seconds": 0.2 * forwards,
            "resident_bytes": 12345,
            "slot_bytes": 6789,
            "activation_bytes": 1,
            "head_seconds": 0.01 * forwards,
            "busy_seconds": 0.15 * forwards,
        }

    def close(self) -> None:
        self.closed = True


def install(monkeypatch: pytest.MonkeyPatch, rule: Rule = hashed) -> FakeEngine:
    """From now on flashmoe.Model opens this engine, whatever the directory's weights."""
    native = FakeEngine(rule)

    def open_checkpoint(source: str | Path) -> Checkpoint:
        directory = find_local(source)
        assert directory is not None
        metadata = Metadata(directory)
        config = ModelConfig.of(metadata)
        checkpoint = Checkpoint(str(source), metadata, config, [], {}, {}, [], 0)
        vars(checkpoint)["fingerprint"] = str(zlib.crc32(repr(config).encode()))
        return checkpoint

    def open_engine(checkpoint: Checkpoint, setting: Setting, progress: object) -> Engine:
        native.closed = False
        return Engine(cast(Any, native), checkpoint, setting)

    monkeypatch.setattr(Checkpoint, "open", staticmethod(open_checkpoint))
    monkeypatch.setattr(model_module, "open_engine", open_engine)
    monkeypatch.setattr(Checkpoint, "needs", lambda *_, **__: Counter())
    return native
