"""The JSON files of a checkpoint beside its index, each read once and when it is first needed."""

from functools import cached_property
from pathlib import Path
from typing import Any

from flashmoe.checkpoint.json import read_json
from flashmoe.errors import CheckpointError
from flashmoe.machine.files import is_there, names_in


class Metadata:
    """config.json, generation_config.json, tokenizer_config.json and the like of a directory.

    Only the first must be there; an absent one of the others is {}. Each raises CheckpointError
    where it is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def config(self) -> dict[str, Any]:
        path = self.directory / "config.json"
        if not is_there(path):
            found = [name for name in names_in(self.directory) if name.lower().endswith(".gguf")]
            if found:
                raise CheckpointError(
                    f"{self.directory}: holds GGUF ({', '.join(found[:3])}), which flashmoe does"
                    " not read; take the model's safetensors edition"
                )
        return read_json(path)

    @cached_property
    def generation(self) -> dict[str, Any]:
        return self._optional("generation_config.json")

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        return self._optional("tokenizer_config.json")

    @cached_property
    def special_tokens(self) -> dict[str, Any]:
        return self._optional("special_tokens_map.json")

    @cached_property
    def modelopt(self) -> dict[str, Any]:
        """What NVIDIA's ModelOpt leaves of how it quantized."""
        return self._optional("hf_quant_config.json")

    def token(self, name: str) -> str | None:
        """The text of a token by its role, such as "eos_token"."""
        for values in (self.tokenizer, self.special_tokens):
            value = values.get(name)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                return value
        return None

    def _optional(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        return read_json(path) if is_there(path) else {}
