"""From what a person types, a directory or a model's id on the Hugging Face hub, to a directory."""

import os
import re
from pathlib import Path

from flashmoe.config import ModelConfig
from flashmoe.errors import CheckpointError
from flashmoe.shards import INDEX, SINGLE, needed_files

_METADATA = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)


def resolve(source: str | os.PathLike[str]) -> Path:
    """The directory of a checkpoint; a hub id is downloaded into huggingface_hub's cache.

    Only the files that running the model needs are fetched, its metadata first, so that an
    unsupported model is refused before hundreds of gigabytes have come. A download that was
    interrupted resumes, and one that is complete is not repeated.

    Raises:
        CheckpointError: there is no such directory or model, it may not be downloaded, or the hub
            cannot be reached; the message says what to do.
    """
    directory = Path(source).expanduser()
    named = source != ""  # to Path, "" is the current directory
    if named and directory.is_dir():
        return directory
    if named and directory.exists():
        raise CheckpointError(f"{source}: a file; name the directory that holds config.json")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source}: no such directory. A model on the Hugging Face hub is named OWNER/NAME, as"
            " in mlx-community/Qwen3.5-397B-A17B-4bit"
        )
    snapshot = _download(source, None, _METADATA)
    ModelConfig.load(snapshot)
    weights = needed_files(snapshot) if (snapshot / INDEX).exists() else [SINGLE]
    # A snapshot is named after its commit: the weights must be of the same one.
    return _download(source, snapshot.name, weights)


def _download(model: str, revision: str | None, files: list[str] | tuple[str, ...]) -> Path:
    # Importing huggingface_hub takes most of a second, and a directory does not need it.
    from huggingface_hub import errors, snapshot_download  # noqa: PLC0415

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(files)))
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{model}: its owner asks for an agreement first. Accept it on the model's page, then"
            " sign in with 'hf auth login'"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{model}: neither a directory here nor a model on the Hugging Face hub. Check the"
            " spelling; if the model is private, sign in with 'hf auth login'"
        ) from None
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model}: no such directory here, not downloaded yet, and the Hugging Face hub cannot"
            f" be reached ({error.__cause__ or 'offline'}). Check the network and HF_HUB_OFFLINE,"
            " or name a directory"
        ) from error
    # Whatever library carries the download, its exceptions come through.
    except Exception as error:
        raise CheckpointError(
            f"{model}: the download failed: {error}. Run the same command again: it resumes"
        ) from error
