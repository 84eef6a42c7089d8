"""What a sequence carries from token to token, as a value that can be kept, copied and stored."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from flashmoe.errors import CheckpointError, StateError, printable
from flashmoe.generate.state_file import StateFile, write_state
from flashmoe.machine.files import to_path

if TYPE_CHECKING:
    from flashmoe import _native
    from flashmoe.generate.engine import Engine


class _Model(Protocol):
    """What of a `Model` loading a state needs."""

    context: int

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
        path = to_path(path)
        with self._held():
            tensors: dict[str, npt.NDArray[Any]] = {
                "tokens": np.array(self._tokens, np.int32),
                **self._native.export(),
            }
            computed = self._native.position
        write_state(
            path,
            {
                "model": self._engine.checkpoint.fingerprint,
                "source": printable(self._engine.checkpoint.source, 200),
                "experts_per_token": str(self._engine.setting.experts_per_token),
                "precision": self._engine.setting.precision,
                "computed": str(computed),
            },
            tensors,
        )

    @classmethod
    def load(cls, model: _Model, path: str | os.PathLike[str]) -> State:
        """The state that `save` wrote, to go on with the same model.

        Raises:
            CheckpointError: not such a file, damaged, or written by another version of flashmoe.
            StateError: it belongs to another model, other routing or another precision, or holds
                more tokens than the model's context.
            OutOfMemoryError: there is no memory for it.
        """
        engine = model._engine
        with StateFile(to_path(path)) as file:
            _check_belongs(file, model)
            # What it must hold is known before a byte of it is read.
            native = engine.native.new_state()
            file.require(engine.native.state_layout(file.computed))
            tensors = file.read()
        ids, vocab = tensors.pop("tokens"), engine.checkpoint.config.vocab_size
        if len(ids) and not 0 <= ids.min() <= ids.max() < vocab:
            raise CheckpointError(f"{file.path}: tensor tokens holds ids not below {vocab}")
        native.restore(file.computed, tensors)
        return cls(engine, native, ids.tolist())

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


def _check_belongs(file: StateFile, model: _Model) -> None:
    """Raises StateError where a file is of another model, or of one opened in another way."""
    checkpoint, setting = model._engine.checkpoint, model._engine.setting
    if file.text("model") != checkpoint.fingerprint:
        raise StateError(
            f"{file.path}: saved from another model ({file.text('source')[:200]!r}), not from "
            f"{checkpoint.source}; open that one, or compute the prompt again"
        )
    for name in ("experts_per_token", "precision"):
        if file.text(name) != str(getattr(setting, name)):
            raise StateError(
                f"{file.path}: computed with {name}={file.text(name)[:40]!r}, this model runs "
                f"{getattr(setting, name)}; open the model with the former"
            )
    if file.tokens > model.context:
        raise StateError(
            f"{file.path}: holds {file.tokens} tokens, and the context of this model "
            f"{model.context}; open the model with a larger one"
        )
