"""Jinja templates that come from elsewhere: the one place that touches jinja2.

jinja2's sandbox keeps a template from reaching Python. It does not keep one from computing for ever
or filling memory, and 23 bytes can. Here everything that a template makes is measured, most of it
before it is made: no text and no collection over 16 MB, no integer over 64 bits, a million steps of
loops and calls, a gigabyte handled in all, twenty seconds.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 20
MAX_TEXT = 16 << 20
MAX_STEPS = 1_000_000
MAX_WORK = 1 << 30
MAX_SECONDS = 20
_NODE = 64  # what an element of a collection counts, as so many characters
_CALL = 4  # what a call counts, as so many steps of a loop
_WIDE = re.compile(r"\d{7}")  # a width in a format that no chat needs

# Filters whose time is not bounded by the length of what they are given.
_SLOW = {"urlize", "wordwrap"}

# What makes more than it is given, or has no place in a text.
_REFUSED = {"translate", "maketrans", "to_bytes", "from_bytes"}


class LimitError(Exception):
    """A template does too much."""


class TemplateError(Exception):
    """A template cannot be compiled or rendered; `too_much` where a limit stops it."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{error}" if isinstance(error, LimitError) else _named(error))
        self.too_much = isinstance(error, LimitError)


class Template:
    """A compiled template."""

    def __init__(self, source: str) -> None:
        """Raises TemplateError: not Jinja, or longer than any chat template."""
        try:
            if len(source) > MAX_SOURCE:
                raise LimitError(f"it is longer than {MAX_SOURCE} characters")
            self._template = _environment().from_string(source)
            tree = _environment().parse(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree))
            """What it reads that is to be given to it."""
        except _NOT_OURS:
            raise
        except BaseException as error:
            raise TemplateError(error) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises TemplateError: it refuses, cannot work with these, or does too much."""
        token = _spent.set(_Spent())
        try:
            return self._template.render(variables)
        except _NOT_OURS:
            raise
        # Whatever a template computes with may raise anything.
        except BaseException as error:
            raise TemplateError(error) from error
        finally:
            _spent.reset(token)


_NOT_OURS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def _named(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, jinja2.TemplateError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Spent:
    """What one rendering has used."""

    def __init__(self) -> None:
        self.steps = 0
        self.work = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > MAX_STEPS:
            raise LimitError(f"more than {MAX_STEPS} steps of loops and calls")
        if time.monotonic() > self.deadline:
            raise LimitError(f"more than {MAX_SECONDS} seconds")

    def handle(self, size: int) -> None:
        _require_size(size)
        self.work += size
        if self.work > MAX_WORK:
            raise LimitError(f"more than {MAX_WORK} characters handled in all")


_spent: ContextVar[_Spent] = ContextVar("spent")


def _spend() -> _Spent:
    # While a template is compiled, its constants are computed outside of any rendering.
    return _spent.get(None) or _Spent()


def _require_size(size: int) -> None:
    if size > MAX_TEXT:
        raise LimitError(f"a text or a collection of more than {MAX_TEXT} characters")


def _weigh(value: Any) -> int:
    """Characters of a text, or of all that a collection holds, counted wherever it is held."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, int):
        if value.bit_length() > 64:
            raise LimitError("an integer of more than 64 bits")
        return 0
    total, todo = 0, [value]
    while todo:
        value = todo.pop()
        if isinstance(value, (str, bytes)):
            total += len(value)
        elif isinstance(value, Namespace):
            todo.append(getattr(value, "_Namespace__attrs"))  # noqa: B009  (a name of its own)
        elif isinstance(value, Mapping):
            total += _NODE * len(value)
            _require_size(total)
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            total += _NODE * len(value)
            _require_size(total)
            todo += value
        _require_size(total)
    return total


def _made(value: Any) -> Any:
    """The value, once it is known to be within limits."""
    _spend().handle(_weigh(value))
    return value


def _require_width(*widths: Any) -> None:
    for width in widths:
        if isinstance(width, int) and abs(width) > 10_000:
            raise LimitError(f"a width or count of {width}")


def _check_format(pattern: Any) -> None:
    # "%*d" and "{:{}}" take widths from their arguments.
    text = str(pattern)
    if _WIDE.search(text) or ("*" in text and "%" in text) or re.search(r"\{[^{}]*\{", text):
        raise LimitError("a format of a width that cannot be told or is too large")


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any) -> None:
    text, old, new = str(text), str(old), str(new)
    _require_size(len(text) + text.count(old) * len(new))


def _check_join(separator: Any, items: list[Any]) -> None:
    _require_size(_weigh(items) + len(str(separator)) * len(items))


def _check_indent(text: Any, width: Any, *_: Any) -> None:
    _require_width(width)
    size = width if isinstance(width, int) else len(str(width))
    text = str(text)
    _require_size(len(text) + (text.count("\n") + 1) * size)


_FILTER_CHECKS: dict[str, Callable[..., None]] = {
    "batch": lambda value, count, *_: _require_width(count),
    "center": lambda value, width: _require_width(width),
    "format": lambda value, *_: _check_format(value),
    "indent": _check_indent,
    "replace": _check_replace,
    "round": lambda value, precision, *_: _require_width(precision),
    "slice": lambda value, count, *_: _require_width(count),
}


def _looped(value: Any) -> list[Any]:
    """What a loop goes through."""
    known = hasattr(value, "__len__")
    if known:
        _spend().step(len(value))
    items = list(itertools.islice(value, MAX_STEPS + 1))
    _spend().step(0 if known else len(items))
    return items


