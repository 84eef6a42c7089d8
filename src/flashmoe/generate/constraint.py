"""Answers that follow a structure: which tokens may come next. The one place for llguidance."""

from __future__ import annotations

import math
import string
import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.tokenizer import Tokenizer
from flashmoe.errors import ArgumentError, CheckpointError
from flashmoe.generate.dialect import CALL, END_CALL, END_THINK, GAP, Dialect, Line
from flashmoe.generate.grammar import ToolGrammar, json_rule
from flashmoe.generate.text import TextStream, piece_bytes
from flashmoe.generate.tools import ToolSpec, chosen

if TYPE_CHECKING:
    import llguidance

Floats = npt.NDArray[np.float32]
COMPILED = 64
"""Grammars that are kept compiled, of each tokenizer."""

ENDS_TEXT = ("\n</parameter>\n", '"')
ENDS_JSON = ("}", "]", '"', ",", ":")
OTHERS = (*string.digits, *string.punctuation, *string.ascii_letters, " ", "\n")
"""What ends an answer the shortest way: the first that may come, wherever nothing is forced. Of the
others, which patterns ask for, the least used one, so that a repetition is left."""

SPARE = 64
"""Tokens that a hurried ending may leave unused, or an eighth of all if that is less: one more
token may begin a part that takes many to complete."""

MASKS = 1024
"""Masks that are kept, of each tokenizer; 31 kB each at 248,320."""

LONGEST_ENDING = 4096
"""Tokens of it, at most: looking for one that is longer takes milliseconds."""

_pool = ThreadPoolExecutor(1, "flashmoe-grammars")


class Grammars:
    """What llguidance makes of a checkpoint's tokenizer, and the grammars compiled for it.

    Attributes:
        marks: ids of the markup that is one token.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: Sequence[int]) -> None:
        try:
            import llguidance  # noqa: PLC0415
        except ImportError:
            raise ArgumentError(
                "answers that follow a schema or a grammar need llguidance: "
                "pip install 'flashmoe[chat]'"
            ) from None
        self._library = llguidance
        library = tokenizer.library
        # Text in a call is rarely more than letters: one check instead of a walk over all tokens.
        plain = r'[^"\\\x00-\x1F\x7F]'
        slices = [rf"{plain}{{1,{most}}}" for most in (5, 10, 15, 20, 30)]
        slices = [r"[\x20\x0A\x0D\x09]+", *slices, f"{plain}+", r"[^\n<]{1,40}"]
        try:
            self._tokenizer = llguidance.LLTokenizer(
                library.to_str(), n_vocab=vocab_size, eos_token=list(eos) or None, slices=slices
            )
        except Exception as error:  # the library raises whatever it has
            raise CheckpointError(
                f"the tokenizer cannot be used for constrained answers: {error}"
            ) from error
        self.vocab_size = vocab_size

        def ids(texts: Sequence[str]) -> list[list[int]]:
            return [library.encode(text, add_special_tokens=False).ids for text in texts]

        (self._any_text,) = ids("~")
        self._ends_text, self._ends_json, self._others = ids(ENDS_TEXT), ids(ENDS_JSON), ids(OTHERS)
        marks = {mark: library.token_to_id(mark) for mark in (CALL, END_CALL, END_THINK)}
        self.marks = {mark: id for mark, id in marks.items() if id is not None}
        self._others += [[id] for id in self.marks.values()]
        self._added = [t.content for t in library.get_added_tokens_decoder().values()]

        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._masks: OrderedDict[Hashable, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: str, what: str) -> llguidance.LLMatcher:
        """A fresh matcher.

        Raises:
            ArgumentError: the grammar is not valid or cannot be enforced; begins with `what`.
        """
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
        if found is None:
            found = self._compile(grammar)
            if found.is_error():
                reason = found.get_error().partition("\n<state>")[0].strip()
                raise ArgumentError(f"{what} cannot be enforced: {reason}")
            with self._lock:
                self._compiled[grammar] = found
                while len(self._compiled) > COMPILED:
                    self._compiled.popitem(last=False)
        return found.deep_copy()

    def mask(self, matcher: llguidance.LLMatcher, place: Hashable | None) -> bytes:
        """A bit for each token, whether it may come; by `place` it is known again."""
        if place is None:
            return matcher.compute_bitmask()
        with self._lock:
            known = self._masks.get(place)
            if known is None:
                known = self._masks[place] = matcher.compute_bitmask()
                while len(self._masks) > MASKS:
                    self._masks.popitem(last=False)
            return known

    def ending(self, matcher: llguidance.LLMatcher, most: int) -> list[int] | None:
        """Tokens that complete the structure, about as few as can be; None if more than `most`."""
        matcher = matcher.deep_copy()
        tokens: list[int] = []

        def fits(way: list[int]) -> bool:
            return bool(way) and matcher.validate_tokens(way) == len(way)

        while not matcher.is_accepting():
            closers = self._ends_text if fits(self._any_text) else self._ends_json
            way = next(filter(fits, [matcher.compute_ff_tokens(), *closers]), None)
            if way is None:
                others = sorted(self._others, key=lambda other: tokens.count(other[0]))
                way = next(filter(fits, others), None)
            if way is None or len(tokens) + len(way) > most or not matcher.consume_tokens(way):
                return None
            tokens += way
        return tokens

    def writable(self, schema: Mapping[str, Any]) -> bool:
        """Whether a tool's schema can be enforced, at least leniently."""
        return not self._compile(f"start: {json_rule(schema, lenient=True)}").is_error()

    def regex(self, pattern: str) -> str:
        """A regular expression as an expression of a grammar."""
        return f"/{self._library.regex_to_lark(pattern)}/"

    def _compile(self, grammar: str) -> llguidance.LLMatcher:
        # A text that the grammar forces would be looked up as the added token that it also is,
        # and then not be accepted as that token.
        if any(content in grammar for content in self._added):
            grammar = '%llguidance {"no_forcing": true}\n' + grammar
        return self._library.LLMatcher(self._tokenizer, grammar, log_level=0)


