"""A client, and a model that answers what a test wants while it computes what it always does."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import flashmoe
from flashmoe.generate.answer import Answer

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "src" / "flashmoe" / "demo_model"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city", "days"],
        },
    },
}


def published_template(name: str) -> str | None:
    """A template of ../shared/templates, where that is there."""
    for parent in ROOT.parents:
        path = parent / "shared" / "templates" / f"{name}.jinja"
        if path.is_file():
            return path.read_text()
    return None


def model_with_template(directory: Path, maker: ModuleType, template: str) -> Path:
    """A small random model with the demo's tokenizer and a chat template."""
    maker.make_checkpoint(directory, maker.Shape(64, 4, 8, 2, 64, 64, 6144, 2, 1, 32, 1, 2, 32))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    section = config.get("text_config", config)
    section["max_position_embeddings"] = 8192
    path.write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    (directory / "chat_template.jinja").write_text(template)
    return directory


class Scripted:
    """A processor that makes the model say a text, and notes the logits that it would have used.

    Args:
        spelled: whether the text is drawn letter by letter, as no tokenizer encodes it.
    """

    def __init__(self, model: flashmoe.Model, text: str, *, spelled: bool = False) -> None:
        encode = model.checkpoint.tokenizer.encode
        parts = re.split(r"(</?think>|</?tool_call>)", text)
        pieces = (
            [c for p in parts for c in ([p] if p.startswith("<") else p)] if spelled else [text]
        )
        self.ids = [i for piece in pieces for i in encode(piece, special=False)]
        self.ids.append(model.config.eos_token_ids[0])
        self.logits: dict[int, np.ndarray] = {}
        self._at = 0

    def __call__(self, ids: Sequence[int], logits: np.ndarray) -> np.ndarray:
        self.logits[len(ids)] = logits.copy()
        forced = np.full_like(logits, -np.inf)
        forced[self.ids[self._at]] = 0
        self._at += 1
        return forced


def call_text(*calls: dict[str, Any]) -> str:
    """Calls of the weather tool as the family writes them."""
    return "\n".join(
        f"<tool_call>\n<function=weather>\n<parameter=city>\n{call['city']}\n</parameter>\n"
        f"<parameter=days>\n{call['days']}\n</parameter>\n</function>\n</tool_call>"
        for call in calls
    )


def as_message(answer: Answer, *, reasoning: bool) -> dict[str, Any]:
    """An answer as a client of OpenAI's API sends it back, with or without its reasoning."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text or None}
    if reasoning and answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        message["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.raw}}
            for c in answer.tool_calls
        ]
    return message
