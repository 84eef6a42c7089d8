"""Where a model is: a directory, the demo that flashmoe brings along, or a hub id."""

import re
from pathlib import Path

from flashmoe.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def find_local(source: str) -> Path | None:
    """The directory of "demo" or of a path; None for what can only be a hub id.

    Raises:
        CheckpointError: it is neither a directory nor a possible hub id, or the demo is missing.
    """
    if source == "demo":
        return demo_directory()
    try:
        path = Path(source).expanduser()
        if source and path.is_dir():
            return path
        possible = not path.exists() and _HUB_ID.fullmatch(source)
    except (OSError, RuntimeError):  # a name that is too long, ~ of nobody
        possible = None
    if not possible:
        raise CheckpointError(
            f"{source or 'an empty name'}: no such directory; give the directory of a checkpoint,"
            " a hub id such as mlx-community/Qwen3.5-397B-A17B-4bit, or demo"
        )
    return None


def find_model(source: str) -> Path:
    """Likewise, but a hub id is downloaded, with a progress bar on stderr."""
    directory = find_local(source)
    if directory is None:
        from flashmoe.hub import download  # noqa: PLC0415

        directory = download(source)
    return directory


def demo_directory() -> Path:
    """The demo's checkpoint; CheckpointError where the installed package does not hold it."""
    directory = Path(__file__).parents[1] / "demo_model"
    if not (directory / "config.json").is_file():
        raise CheckpointError(
            f"{directory}: the demo model is not in this installation of flashmoe; "
            "install it again with 'pip install --force-reinstall flashmoe'"
        )
    return directory
