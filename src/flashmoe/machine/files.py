"""Files: read with a limit on their size, and replaced whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from flashmoe.errors import (
    ArgumentError,
    CheckpointError,
    FlashMoeError,
    OutOfMemoryError,
    WriteError,
)

PART = ".flashmoe-*.part"
"""What files are called until they are complete; a process that is killed leaves one behind."""


def to_path(name: str | os.PathLike[str]) -> Path:
    """The path; ArgumentError for what can be none."""
    try:
        path = Path(name)
    except TypeError:
        raise ArgumentError(f"a path is text or a Path; got {name!r}") from None
    if "\0" in str(path):
        raise ArgumentError(f"{str(path)!r}: a path cannot hold the character NUL")
    return path


def is_there(path: Path) -> bool:
    """Whether anything has that name; CheckpointError where the system does not say."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be looked at: {_reason(error)}") from None
    return True


def names_in(directory: Path) -> list[str]:
    """What a directory holds, sorted; CheckpointError where it cannot be listed."""
    try:
        return sorted(os.listdir(directory))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: cannot be listed: {_reason(error)}") from None


def regular_file_size(path: Path) -> int:
    """Size in bytes of a regular file; a symbolic link is followed, as hub caches consist of them.

    Raises:
        CheckpointError: nothing is there, or something that reading could hang on (a FIFO, a
            device, a directory, a loop of links).
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        gone = f" (a link to {os.readlink(path)}, which is gone)" if os.path.islink(path) else ""
        raise CheckpointError(f"{path}: no such file{gone}; is the download complete?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {_reason(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return status.st_size


def require_itself(path: Path, beginning: bytes) -> None:
    """Raises CheckpointError where a file is what often stands in the place of another.

    Git LFS leaves pointers where it is not installed, and a server a page that says no.
    """
    if len(beginning) >= 16 and not any(beginning):
        raise CheckpointError(
            f"{path}: begins with zeros: it was never downloaded, only its room was made; download"
            " it again"
        )
    start = beginning[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path}: is a Git LFS pointer, not the file that it stands for; run 'git lfs pull' in"
            " its directory, or download the model with 'hf download'"
        )
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(
            f"{path}: is a web page, not the file; download it again, signed in if its owner asks"
            " for that ('hf auth login')"
        )
    if start.startswith(b"pk\x03\x04"):
        raise CheckpointError(
            f"{path}: is a zip file, as PyTorch writes weights, which flashmoe does not read; take"
            " the model's safetensors edition"
        )
    if start.startswith(b"gguf"):
        raise CheckpointError(
            f"{path}: is a GGUF file, which flashmoe does not read; take the model's safetensors"
            " edition"
        )


def open_file(path: Path) -> FileIO:
    """A regular file, open and unbuffered; what has its name later does not matter to it.

    Raises:
        CheckpointError: as regular_file_size.
    """
    regular_file_size(path)
    try:
        return FileIO(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {_reason(error)}") from None


def read_file(path: Path, limit: int) -> bytes:
    """All of a regular file of at most `limit` bytes.

    Raises:
        CheckpointError: as regular_file_size; too long, something else in its place, or it cannot
            be read.
    """
    size = regular_file_size(path)
    if size > limit:
        raise CheckpointError(f"{path}: {size} bytes; at most {limit} are believable here")
    try:
        with path.open("rb") as file:
            data = file.read(size)
    except MemoryError:
        raise OutOfMemoryError(f"{path}: there is no memory for its {size} bytes") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from None
    require_itself(path, data[:64])
    return data


@contextmanager
def replacing(path: Path) -> Iterator[int]:
    """The descriptor of a new file that takes the place of `path` once all of it is on the disk.

    It has a random name in the same directory until then, is never opened through a link, and gets
    the permissions of the file that it replaces. What has the name `path` and is no regular file (a
    device, a link) stays. If anything fails, `path` is what it was and nothing is left beside it.

    Raises:
        WriteError: the file cannot be written; also what the block raises.
    """
    part = path.parent / PART.replace("*", secrets.token_hex(8))
    descriptor = -1
    try:
        mode = _mode_of(path)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        if mode is not None:
            with _unless_unsupported(errno.EPERM):
                os.fchmod(descriptor, mode)
        yield descriptor
        with _unless_unsupported():
            os.fsync(descriptor)
        # A network file system may say only now that there was no room.
        closing, descriptor = descriptor, -1
        os.close(closing)
        os.rename(part, path)
    except BaseException as error:
        if descriptor >= 0:
            with suppress(OSError):
                os.close(descriptor)
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and not isinstance(error, FlashMoeError):
            raise WriteError(
                f"{path}: cannot be written: {_reason(error)}; what was there is still there"
            ) from error
        raise
    _sync_directory(path.parent)


def write_at(descriptor: int, data: Any, offset: int) -> int:
    """Writes all of a buffer at `offset`; where it ends."""
    view = memoryview(data)
    view = view.cast("B") if view.nbytes else view  # it refuses to cast what is empty
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
    return offset


@contextmanager
def _unless_unsupported(*more: int) -> Iterator[None]:
    """Goes on where a file system, of a network or of a card, does not have such a thing."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, *more):
            raise


def _mode_of(path: Path) -> int | None:
    """Permissions of the regular file that is there; WriteError where it is anything else."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return None
    if stat.S_ISREG(status.st_mode):
        return stat.S_IMODE(status.st_mode)
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFLNK: "a symbolic link"}
    kind = kinds.get(stat.S_IFMT(status.st_mode), "not a regular file")
    raise WriteError(f"{path}: is {kind}, which is not replaced; name another file, or remove it")


def _sync_directory(directory: Path) -> None:
    """Makes a rename last through a power cut, where the file system can: both files are whole."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: OSError | ValueError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
