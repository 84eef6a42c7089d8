"""What callers of a model give, checked and made into what the rest works with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.errors import ArgumentError, CheckpointError
from flashmoe.generate.sampling import Sampling
from flashmoe.generate.text import TextStream


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_count(name: str, value: int | None, least: int, most: int | None = None) -> None:
    if value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"at least {least}" + ("" if most is None else f", at most {most}")
        raise ArgumentError(f"{name} must be None or a whole number, {limits}; got {value!r}")


def ids_of(checkpoint: Checkpoint, prompt: str | Iterable[int]) -> list[int]:
    """A prompt's ids."""
    if isinstance(prompt, str):
        return checkpoint.encode(prompt)
    vocab = checkpoint.config.vocab_size
    if not isinstance(prompt, Iterable) or isinstance(prompt, (bytes, bytearray)):
        raise ArgumentError(f"a prompt is text or a sequence of ids; got {prompt!r}")
    ids = [int(i) if isinstance(i, np.integer) else i for i in prompt]
    for i in ids:
        if type(i) is not int:
            raise ArgumentError(f"a prompt is text or a sequence of ids; it holds {i!r}")
        if not 0 <= i < vocab:
            raise ArgumentError(f"token id {i} is not in the vocabulary of {vocab}")
    return ids


def ends_of(
    checkpoint: Checkpoint, more: int | str | Iterable[int | str], *, ignored: bool
) -> frozenset[int]:
    """The tokens that end a sequence: the checkpoint's, unless they are ignored, and `more`."""
    ids = list(() if ignored else checkpoint.eos_token_ids)
    for token in (more,) if isinstance(more, (int, str)) else more:
        found = checkpoint.tokenizer.id_of(token) if isinstance(token, str) else token
        if type(found) is not int or not 0 <= found < checkpoint.config.vocab_size:
            raise ArgumentError(
                f"eos names tokens of the model, by id or as they are written; got {token!r}"
            )
        ids.append(found)
    return frozenset(ids)


def stream_of(checkpoint: Checkpoint, stop: str | Iterable[str] | None) -> TextStream | None:
    """None for a checkpoint without a tokenizer, which runs on ids and gives no text."""
    if stop is None and not checkpoint.has_tokenizer:
        return None
    return TextStream(checkpoint.tokenizer, stop)


def sampling_of(checkpoint: Checkpoint) -> Sampling:
    """What generation_config.json says, to be overridden call by call."""
    try:
        return Sampling.from_generation_config(checkpoint.metadata.generation)
    except ArgumentError as error:
        path = checkpoint.directory / "generation_config.json"
        raise CheckpointError(f"{path}: {error}") from error


def variables_of(given: Mapping[str, Any] | None, think: bool | None) -> dict[str, Any]:
    """A template's variables, with the family's word for thinking."""
    return dict(given or {}) | ({} if think is None else {"enable_thinking": think})
