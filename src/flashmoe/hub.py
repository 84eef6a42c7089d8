"""A model of the Hugging Face hub, from its id to a directory of huggingface_hub's cache."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.index import INDEX, SINGLE, needed_files
from flashmoe.errors import CheckpointError

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


def download(model: str) -> Path:
    """The directory of a model, named OWNER/NAME; progress goes to stderr.

    Only the files that running the model needs are fetched, its metadata first, so that an
    unsupported model is refused before hundreds of gigabytes have come. A download that was
    interrupted resumes, and one that is complete is not repeated.

    Raises:
        CheckpointError: there is no such model, it may not be downloaded, flashmoe does not run
            it, or the hub cannot be reached; the message says what to do.
    """
    snapshot = _download(model, None, _METADATA)
    ModelConfig.load(snapshot)
    weights = needed_files(snapshot) if (snapshot / INDEX).exists() else [SINGLE]
    # A snapshot is named after its commit: the weights must be of the same one.
    return _download(model, snapshot.name, weights)


def _download(model: str, revision: str | None, files: Sequence[str]) -> Path:
    # Importing huggingface_hub takes most of a second, and a directory does not need it.
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    with explained_errors(model):
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(files)))


@contextmanager
def explained_errors(model: str) -> Iterator[None]:
    """Turns whatever talking to the hub raises into a CheckpointError that says what to do."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
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
    except errors.HFValidationError:
        raise CheckpointError(
            f"{model}: neither a directory here nor the id of a model on the Hugging Face hub,"
            " which is like mlx-community/Qwen3.5-397B-A17B-4bit"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise CheckpointError(
            f"{model}: no such directory here, not downloaded completely, and the Hugging Face hub"
            f" cannot be reached ({error.__cause__ or error}). Check the network and"
            " HF_HUB_OFFLINE, or name a directory"
        ) from error
    # The exceptions of whatever library carries the download come through as they are.
    except Exception as error:
        raise CheckpointError(
            f"{model}: the hub did not deliver: {error}. Run the same command again: a download"
            " resumes where it stopped"
        ) from error
