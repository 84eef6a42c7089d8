"""`flashmoe eval`: how well a model predicts a text and answers prompts; what a setting changes.

Every number comes with a 95 % interval: of a proportion Wilson's, of a mean over tokens a bootstrap
over blocks of 128 tokens, since neighbouring tokens are alike.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from flashmoe.checkpoint.json import strict_json
from flashmoe.errors import ArgumentError

if TYPE_CHECKING:
    from flashmoe.generate.model import Model

WINDOW = 1024
BLOCK = 128
RESAMPLES = 1000
Floats = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % interval."""

    value: float
    low: float
    high: float

    def map(self, function: Callable[[float], float]) -> Estimate:
        """An increasing function of the value, and its interval."""
        return Estimate(function(self.value), function(self.low), function(self.high))


def proportion(successes: int, trials: int) -> Estimate:
    """Wilson's score interval (1927), which holds near 0 and 1 and for few trials."""
    z = 1.959964
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    spread /= 1 + z * z / trials
    return Estimate(share, max(0.0, centre - spread), min(1.0, centre + spread))


def mean(values: npt.ArrayLike, block: int = BLOCK) -> Estimate:
    """The mean of values [n] that are alike in their neighbourhood; a block bootstrap, seed 0."""
    values = np.asarray(values, np.float64)
    starts = np.arange(0, len(values), block)
    sums = np.add.reduceat(values, starts)
    sizes = np.diff([*starts, len(values)])
    drawn = np.random.default_rng(0).integers(0, len(sums), (RESAMPLES, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))


def read_text(path: Path, nbytes: int | None = None) -> str:
    """A UTF-8 text, or its first `nbytes`; ArgumentError where it is none."""
    try:
        data = path.read_bytes()[:nbytes]
        # A character that the limit cuts is left out; anything else that is not UTF-8 is an error.
        return codecs.getincrementaldecoder("utf-8")().decode(data, final=nbytes is None)
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path}: not a text to read: {error}") from error


class Predictor(Protocol):
    """What predicts a text: a `Model`, or something that remembers what one said."""

    def logits(self, ids: Sequence[int], /) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True)
