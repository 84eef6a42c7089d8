"""JSON files of a checkpoint: read with a limit on size, refused when damaged or ambiguous."""

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from flashmoe.errors import CheckpointError


def regular_file_size(path: Path) -> int:
    """Size in bytes of a regular file; a symbolic link is followed, as hub caches consist of them.

    Raises:
        CheckpointError: nothing is there, or something that reading could hang on (a FIFO, a
            device, a directory, a loop of links).
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is the download complete?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return status.st_size


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """The JSON object that a file of at most `limit` bytes holds.

    Raises:
        CheckpointError: see regular_file_size and parse_object.
    """
    size = regular_file_size(path)
    if size > limit:
        raise CheckpointError(f"{path}: {size} bytes; at most {limit} are believable here")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return parse_object(data, str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`; `where` begins the message of an error.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, a key that occurs twice.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8: {error}") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise CheckpointError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON {type(value).__name__}, expected an object")
    return value


def strict_json(text: str) -> Any:
    """The value of a JSON text that can be written as one again and encoded as UTF-8.

    Raises:
        ValueError: not JSON, nested too deeply, or it holds NaN, a number that is too large, or
            half of a surrogate pair.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:80]} is too large a number")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice[:80]!r} occurs more than once in one object")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")
