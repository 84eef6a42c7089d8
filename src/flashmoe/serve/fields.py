"""Fields of a request's JSON, read one by one: what is wrong is said with the field's name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

_MISSING = object()


class RequestError(Exception):
    """A request that is not answered.

    Attributes:
        message: for the client's author.
        param: the field that is wrong, such as "messages[0].content"; None for the whole request.
        status: of HTTP.
        code: a word for programs, if there is one.
    """

    def __init__(
        self, message: str, param: str | None = None, *, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code


class TooLongError(RequestError):
    """A prompt of more tokens than the context holds, which each API says in its own words."""

    def __init__(self, tokens: int, context: int) -> None:
        super().__init__(f"the prompt has {tokens} tokens, and the context holds {context}")
        self.tokens = tokens
        self.context = context


class Fields:
    """A JSON object. A field that is null is as good as absent.

    Each method gives the value of a field of one type, and None where the field is absent (but for
    those that begin with `needed`). It raises a RequestError with the field's name if it is wrong.

    Args:
        value: what should be an object.
        where: its own name within the request; "" for the request.
    """

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, Mapping):
            raise RequestError(
                f"{where or 'the body'} must be an object; got {_shown(value)}", where or None
            )
        self.value: Mapping[str, Any] = value
        self.where = where

    def name(self, key: str) -> str:
        """A field's name within the request."""
        return f"{self.where}.{key}" if self.where else key

    def wrong(self, key: str, expected: str) -> RequestError:
        """The error for a field that is not what is expected."""
        name = self.name(key)
        if self.value.get(key) is None:
            return RequestError(f"{name}: field required; it must be {expected}", name)
        return RequestError(f"{name} must be {expected}; got {_shown(self.value[key])}", name)

    def __contains__(self, key: str) -> bool:
        return self.value.get(key) is not None

    def text(self, key: str) -> str | None:
        value = self.value.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def needed_text(self, key: str) -> str:
        value = self.text(key)
        if value is None:
            raise self.wrong(key, "text")
        return value

    def choice(self, key: str, choices: Collection[str]) -> str | None:
        value = self.value.get(key)
        if value is not None and not (isinstance(value, str) and value in choices):
            raise self.wrong(key, f"one of {', '.join(choices)}")
        return value

    def flag(self, key: str) -> bool | None:
        value = self.value.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def number(self, key: str, least: float, most: float) -> float | None:
        value = self.value.get(key)
        if value is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not least <= value <= most:
            raise self.wrong(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def whole(self, key: str, least: int | None = None, most: int | None = None) -> int | None:
        value = self.value.get(key)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        expected = "a whole number"
        if least is not None:
            expected += f", {least} or more" if most is None else f" from {least} to {most}"
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(key, expected)
        if (least is not None and value < least) or (most is not None and value > most):
            raise self.wrong(key, expected)
        return value

    def items(self, key: str) -> list[Any] | None:
        value = self.value.get(key)
        if value is not None and not isinstance(value, list):
            raise self.wrong(key, "a list")
        return value

    def texts(self, key: str) -> list[str] | None:
        """A list of texts; one that stands alone is taken too."""
        value = self.value.get(key)
        if value is None:
            return None
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            raise self.wrong(key, "a text, or a list of texts, none of them empty")
        return values

    def object(self, key: str) -> Fields | None:
        value = self.value.get(key)
        return None if value is None else Fields(value, self.name(key))

    def needed_object(self, key: str) -> Fields:
        if key not in self:
            raise self.wrong(key, "an object")
        return Fields(self.value[key], self.name(key))

    def objects(self, key: str) -> Iterator[Fields]:
        """The objects of a list; none where it is absent."""
        for number, value in enumerate(self.items(key) or ()):
            yield Fields(value, f"{self.name(key)}[{number}]")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