_grammars: weakref.WeakKeyDictionary[Tokenizer, Future[Grammars]] = weakref.WeakKeyDictionary()
_grammars_lock = threading.Lock()


def prepare(checkpoint: Checkpoint) -> Future[Grammars]:
    """Begins to build what constraints need, a second or two once a checkpoint, in a thread."""
    tokenizer = checkpoint.tokenizer
    with _grammars_lock:
        future = _grammars.get(tokenizer)
        if future is None or (future.done() and future.exception() is not None):
            vocab, eos = checkpoint.config.vocab_size, checkpoint.eos_token_ids
            future = _pool.submit(Grammars, tokenizer, vocab, eos)
            _grammars[tokenizer] = future
        return future


class Values:
    """Where a call in XML form stands, in bytes, if that is where a line of a text begins.

    There nearly any token may come, which takes llguidance a walk over all of them: 4 ms at
    248,320, three times for each value. So these masks are kept. Whatever came before, they depend
    on the parameter and those of its tool alone, since parameters have one order.

    Args:
        texts: by tool and parameter, what tells these apart.
    """

    def __init__(self, texts: Mapping[tuple[str, str], str]) -> None:
        self._texts = {tuple(map(str.encode, names)): text for names, text in texts.items()}
        self._tool = self._parameter = self._line = b""
        self._first = False

    @property
    def place(self) -> Hashable | None:
        """The same wherever the same tokens may come; None for most places."""
        if self._first or not b"</parameter>".startswith(self._line):
            return None
        text = self._texts.get((self._tool, self._parameter))
        return None if text is None else (text, self._line)

    def feed(self, data: bytes) -> None:
        """Goes past a token's bytes."""
        first, *others = data.split(b"\n")
        self._extend(first)
        for part in others:
            self._first = False
            if self._parameter:
                if self._line == b"</parameter>":
                    self._parameter = b""
            elif self._line.startswith(b"<parameter="):
                self._parameter, self._first = self._line[len(b"<parameter=") : -1], True
            elif self._line.startswith(b"<function="):
                self._tool = self._line[len(b"<function=") : -1]
            self._line = b""
            self._extend(part)

    def _extend(self, part: bytes) -> None:
        if len(self._line) < 2048:  # longer than any tag
            self._line += part


