"""JSON files of a checkpoint: read with a limit on size, refused when damaged or ambiguous."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from flashmoe.errors import CheckpointError
from flashmoe.machine.files import read_file


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """The JSON object that a file of at most `limit` bytes holds.

    Raises:
        CheckpointError: see read_file and parse_object.
    """
    return parse_object(read_file(path, limit), str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`; `where` begins the message of an error.

    Raises:
        CheckpointError: not UTF-8, not JSON, not an object, a key that occurs twice.
    """
    try:
        text = data.decode("utf-8-sig")  # editors of Windows begin a file with a mark
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
