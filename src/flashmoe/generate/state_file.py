"""The file of a state: safetensors, with a digest, read only where it is what it must be.

Everything in it may come from elsewhere. Sizes are known before memory is asked for, and the native
core checks once more what it is handed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from flashmoe.checkpoint.headers import Tensor, build_header, read_open
from flashmoe.errors import CheckpointError, OutOfMemoryError
from flashmoe.machine.files import open_file, replacing, write_at

FORMAT = "flashmoe.state.2"
_FORMATS = "flashmoe.state."
# bfloat16 travels as uint16: numpy has no such type.
_NUMPY: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
}
_DTYPES = {dtype: name for name, dtype in _NUMPY.items()}

Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype and shape of tensors by name."""


def write_state(
    path: Path, metadata: Mapping[str, str], tensors: Mapping[str, npt.NDArray[Any]]
) -> None:
    """Writes the file, replacing what is there. Raises WriteError."""
    layout = {name: (_DTYPES[array.dtype], array.shape) for name, array in tensors.items()}
    metadata = {"format": FORMAT, **metadata}
    metadata["sha256"] = _digest(metadata, layout, tensors)
    header, offsets = build_header(
        [(name, *kind) for name, kind in layout.items()], metadata=metadata
    )
    with replacing(path) as descriptor:
        write_at(descriptor, header, 0)
        for name, array in tensors.items():
            write_at(descriptor, _bytes(array), offsets[name])


class StateFile:
    """An open file that says it is a state: its metadata is read, its tensors are not.

    Attributes:
        tokens: how many it holds.
        computed: of how many the tensors are.
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError: not a state, or one that another version of flashmoe wrote."""
        self.path = path
        self._file = open_file(path)
        try:
            self._read_header()
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # everything was read
            self._file.close()

    def _read_header(self) -> None:
        path = self.path
        try:
            size = os.fstat(self._file.fileno()).st_size
            self._tensors, self._metadata = read_open(self._file, path, size)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        found = self.text("format")
        if found.startswith(_FORMATS) and found != FORMAT:
            raise CheckpointError(
                f"{path}: a state of format {found[:40]!r}, written by another version of flashmoe;"
                f" this one reads {FORMAT}: compute the prompt again, and save it"
            )
        tokens = self._tensors.get("tokens")
        if found != FORMAT or tokens is None:
            raise CheckpointError(f"{path}: not a state that flashmoe saved")
        if tokens.dtype != "I32" or len(tokens.shape) != 1:
            raise CheckpointError(
                f"{path}: tensor tokens is {tokens.dtype} {list(tokens.shape)}, expected I32 [n]"
            )
        (self.tokens,) = tokens.shape
        computed = self.text("computed")
        counts = computed.isascii() and computed.isdecimal() and len(computed) <= 18
        if not counts or int(computed) > self.tokens:
            raise CheckpointError(
                f"{path}: {self.tokens} tokens, of which {computed[:40]!r} computed"
            )
        self.computed = int(computed)

    def text(self, key: str) -> str:
        """What its metadata says, "" for nothing: as endless and as unprintable as may be."""
        return self._metadata.get(key, "")

    def require(self, layout: Layout) -> None:
        """Raises CheckpointError where it holds other tensors than `layout`, beside its tokens."""
        expected = {"tokens": ("I32", (self.tokens,)), **layout}
        for name, (dtype, shape) in expected.items():
            tensor = self._tensors.get(name)
            if tensor is None and name == "logits":
                continue  # nothing was computed yet, so nothing was predicted
            if tensor is None:
                raise CheckpointError(f"{self.path}: holds no tensor {name}; damaged")
            if (tensor.dtype, tensor.shape) != (dtype, shape):
                raise CheckpointError(
                    f"{self.path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, expected"
                    f" {dtype} {list(shape)} after {self.computed} tokens; damaged"
                )
        for name in self._tensors.keys() - expected.keys():
            raise CheckpointError(f"{self.path}: tensor {name} is none of a state's; damaged")

    def read(self) -> dict[str, npt.NDArray[Any]]:
        """Every tensor. Raises CheckpointError where they are not what was written."""
        try:
            tensors = {name: _read(self._file, tensor) for name, tensor in self._tensors.items()}
        except MemoryError:
            raise OutOfMemoryError(
                f"{self.path}: there is no memory for the {self.tokens} tokens of this state"
            ) from None
        layout = {name: (t.dtype, t.shape) for name, t in self._tensors.items()}
        if self.text("sha256") != _digest(self._metadata, layout, tensors):
            raise CheckpointError(
                f"{self.path}: is not what was written (its SHA-256 is another); damaged: compute"
                " the prompt again"
            )
        return tensors


def _digest(
    metadata: Mapping[str, str], layout: Layout, tensors: Mapping[str, npt.NDArray[Any]]
) -> str:
    """SHA-256 of everything in the file but this digest."""
    said = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps([said, layout], sort_keys=True).encode())
    for name in sorted(layout):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read(file: BinaryIO, tensor: Tensor) -> npt.NDArray[Any]:
    array = np.empty(tensor.shape, _NUMPY[tensor.dtype])
    view = _bytes(array)
    try:
        file.seek(tensor.offset)
        while view:
            got = file.readinto(view)  # type: ignore[attr-defined]
            if not got:
                raise CheckpointError(f"{tensor.file}: ends within tensor {tensor.name}")
            view = view[got:]
    except OSError as error:
        raise CheckpointError(f"{tensor.file}: cannot be read: {error.strerror}") from error
    return array
