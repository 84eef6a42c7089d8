"""The Hugging Face hub: all that is HTTP. It knows files and headers, not what they mean."""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flashmoe.errors import CheckpointError


@dataclass(frozen=True)
class RemoteTensor:
    """A tensor as the header of a file on the hub lists it; begin and end count from its data."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def download(model: str, files: Sequence[str], commit: str | None = None) -> Path:
    """A directory of the hub's cache with those of the files that a model has.

    Progress goes to stderr. A download that was interrupted resumes, and one that is complete is
    not repeated.

    Args:
        model: OWNER/NAME.
        commit: or a branch or a tag; None is the newest. The directory is named after the commit.
    Raises:
        CheckpointError: there is no such model, it may not be downloaded, or the hub cannot be
            reached; the message says what to do.
    """
    # Importing huggingface_hub takes most of a second, and a local directory does not need it.
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    with _explained(model, commit):
        return Path(snapshot_download(model, revision=commit, allow_patterns=list(files)))


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE asks for no connection at all."""
    from huggingface_hub.constants import HF_HUB_OFFLINE  # noqa: PLC0415

    return bool(HF_HUB_OFFLINE)


def fetch(
    model: str, needed: str, optional: Sequence[str] = (), revision: str | None = None
) -> Path:
    """Likewise for a few small files of a revision, None being the newest, without progress.

    Raises:
        CheckpointError: as `download`; also where `needed` is not there.
    """
    from huggingface_hub import hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415

    with _explained(model, revision):
        directory = Path(hf_hub_download(model, needed, revision=revision)).parent
        for file in optional:
            with suppress(EntryNotFoundError):
                hf_hub_download(model, file, revision=directory.name)
    return directory


def list_files(model: str, commit: str) -> list[str]:
    """The files of a model. Raises CheckpointError as `download`."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    with _explained(model):
        return list(HfApi().list_repo_files(model, revision=commit))


def read_headers(model: str, commit: str, files: Sequence[str]) -> list[RemoteTensor]:
    """Every tensor of a model's safetensors files, of which only the headers are fetched.

    Raises:
        CheckpointError: as `download`; also where there are no such files.
    """
    from huggingface_hub import HfApi  # noqa: PLC0415

    if not files:
        raise CheckpointError(f"{model}: holds no safetensors files, which flashmoe reads")
    read = partial(HfApi().parse_safetensors_file_metadata, model, revision=commit)
    with _explained(model), ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(read, files))
    return [
        RemoteTensor(name, file, tensor.dtype, tuple(tensor.shape), *tensor.data_offsets)
        for file, header in zip(files, headers, strict=True)
        for name, tensor in header.tensors.items()
    ]


@dataclass(frozen=True)
class Hash:
    """What the hub calls a file's content by: SHA-256, or of small files git's name of it."""

    kind: str
    value: str

    def begin(self, nbytes: int) -> "hashlib._Hash":
        """The digest of a file of so many bytes, whose content is to follow."""
        if self.kind == "sha256":
            return hashlib.sha256()
        return hashlib.sha1(f"blob {nbytes}\0".encode(), usedforsecurity=False)


def known_hash(path: Path) -> Hash | None:
    """The hash that a file was downloaded under, as the download left it beside; no network.

    In the hub's cache files are links to blobs of that name; `hf download --local-dir` writes it
    into `.cache/huggingface`.
    """
    said = ""
    try:
        target = Path(os.readlink(path))
        if target.parent.name == "blobs":
            said = target.name
    except OSError:
        note = path.parent / ".cache/huggingface/download" / f"{path.name}.metadata"
        with suppress(OSError, UnicodeDecodeError, IndexError):
            said = note.read_text()[:1000].split("\n")[1].strip()
    if re.fullmatch("[0-9a-f]{64}", said):
        return Hash("sha256", said)
    return Hash("git", said) if re.fullmatch("[0-9a-f]{40}", said) else None


def cache_place() -> Path:
    """The nearest directory that exists of where a download would go."""
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415

    place = Path(HF_HUB_CACHE)
    while not os.path.exists(place):  # unlike Path's, never an exception
        place = place.parent
    return place


@contextmanager
def _explained(model: str, revision: str | None = None) -> Iterator[None]:
    """Turns whatever talking to the hub raises into a CheckpointError that says what to do."""
    from huggingface_hub import errors  # noqa: PLC0415

    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{model}: its owner asks for an agreement first. Accept it on the model's page, then"
            " sign in with 'hf auth login'"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{model}@{revision}: has no such revision on the Hugging Face hub; behind the @ stands"
            " a branch, a tag or a whole commit"
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
    except errors.EntryNotFoundError as error:
        raise CheckpointError(
            f"{model}: the hub does not have a file that a checkpoint needs: {error}; if it holds"
            " GGUF files or an adapter, take the model's safetensors edition"
        ) from None
    # The exceptions of whatever library carries the download come through as they are.
    except Exception as error:
        raise CheckpointError(
            f"{model}: the hub did not deliver: {error}. Run the same command again: a download"
            " resumes where it stopped"
        ) from error