def _concatenated(*values: Any) -> str:
    """What `~` makes."""
    texts = [str(value) for value in values]
    _spend().handle(sum(map(len, texts)))
    return "".join(texts)


class _Environment(ImmutableSandboxedEnvironment):
    # None of them is folded while compiling: each comes through call_binop.
    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    intercepted_unops = frozenset(("+", "-"))
    # What _Measured has the template call.
    measured = staticmethod(_made)
    looped = staticmethod(_looped)
    concatenated = staticmethod(_concatenated)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        result: nodes.Template = _Measured().visit(tree)
        return result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _spend().step(0)
        if operator == "*":
            if isinstance(left, int) and isinstance(right, int):
                if left.bit_length() + right.bit_length() > 66:
                    raise LimitError("an integer of more than 64 bits")
            else:
                count, many = (left, right) if isinstance(left, int) else (right, left)
                if isinstance(count, int) and not isinstance(many, float):
                    size = _weigh(many) + (len(many) if hasattr(many, "__len__") else 0)
                    _require_size(count * size)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if right * (abs(left).bit_length() - 1) > 64:
                raise LimitError("an integer of more than 64 bits")
        elif operator == "+" and not isinstance(left, (int, float)):
            _require_size(_weigh(left) + _weigh(right))
        elif operator == "%" and isinstance(left, (str, bytes)):
            _check_format(left)
        return _made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        if any(__obj is ours for ours in _OURS):
            return __obj(*args)
        _spend().step(_CALL)
        if isinstance(__obj, LoopContext):
            args = (_looped(args[0]), *args[1:])
        args = _checked_arguments(__obj, args, kwargs)
        return _made(super().call(__context, __obj, *args, **kwargs))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """A template's output, or that of a block of it."""
        kept, total = [], 0
        for part in parts:
            total += len(part)
            _require_size(total)
            kept.append(part)
        _spend().handle(total)
        return "".join(kept)


class _Generation(jinja2.ext.Extension):
    """transformers' {% generation %}, which marks for training what an assistant says."""

    tags = {"generation"}  # noqa: RUF012  (as the class that it extends has it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Measured(NodeTransformer):
    """Has what a template builds measured, and its loops counted."""

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._through("measured", [node])

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return node if node.ctx != "load" else self._through("measured", [node])

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._through("measured", [node])

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._through("concatenated", node.nodes)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = self._through("looped", [node.iter])
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        _weigh(node.value)
        return node

    def _through(self, name: str, arguments: list[Any]) -> nodes.Call:
        function = nodes.EnvironmentAttribute(name)
        return nodes.Call(
            function, arguments, [], None, None, lineno=getattr(arguments[0], "lineno", 1)
        )


def _checked_arguments(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a call of a method of a text or a number; LimitError where it makes much."""
    method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if name in _REFUSED or (isinstance(owner, bytes) and name != "decode"):
        raise LimitError(f"the method {name}, which no chat template needs")
    if not isinstance(owner, str):
        return args
    if name in ("format", "format_map"):
        _check_format(owner)
    elif name == "replace":
        _check_replace(owner, *args)
    elif name == "join" and args:
        items = list(itertools.islice(args[0], MAX_STEPS))
        _check_join(owner, items)
        return (items, *args[1:])
    elif name == "expandtabs":
        _require_width(*args)
        _require_size(len(owner) + owner.count("\t") * int((*args, 8)[0]))
    elif name in ("center", "ljust", "rjust", "zfill"):
        _require_width(*args)
    return args


def _measured_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2's that is refused where it makes too much."""
    before = 1 if hasattr(function, "jinja_pass_arg") else 0
    check = _FILTER_CHECKS.get(name)
    bind = inspect.signature(function).bind

    @functools.wraps(function)
    def measured(*args: Any, **kwargs: Any) -> Any:
        value: Any = args[before] if len(args) > before else None
        _spend().step(1 + (len(value) if isinstance(value, (list, tuple, Mapping)) else 0))
        if check is not None:
            # By their names, whether or not the template gave them so.
            given = bind(*args, **kwargs)
            given.apply_defaults()
            check(*given.args[before:])
        if name == "join":
            separator = kwargs.get("d", args[before + 1] if len(args) > before + 1 else "")
            value = list(itertools.islice(value, MAX_STEPS))
            _check_join(separator, value)
            args = (*args[:before], value, *args[before + 1 :])
        result = function(*args, **kwargs)
        return _counted(result) if isinstance(result, Iterator) else _made(result)

    return measured


def _counted(items: Iterator[Any]) -> Iterator[Any]:
    for item in items:
        _spend().step()
        yield _made(item)


_OURS = (_made, _looped, _concatenated)


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _Generation],
        optimized=False,
        finalize=_emitted,
        cache_size=0,
    )
    environment.filters = {
        name: _measured_filter(name, function)
        for name, function in environment.filters.items()
        if name not in _SLOW
    }
    environment.filters["tojson"] = _tojson
    del environment.globals["lipsum"]
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _emitted(value: Any) -> str:
    """What an expression puts out, as text."""
    text = value if isinstance(value, str) else str(_made(value))
    _spend().handle(len(text))
    return text


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which a model never saw in training.
    _require_width(indent)
    _spend().step()
    _made(value)
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return _Environment.concat(encoder.iterencode(value))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
