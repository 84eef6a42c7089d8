"""A directory of safetensors files as one table of tensors."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from flashmoe.checkpoint.headers import Tensor, is_tensor_name, read_header
from flashmoe.checkpoint.json import read_json
from flashmoe.errors import CheckpointError
from flashmoe.machine.files import is_there, names_in

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Multi-token prediction and vision, which generating text does not need, under every prefix that
# conversions give them, and the bytes that align a pack's experts.
_SKIPPED = (
    *(
        f"{prefix}{module}."
        for prefix in (
            "",
            "model.",
            "language_model.",
            "model.language_model.",
            "language_model.model.",
        )
        for module in ("mtp", "visual", "vision_tower", "vision_model")
    ),
    "padding.",
)

# Nothing that leaves the directory, and nothing that means more than itself to a glob.
_FILE_NAME = re.compile(r"[\w.+@ -]{1,200}\.safetensors", re.ASCII)
_NUMBERED = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})\.safetensors", re.ASCII)
_FOREIGN = {
    ".gguf": "holds GGUF",
    ".bin": "holds weights of PyTorch",
    ".pth": "holds weights of PyTorch",
    ".npz": "holds weights of numpy",
}


class Index:
    """Which safetensors files a directory has, and what each is said to hold.

    Attributes:
        path: the index; without one the single file of weights, or the directory of several.
        names: the text model's tensors by file, as the index lists them; None without one.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the index, where there is one.

        Raises:
            CheckpointError: no weights are there, or the index is damaged or names files outside
                `directory`.
        """
        present = names_in(directory)
        self._directory = directory
        self._present = weights_among(present)
        if INDEX in present and not _dangles(directory / INDEX):
            self.path = directory / INDEX
            self.names: dict[str, set[str]] | None = _names_by_file(self.path)
            return
        self.names = None
        if not self._present:
            raise CheckpointError(_what_is_there(directory, present))
        self.path = directory / SINGLE if SINGLE in self._present else directory

    @property
    def files(self) -> list[str]:
        """Names of the files that hold any of the text model's tensors, sorted."""
        if self.names is not None:
            return sorted(self.names)
        return [SINGLE] if SINGLE in self._present else self._present

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is stored for text, by the name it is stored under.

        Raises:
            CheckpointError: a file is missing or damaged, or does not hold what the index says.
        """
        if self.names is None:
            return self._read(self.files)
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

    def without_index(self) -> Iterator[dict[str, Tensor]]:
        """Likewise as the files themselves say it: what might be meant where the index is stale.

        The single file of weights, if there is one; then all files of weights together.
        """
        choices = [[SINGLE], self._present] if SINGLE in self._present else [self._present]
        for files in choices:
            with suppress(CheckpointError):
                yield self._read(files)

    def _read(self, files: list[str]) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for file in files:
            _require_neighbours(self._directory, file, files)
            for name, tensor in _wanted(read_header(self._directory / file)).items():
                if tensors.setdefault(name, tensor) is not tensor:
                    raise CheckpointError(
                        f"{tensor.file}: holds {name}, and so does {tensors[name].file.name}; no"
                        f" {INDEX} says which is meant: remove the files that are of another model"
                    )
        return tensors


def weights_among(names: Iterable[str]) -> list[str]:
    """The files of weights among a directory's, where no index names them, sorted."""
    files = sorted(name for name in names if _FILE_NAME.fullmatch(name) and name[0] != ".")
    return [name for name in files if name.startswith("model")] or files


def _dangles(path: Path) -> bool:
    """Whether it is a link to what is gone."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    except OSError:  # who reads it says what is wrong
        return False
    return False


def _require_neighbours(directory: Path, file: str, files: list[str]) -> None:
    """Raises CheckpointError where a file is one of N, and not all of them are there."""
    if match := _NUMBERED.fullmatch(file):
        before, _, of, count = match.groups()
        for number in range(1, min(int(count), 10_000) + 1):
            other = f"{before}{number:05d}{of}{count}.safetensors"
            if other not in files:
                raise CheckpointError(
                    f"{directory / other}: no such file, but {file} is here;"
                    " is the download complete?"
                )


def _what_is_there(directory: Path, present: list[str]) -> str:
    """What to say of a directory without weights."""
    for suffix, kind in _FOREIGN.items():
        if found := [name for name in present if name.lower().endswith(suffix)]:
            return (
                f"{directory}: {kind} ({', '.join(found[:3])}), which flashmoe does not read;"
                f" neither {SINGLE} nor {INDEX} is here: take the model's safetensors edition"
            )
    present = [name for name in present if "." in name]
    return (
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