class TextScore:
    """How a model predicts each token of a text.

    Attributes:
        nats: float64 [tokens], minus the logarithm of the probability that the token had.
        nbytes: of these tokens.
        kl: float64 [tokens], KL divergence from the reference in nats; None without a reference.
        agreement: bool [tokens], whether both find the same token likeliest.
    """

    nats: Floats
    nbytes: int
    kl: Floats | None = None
    agreement: npt.NDArray[np.bool_] | None = None

    @property
    def bits_per_byte(self) -> Estimate:
        scale = len(self.nats) / self.nbytes / math.log(2)
        return mean(self.nats).map(lambda nats: nats * scale)

    @property
    def perplexity(self) -> Estimate:
        """Per token: only comparable between models of one tokenizer."""
        return mean(self.nats).map(math.exp)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for `--json`."""
        result: dict[str, Any] = {
            "tokens": len(self.nats),
            "bytes": self.nbytes,
            "bits_per_byte": vars(self.bits_per_byte),
            "perplexity": vars(self.perplexity),
        }
        if self.kl is not None and self.agreement is not None:
            result["kl"] = vars(mean(self.kl))
            result["agreement"] = vars(mean(self.agreement))
        return result


def score_text(
    model: Model,
    text: str,
    *,
    reference: Predictor | None = None,
    window: int = WINDOW,
    progress: Progress | None = None,
) -> TextScore:
    """Reads a text in windows, each from an empty state, and scores every token but the first.

    Args:
        reference: what to compare with; of the same vocabulary.
        window: tokens that are predicted from one state. The longer, the more context they have;
            logits take 4 bytes x window x vocabulary.
        progress: called with (tokens scored, tokens in all).
    Raises:
        ArgumentError: fewer than two tokens, or a window that the context does not hold.
    """
    ids, second = model.checkpoint.tokenizer.encode_from(text)
    if len(ids) < 2:
        raise ArgumentError("the text to score has fewer than two tokens")
    if not 1 <= window <= model.context:
        raise ArgumentError(f"a window of {window} tokens; the context holds {model.context}")
    nats, kl, agreement = [], [], []
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window + 1]
        ours = log_softmax(model.logits(part[:-1]))
        nats.append(-ours[np.arange(len(part) - 1), part[1:]].astype(np.float64))
        if reference is not None:
            theirs = log_softmax(reference.logits(part[:-1]))
            kl.append((np.exp(theirs) * (theirs - ours)).sum(axis=1, dtype=np.float64))
            agreement.append(theirs.argmax(axis=1) == ours.argmax(axis=1))
        if progress is not None:
            progress(start + len(part) - 1, len(ids) - 1)
    return TextScore(
        np.concatenate(nats),
        len(text[second:].encode()),
        np.concatenate(kl) if kl else None,
        np.concatenate(agreement) if agreement else None,
    )


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Natural logarithms of the probabilities, [n, vocab]; writes over its argument."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


@dataclass(frozen=True)
class Prompt:
    """A conversation whose answer a program can judge.

    Attributes:
        messages, tools: what `Model.chat` takes.
        schema: the answer is to be JSON that follows it; or None.
        value: the answer is to be this JSON; None where any that follows the schema will do.
        call: the answer is to call this tool: {"name": …, "arguments": {…}}; or None.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    schema: dict[str, Any] | None
    value: Any
    call: dict[str, Any] | None


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts from a file of one JSON object a line, with Prompt's attributes as keys.

    Raises:
        ArgumentError: the file cannot be read, or a line is not such an object.
    """
    prompts = []
    try:
        # Not splitlines(): a JSON text may hold U+2028 and the like as they are.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        try:
            given = strict_json(line)
            prompt = Prompt(
                given["messages"],
                given.get("tools"),
                given.get("schema"),
                given.get("value"),
                given.get("call"),
            )
            if (prompt.schema is None) == (prompt.call is None):
                raise ValueError("it needs either a schema or a call")
            if prompt.schema is not None:
                _check_schema(prompt.schema)
            elif not (
                isinstance(prompt.call, dict)
                and isinstance(prompt.call.get("name"), str)
                and isinstance(prompt.call.get("arguments"), dict)
            ):
                raise ValueError("the call needs a name and arguments")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArgumentError(f"{path}, line {number}: not a prompt: {error!r}") from error
        prompts.append(prompt)
    return prompts


def answer_prompts(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int = 512,
    progress: Progress | None = None,
) -> dict[str, Estimate]:
    """Greedy answers, without reasoning before them, and the share that is right in each respect.

    Returns:
        for prompts with a schema "json_valid", "json_schema" (it follows it) and "json_value" (it
        is the wanted one, of those that want one); for those with a call "call_well_formed" (one
        call and nothing else), "call_tool" (the right tool) and "call_right" (every argument too).
    """
    seen: dict[str, list[bool]] = {}
    # All of them before the first: what is wrong with the last is not to be learned in an hour.
    rendered = [_ids(model, prompt, number) for number, prompt in enumerate(prompts, 1)]
    for done, (prompt, ids) in enumerate(zip(prompts, rendered, strict=True), 1):
        tokens = model.generate(ids, max_tokens=max_tokens, temperature=0)
        answer = "".join(token.text for token in tokens)
        for name, right in judge(prompt, answer).items():
            seen.setdefault(name, []).append(right)
        if progress is not None:
            progress(done, len(prompts))
    return {name: proportion(sum(rights), len(rights)) for name, rights in seen.items()}


def _ids(model: Model, prompt: Prompt, number: int) -> list[int]:
    try:
        ids = model.prompt_ids(prompt.messages, tools=prompt.tools, think=False)
    except ArgumentError as error:
        raise ArgumentError(f"prompt {number}: {error}") from error
    if len(ids) >= model.context:
        raise ArgumentError(
            f"prompt {number}: has {len(ids)} tokens; with an answer more than the context of"
            f" {model.context} holds"
        )
    return ids


def judge(prompt: Prompt, answer: str) -> dict[str, bool]:
    """In which respects an answer is right; the names are those of `answer_prompts`."""
    answer = answer.rpartition("</think>")[2].strip()
    if prompt.schema is not None:
        fenced = re.fullmatch(r"```(?:json)?\n(.*)\n```", answer, re.DOTALL)
        try:
            value = strict_json(fenced[1] if fenced else answer)
            valid = True
        except ValueError:
            value, valid = None, False
        result = {"json_valid": valid, "json_schema": valid and follows(value, prompt.schema)}
        if prompt.value is not None:
            result["json_value"] = valid and value == prompt.value
        return result
    assert prompt.call is not None
    name, arguments = parse_call(answer) or (None, {})
    wanted = prompt.call["arguments"]
    equal = set(arguments) == set(wanted) and all(
        _means(arguments[key], value) for key, value in wanted.items()
    )
    right_tool = name == prompt.call["name"]
    return {
        "call_well_formed": name is not None,
        "call_tool": right_tool,
        "call_right": right_tool and equal,
    }


def parse_call(answer: str) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a tool call, in Qwen3.5's form (values are text) or Hermes' JSON.

    None if the answer is not exactly one well-formed call.
    """
    whole = re.fullmatch(r"<tool_call>\s*(.*?)\s*</tool_call>", answer, re.DOTALL)
    if not whole:
        return None
    inner = whole[1]
    if function := re.fullmatch(r"<function=([^>\s]+)>\n(.*)</function>", inner, re.DOTALL):
        parameter = r"<parameter=([^>\s]+)>\n(.*?)\n</parameter>\n"
        if re.sub(parameter, "", function[2], flags=re.DOTALL):
            return None
        return function[1], dict(re.findall(parameter, function[2], re.DOTALL))
    try:
        call = strict_json(inner)
        return str(call["name"]), dict(call["arguments"])
    except (ValueError, KeyError, TypeError):
        return None


