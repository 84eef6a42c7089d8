"""A directory of safetensors files as one table of tensors."""

import re
from pathlib import Path

from flashmoe.checkpoint.headers import Tensor, is_tensor_name, read_header
from flashmoe.checkpoint.json import read_json
from flashmoe.errors import CheckpointError
from flashmoe.machine.files import is_there, names_in

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Multi-token prediction and vision, which generating text does not need, and the bytes that align
# a pack's experts.
_SKIPPED = (
    "mtp.",
    "model.mtp.",
    "language_model.mtp.",
    "model.visual.",
    "visual.",
    "vision_tower.",
    "padding.",
)

# Nothing that leaves the directory, and nothing that means more than itself to a glob.
_FILE_NAME = re.compile(r"[\w.+@ -]{1,200}\.safetensors", re.ASCII)


class Index:
    """Which safetensors files a directory has, and what each is said to hold.

    Attributes:
        path: the index, or the single file of weights where there is none.
        names: the text model's tensors by file, as the index lists them; None for a single file.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the index, where there is one.

        Raises:
            CheckpointError: neither an index nor a single file is there, or the index is damaged or
                names files outside `directory`.
        """
        self.path = _weights_file(directory)
        self.names = _names_by_file(self.path) if self.path.name == INDEX else None

    @property
    def files(self) -> list[str]:
        """Names of the files that hold any of the text model's tensors, sorted."""
        return [SINGLE] if self.names is None else sorted(self.names)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is stored for text, by the name it is stored under.

        Raises:
            CheckpointError: a file is missing or damaged, or does not hold what the index says.
        """
        if self.names is None:
            return _wanted(read_header(self.path))
        tensors: dict[str, Tensor] = {}
        for file, names in sorted(self.names.items()):
            path = self.path.with_name(file)
            if not is_there(path):
                raise CheckpointError(
                    f"{path}: no such file, but {INDEX} says that it holds {listed(names)};"
                    " is the download complete?"
                )
            found = _wanted(read_header(path))
            if absent := names - found.keys():
                raise CheckpointError(
                    f"{path}: {INDEX} says that it holds {listed(absent)}; it does not"
                )
            if unnamed := found.keys() - names:
                raise CheckpointError(
                    f"{path}: holds {listed(unnamed)}, which {INDEX} does not place in it"
                )
            tensors.update(found)
        return tensors


def _weights_file(directory: Path) -> Path:
    present = names_in(directory)
    for name in (INDEX, SINGLE):
        if name in present:
            return directory / name
    present = [name for name in present if "." in name]
    raise CheckpointError(
        f"{directory}: neither {SINGLE} nor {INDEX} is here;"
        f" found {', '.join(present[:8]) or 'nothing'}. Is the download complete?"
    )


def is_skipped(name: str) -> bool:
    """Whether a tensor is none of the text model's: multi-token prediction, vision, padding."""
    return name.startswith(_SKIPPED)


def _wanted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not is_skipped(name)}


def _names_by_file(index: Path) -> dict[str, set[str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map is missing, empty or not an object")
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not is_tensor_name(name):
            raise CheckpointError(f"{index}: a tensor cannot be called {name[:40]!r}")
        if not isinstance(file, str) or not (file in by_file or _FILE_NAME.fullmatch(file)):
            raise CheckpointError(
                f"{index}: tensor {name} is said to lie in {file!r:.80}; expected the name of a"
                " .safetensors file in the same directory"
            )
        names = by_file.setdefault(file, set())
        if not is_skipped(name):
            names.add(name)
    return {file: names for file, names in by_file.items() if names}


def listed(names: set[str]) -> str:
    """A few of the names, sorted, and how many more there are."""
    shown = ", ".join(sorted(names)[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
