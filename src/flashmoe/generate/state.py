"""What a sequence carries from token to token, as a value that can be kept, copied and stored."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from flashmoe.checkpoint.headers import Tensor, build_header, read_header, read_metadata
from flashmoe.errors import CheckpointError, StateError, WriteError

if TYPE_CHECKING:
    from flashmoe import _native
    from flashmoe.generate.engine import Engine

_FORMAT = "flashmoe.state.1"
# bfloat16 travels as uint16: numpy has no such type.
_NUMPY: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(np.uint16),
    "I32": np.dtype(np.int32),
}
_DTYPES = {dtype: name for name, dtype in _NUMPY.items()}


class _Model(Protocol):
    """What of a `Model` loading a state needs."""

    @property
    def _engine(self) -> Engine: ...


class State:
    """The tokens of a sequence, and the KV caches, convolution and recurrent states they leave.

    Made by `Model.new_state()`, `fork()` or `State.load()`. One `generate()` uses it at a time. The
    last token of an answer has not been computed yet: the next call does that first.
    """

    def __init__(self, engine: Engine, native: _native.State, tokens: list[int]) -> None:
        self._engine = engine
        self._native = native
        self._tokens = tokens
        self._lock = threading.Lock()

    @property
    def tokens(self) -> tuple[int, ...]:
        """Every id so far: prompts and answers."""
        return tuple(self._tokens)

    @property
    def position(self) -> int:
        """How many tokens that is."""
        return len(self._tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self._native.nbytes

    def fork(self) -> State:
        """An independent copy: what is done with one leaves the other as it is."""
        with self._held():
            return State(self._engine, self._native.fork(), list(self._tokens))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file that `State.load` reads, replacing what is there.

        Raises:
            WriteError: it cannot be written; what was there is then still there.
        """
        path = Path(path)
        with self._held():
            arrays: dict[str, npt.NDArray[Any]] = {
                "tokens": np.array(self._tokens, np.int32),
                **self._native.export(),
            }
            computed = self._native.position
        metadata = {
            "format": _FORMAT,
            "model": self._engine.checkpoint.fingerprint,
            "source": self._engine.checkpoint.source,
            "experts_per_token": str(self._engine.setting.experts_per_token),
            "precision": self._engine.setting.precision,
            "computed": str(computed),
        }
        table = [(name, _DTYPES[a.dtype], a.shape) for name, a in arrays.items()]
        header, _ = build_header(table, metadata=metadata)
        part = path.parent / f".{path.name}.{os.getpid()}.part"
        try:
            with part.open("wb") as file:
                file.write(header)
                for array in arrays.values():
                    np.ascontiguousarray(array).tofile(file)
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise WriteError(f"{path}: the state cannot be written: {error}") from error

    @classmethod
    def load(cls, model: _Model, path: str | os.PathLike[str]) -> State:
        """The state that `save` wrote, to go on with the same model.

        Raises:
            CheckpointError: not such a file, or damaged.
            StateError: it belongs to another model, other routing or another precision.
        """
        path = Path(path)
        engine = model._engine
        checkpoint, setting = engine.checkpoint, engine.setting
        tensors = read_header(path)
        metadata = read_metadata(path)
        if metadata.get("format") != _FORMAT or "tokens" not in tensors:
            raise CheckpointError(f"{path}: not a state that flashmoe saved")
        if metadata.get("model") != checkpoint.fingerprint:
            raise StateError(
                f"{path}: saved from another model ({metadata.get('source')}), not from "
                f"{checkpoint.source}; open that one, or compute the prompt again"
            )
        for name in ("experts_per_token", "precision"):
            if metadata.get(name) != str(getattr(setting, name)):
                raise StateError(
                    f"{path}: computed with {name}={metadata.get(name)}, this model runs "
                    f"{getattr(setting, name)}; open the model with the former"
                )
        arrays = {name: _read(tensor) for name, tensor in tensors.items()}
        tokens = _token_ids(path, arrays.pop("tokens"), checkpoint.config.vocab_size)
        computed = metadata.get("computed", "")
        if not computed.isdecimal() or int(computed) > len(tokens):
            raise CheckpointError(f"{path}: {len(tokens)} tokens, of which {computed!r} computed")
        state = cls(engine, engine.native.new_state(), tokens)
        if int(computed) > 0:
            try:
                state._native.restore(int(computed), arrays)
            except (ValueError, StateError) as error:
                raise CheckpointError(f"{path}: {error}") from error
        return state

    def _held(self) -> _Held:
        return _Held(self._lock)


class _Held:
    """Holds a state for one user; StateError if it has one already."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise StateError(
                "this state is in use by a generate() that has not ended: read it to its end, "
                "close() it, or fork() the state before"
            )

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _token_ids(path: Path, ids: npt.NDArray[Any], vocab: int) -> list[int]:
    if ids.dtype != np.int32 or ids.ndim != 1:
        raise CheckpointError(
            f"{path}: tensor tokens is {_DTYPES[ids.dtype]} {list(ids.shape)}, expected I32 [n]"
        )
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab:
        raise CheckpointError(f"{path}: tensor tokens holds ids that are not below {vocab}")
    result: list[int] = ids.tolist()
    return result


def _read(tensor: Tensor) -> npt.NDArray[Any]:
    if tensor.dtype not in _NUMPY:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} is {tensor.dtype}, expected "
            f"{', '.join(_NUMPY)}: not a state that flashmoe saved"
        )
    dtype = _NUMPY[tensor.dtype]
    count = tensor.nbytes // dtype.itemsize
    array = np.fromfile(tensor.file, dtype, count, offset=tensor.offset)
    return array.reshape(tensor.shape)
