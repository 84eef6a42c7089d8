"""What a model's name means: "demo", a directory, or an id of the hub."""

import os
import re
from pathlib import Path

from flashmoe.errors import CheckpointError
from flashmoe.machine.files import is_there, to_path

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[\w.-]+)?)(?:@([\w./-]+))?")


def find_local(source: str | os.PathLike[str]) -> Path | None:
    """The directory of "demo" or of a path; None for what can only be a hub id.

    Raises:
        CheckpointError: it is neither a directory nor a possible hub id, or the demo is missing.
    """
    if source == "demo":
        return demo_directory()
    to_path(source)
    name = os.fspath(source)
    try:
        path = Path(name).expanduser()
        if name and path.is_dir():
            return path
        is_file = path.is_file()
        possible = isinstance(source, str) and not path.exists() and _HUB_ID.fullmatch(name)
    except (OSError, RuntimeError):  # a name that is too long, ~ of nobody
        is_file, possible = False, None
    if is_file:
        raise CheckpointError(_of_file(path))
    if not possible:
        raise CheckpointError(
            f"{name or 'an empty name'}: no such directory; give the directory of a checkpoint,"
            " a hub id such as mlx-community/Qwen3.5-397B-A17B-4bit, or demo"
        )
    return None


def split_revision(name: str) -> tuple[str, str | None]:
    """OWNER/NAME and what follows an @: a branch, a tag or a commit of the hub's."""
    model, _, revision = name.partition("@")
    return model, revision or None


def _of_file(path: Path) -> str:
    """What to say where a file is named in place of a directory."""
    if path.suffix.lower() == ".gguf":
        return f"{path}: a GGUF file, which flashmoe does not read; take the safetensors edition"
    return f"{path}: is a file, no such directory; give the directory of a checkpoint"


def demo_directory() -> Path:
    """The demo's checkpoint; CheckpointError where the installed package does not hold it."""
    directory = Path(__file__).parents[1] / "demo_model"
    if not is_there(directory / "config.json"):
        raise CheckpointError(
            f"{directory}: the demo model is not in this installation of flashmoe; "
            "install it again with 'pip install --force-reinstall flashmoe'"
        )
    return directory