class Constraint:
    """Which tokens may come next in one answer.

    `mask` before a token is drawn and `advance` after it, for every token.

    Attributes:
        finished: whether the structure is complete and nothing can follow but the end.
        hurried: whether it was brought to its end because few tokens were left: open strings and
            lists were closed where they were, and what was still required got a least value.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        eos: Sequence[int] = (),
        grammars: Grammars | None = None,
        values: Values | None = None,
        structure: llguidance.LLMatcher | None = None,
        call: llguidance.LLMatcher | None = None,
        end_think: int | None = None,
        marks: Mapping[str, int],
        many: bool = True,
    ) -> None:
        self.finished = self.hurried = False
        self._tokenizer = tokenizer
        self._grammars = grammars
        self._values = values
        self._ending: list[int] = []
        self._look: float = math.inf  # how few tokens are left when the ending is looked for
        self._eos = list(eos)
        self._marks = marks
        self._structure = structure
        self._call = call
        self._many = many  # whether another call may follow one in free text
        self._end_think = end_think  # while reasoning
        self._gap: list[int] = []
        self._matcher: llguidance.LLMatcher | None = None
        self._stream, self._line = TextStream(tokenizer), Line()
        if end_think is None and structure is not None:
            self._matcher = structure

    def mask(self, logits: Floats, left: int | None = None) -> Floats:
        """The logits [vocab], with minus infinity where a token must not come. A new array.

        Args:
            left: how many tokens may still come. Before they run out the structure is completed,
                if they suffice.
        """
        if self._matcher is not None and left is not None and left <= self._look:
            self._hurry(self._matcher, left)
        forced = self._gap or self._ending
        if forced:
            masked = np.full_like(logits, -np.inf)
            masked[forced[0]] = logits[forced[0]]
            return masked
        if self._matcher is not None:
            assert self._grammars is not None
            place = self._values.place if self._values is not None else None
            bits = np.frombuffer(self._grammars.mask(self._matcher, place), np.uint8)
            allowed = np.unpackbits(bits, count=len(logits), bitorder="little").view(np.bool_)
            # A fifth of the time of numpy.where at 248,320.
            if 2 * np.count_nonzero(allowed) > len(logits):
                masked = logits.copy()
                masked[~allowed] = -np.inf
            else:
                masked = np.full_like(logits, -np.inf)
                np.copyto(masked, logits, where=allowed)
            return masked
        banned = self._banned
        if not banned:
            return logits
        masked = logits.copy()
        masked[banned] = -np.inf
        return masked

    def _hurry(self, matcher: llguidance.LLMatcher, left: int) -> None:
        assert self._grammars is not None
        ending = self._grammars.ending(matcher, min(left - 1, LONGEST_ENDING))
        if self._look == math.inf:
            self._spare = min(SPARE, left // 8)
        spare = -1 if ending is None else left - 1 - len(ending)
        if 0 <= spare <= self._spare:
            self._ending, self._look, self.hurried = [*(ending or []), *self._eos[:1]], -1, True
        else:  # the ending may grow by some tokens with each
            self._look = left - max(1, (spare - self._spare) // 8)

    def advance(self, token: int) -> None:
        """A token was drawn.

        Raises:
            ArgumentError: the mask forbade it, or the structure became too complex to follow.
        """
        if self._matcher is not None:
            if self._ending:
                self._ending.pop(0)
            self._follow(self._matcher, token)
        elif self._end_think is not None:
            if token == self._end_think:
                self._end_think = None
                if self._structure is not None:
                    self._gap = self._tokenizer.encode(GAP, special=False)
        elif self._gap:
            self._gap.pop(0)
            if not self._gap:
                self._matcher = self._structure
        else:
            opens = token == self._marks.get(CALL) and self._line.blank and not self._line.code
            if opens and self._call is not None:
                self._matcher = self._call.deep_copy()
                self._follow(self._matcher, token)
            else:
                self._line.feed(self._stream.push(token))

    @property
    def _banned(self) -> list[int]:
        if self._structure is not None:  # it is still to come
            return self._eos
        return [self._marks[CALL]] if self._call is None and CALL in self._marks else []

    def _follow(self, matcher: llguidance.LLMatcher, token: int) -> None:
        if self._values is not None:
            self._values.feed(piece_bytes(self._tokenizer.piece(token)))
        if not matcher.consume_token(token):
            reason = matcher.get_error().partition("\n<state>")[0].strip()
            raise ArgumentError(
                f"the answer cannot go on by its schema or grammar, try a simpler one: {reason}"
            )
        if matcher is self._structure:
            self.finished = matcher.is_stopped()
        elif matcher.is_stopped():  # a call in free text
            self._matcher, self._line, self._look = None, Line(), math.inf
            if not self._many:
                self._call = None


def constraint_of(
    checkpoint: Checkpoint,
    *,
    schema: Mapping[str, Any] | None = None,
    json_object: bool = False,
    regex: str | None = None,
    grammar: str | None = None,
    tools: Sequence[ToolSpec] = (),
    tool_choice: Any = "auto",
    parallel_tool_calls: bool = True,
    dialect: Dialect,
    in_reasoning: bool = False,
) -> Constraint | None:
    """What an answer must follow, or None where it is free.

    The structure begins when the reasoning ends. Tools that may be called, but need not be, are
    constrained from where a call opens; beside a schema the answer is either.

    Args:
        schema: the answer is JSON that follows this JSON schema.
        json_object: the answer is a JSON object.
        regex: the answer matches this regular expression, whole.
        grammar: the answer follows this Lark grammar, from its rule `start`.
        tools, tool_choice: see `tools.chosen`. "none" forbids the opening of a call.
        in_reasoning: whether the prompt ends inside of reasoning.
    Raises:
        ArgumentError: two structures at once, one that cannot be enforced, or llguidance is absent.
    """
    answers = {"schema": schema, "json_object": json_object or None, "regex": regex}
    given = [name for name, value in (answers | {"grammar": grammar}).items() if value is not None]
    if len(given) > 1:
        raise ArgumentError(f"give one of {' and '.join(given)}")
    offered, must = chosen(tools, tool_choice)
    if must and dialect.calls is None:
        raise ArgumentError("the checkpoint's chat template knows no tools")
    if must and given:
        raise ArgumentError(f"{given[0]} and a tool that must be called exclude one another")
    if grammar is not None and offered:
        raise ArgumentError('a grammar and tools exclude one another; or give tool_choice="none"')
    calls = offered if dialect.calls is not None else ()
    tokenizer = checkpoint.tokenizer
    if not given and not calls:
        mark = tokenizer.library.token_to_id(CALL)
        if not tools or mark is None or dialect.calls is None:
            return None
        return Constraint(tokenizer, marks={CALL: mark})
    try:
        grammars = prepare(checkpoint).result()
    except ArgumentError:
        if given or must:
            raise
        return None  # without llguidance calls are as good as the model
    structure, call, values = None, None, None
    if grammar is not None:
        structure = grammars.matcher(_checked_text("grammar", grammar), "grammar")
    else:
        rule = _rule(grammars, schema, json_object, regex)
        if calls:
            written = ToolGrammar(calls, dialect, grammars.marks, grammars.writable)
            many = "call" if not parallel_tool_calls else 'call ("\\n" call)*'
            if rule is not None:
                structure = grammars.matcher(written.text(f"({rule}) | {many}"), given[0])
            elif must:
                structure = grammars.matcher(written.text(many), "tools")
                values = Values(written.texts)
            elif CALL in grammars.marks:
                call = grammars.matcher(written.text("call"), "tools")
                values = Values(written.texts)
            else:
                return None
        else:
            structure = grammars.matcher(f"start: {rule}", given[0])
    end_think = None
    if in_reasoning:
        end_think = grammars.marks.get(END_THINK)
        if end_think is None:
            raise ArgumentError(
                f"{checkpoint.source}: {END_THINK} is no token of its own, so that the end of "
                "reasoning is not known; answers with a structure need think=False"
            )
    return Constraint(
        tokenizer,
        eos=checkpoint.eos_token_ids,
        grammars=grammars,
        values=values,
        structure=structure,
        call=call,
        end_think=end_think,
        marks=grammars.marks,
        many=parallel_tool_calls,
    )


def _rule(
    grammars: Grammars, schema: Mapping[str, Any] | None, json_object: bool, regex: str | None
) -> str | None:
    if schema is not None:
        if not isinstance(schema, Mapping):
            raise ArgumentError(f"schema must be a JSON schema, an object; got {schema!r}")
        try:
            return json_rule(schema)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"schema is not JSON: {error}") from error
    if json_object:
        return json_rule({"type": "object"})
    return grammars.regex(_checked_text("regex", regex)) if regex is not None else None


def _checked_text(name: str, text: Any) -> str:
    if not isinstance(text, str) or not text:
        raise ArgumentError(f"{name} must be text; got {text!r}")
    return text
