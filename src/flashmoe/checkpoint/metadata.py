"""The JSON files of a checkpoint beside its index, each read once and when it is first needed."""

from functools import cached_property
from pathlib import Path
from typing import Any

from flashmoe.checkpoint.json import read_json
from flashmoe.machine.files import is_there


class Metadata:
    """config.json, generation_config.json and tokenizer_config.json of a directory.

    Only the first must be there; an absent one of the others is {}. Each raises CheckpointError
    where it is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.directory / "config.json")

    @cached_property
    def generation(self) -> dict[str, Any]:
        return self._optional("generation_config.json")

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        return self._optional("tokenizer_config.json")

    def _optional(self, name: str) -> dict[str, Any]:
        path = self.directory / name
        return read_json(path) if is_there(path) else {}