def _means(given: Any, wanted: Any) -> bool:
    """Whether an argument, perhaps written as text, is the wanted value."""
    if isinstance(given, str) and not isinstance(wanted, str):
        try:
            given = strict_json(given)
        except ValueError:
            return False
    return type(given) is type(wanted) and bool(given == wanted)


_SCALARS: Mapping[str, type | tuple[type, ...]] = {
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
_KEYWORDS = {"type", "enum", "description", "title"}


def follows(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a value follows a JSON schema of type, enum, properties, required and items.

    An object may have no properties besides those named: that a model invents more is an error.
    """
    kind = schema["type"]
    if "enum" in schema and value not in schema["enum"]:
        return False
    if kind == "object":
        parts = schema.get("properties", {})
        return (
            isinstance(value, dict)
            and set(schema.get("required", ())) <= set(value) <= set(parts)
            and all(follows(item, parts[key]) for key, item in value.items())
        )
    if kind == "array":
        return isinstance(value, list) and all(follows(item, schema["items"]) for item in value)
    if isinstance(value, bool) and kind != "boolean":
        return False
    return isinstance(value, _SCALARS[kind])


def _check_schema(schema: Mapping[str, Any]) -> None:
    """ValueError for what `follows` does not know."""
    kind = schema["type"]
    if not isinstance(kind, str):
        raise ValueError(f"type {kind!r} of the schema is not known")
    known = {"object": {"properties", "required"}, "array": {"items"}}.get(kind, set())
    if not known and kind not in _SCALARS:
        raise ValueError(f"type {kind!r} of the schema is not known")
    if unknown := set(schema) - known - _KEYWORDS:
        raise ValueError(f"keywords of the schema that are not checked: {', '.join(unknown)}")
    required, choices = schema.get("required", []), schema.get("enum", [])
    if not isinstance(choices, list):
        raise ValueError("enum of the schema is not a list")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError("required of the schema is not a list of names")
    for part in _parts(schema):
        _check_schema(part)


def _parts(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from schema.get("properties", {}).values()
    if schema["type"] == "array":
        yield schema["items"]


def first_of_each(prompts: Iterable[Prompt], count: int) -> list[Prompt]:
    """The first `count` prompts that want JSON and as many that want a call."""
    chosen: dict[bool, list[Prompt]] = {True: [], False: []}
    for prompt in prompts:
        chosen[prompt.schema is not None].append(prompt)
    return chosen[True][:count] + chosen[False][:count]
