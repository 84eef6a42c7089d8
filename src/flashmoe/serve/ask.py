"""What a client asks for, in no API's words, and what every API's fields have in common."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from flashmoe.errors import (
    ArgumentError,
    CheckpointError,
    ContextError,
    OutOfMemoryError,
    StateError,
)
from flashmoe.generate.processors import FrequencyPenalty, LogitBias, LogitsProcessor
from flashmoe.serve.fields import Fields, RequestError, TooLongError

if TYPE_CHECKING:
    from flashmoe.generate.chat import Chat
    from flashmoe.generate.model import Model

MOST_CHOICES = 128
_OURS = {"messages", "tools", "documents", "add_generation_prompt", "self"}
_FIELD = re.compile(r"[a-z_]+(?:\[\d+\]|\.[a-z_]+)*")


@dataclass(frozen=True)
class Ask:
    """What a client asks for.

    Attributes:
        model: by the name that the client calls it, which the reply repeats.
        options: of `Model.chat`, or of `Model.complete`.
        messages: to be answered, or
        prompts: to be continued, each a text or ids.
        choices: answers to each.
        stream: whether the answer is sent as it comes.
        usage: whether a stream ends with what was used.
        logprobs: whether tokens are wanted with their log-probabilities.
        echo: whether the prompt is repeated before the answer.
        processors: makes what else changes logits.
        names: what the API calls options that it has other words for.
    """

    model: str
    options: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]] = ()
    prompts: Sequence[str | list[int]] = ()
    choices: int = 1
    stream: bool = False
    usage: bool = False
    logprobs: bool = False
    echo: bool = False
    processors: Sequence[Callable[[], LogitsProcessor]] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def begin(self, model: Model) -> list[Chat]:
        """The answers, with nothing computed yet; prompt by prompt, all choices of one together.

        Raises:
            RequestError: for all that can be wrong with a request.
        """
        starts = [partial(model.complete, prompt) for prompt in self.prompts]
        return [
            self._begin(model, start, choice)
            for start in starts or [partial(model.chat, self.messages)]
            for choice in range(self.choices)
        ]

    def _begin(self, model: Model, start: Callable[..., Chat], choice: int) -> Chat:
        options = {**self.options, "processors": [make() for make in self.processors]}
        if options.get("seed") is not None:
            options["seed"] += choice
        with self._explained(model):
            return start(**options)

    def count(self, model: Model) -> int:
        """The tokens of the messages, as `begin` would have them."""
        given = ("tools", "think", "variables", "continue_final")
        with self._explained(model):
            ids = model.prompt_ids(self.messages, **{name: self.options[name] for name in given})
        return len(ids)

    @contextmanager
    def _explained(self, model: Model) -> Iterator[None]:
        """Says of what the model refuses which field it is."""
        try:
            yield
        except ContextError as error:
            raise TooLongError(error.tokens, error.context) from error
        except (ArgumentError, CheckpointError) as error:
            # The latter where rendering the request would take too much.
            message = str(error).removeprefix(f"{model.directory}: ")
            raise self._wrong(message.replace(f"{model.directory}{os.sep}", "")) from error

    def _wrong(self, message: str) -> RequestError:
        """The error for a message that may begin with the name of what is wrong."""
        found = _FIELD.match(message)
        name = found[0] if found else ""
        if re.split(r"[.\[]", name)[0] not in {"messages", "prompt", *self.options}:
            return RequestError(message)
        own = self.names.get(name, name)
        return RequestError(own + message[len(name) :], own)


def failure_of(error: Exception) -> RequestError:
    """What a client is told of an error."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, OutOfMemoryError):
        return RequestError(f"no memory for this request: {error}", status=503)
    if isinstance(error, StateError):
        return RequestError(str(error), status=503)
    if isinstance(error, ArgumentError):  # a structure that cannot be followed to its end
        return RequestError(str(error))
    if isinstance(error, RecursionError):
        return RequestError("the request is nested too deeply")
    # Of the others, the message may hold what is nobody's business, such as paths.
    return RequestError(f"the answer failed: {type(error).__name__}; see the log", status=500)


def sampling_of(body: Fields) -> dict[str, Any]:
    """Options for drawing tokens, of both APIs and of what other servers add to them."""
    top_p = body.number("top_p", 0, 1)
    seed = body.whole("seed")
    return {
        "temperature": body.number("temperature", 0, 2),
        "top_p": 1e-9 if top_p == 0 else top_p,  # the most probable token is always kept
        "top_k": body.whole("top_k", 0, 2**31 - 1),
        "min_p": body.number("min_p", 0, 1),
        "presence_penalty": body.number("presence_penalty", -2, 2),
        "repetition_penalty": body.number("repetition_penalty", 1e-3, 1e3),
        "seed": None if seed is None else seed % 2**64,
    }


def processors_of(body: Fields, vocab_size: int) -> list[Callable[[], LogitsProcessor]]:
    """For `frequency_penalty` and `logit_bias`."""
    made: list[Callable[[], LogitsProcessor]] = []
    if penalty := body.number("frequency_penalty", -2, 2):
        made.append(partial(FrequencyPenalty, penalty))
    if given := body.object("logit_bias"):
        biases = {}
        for key in given.value:
            bias = given.number(key, -100, 100)
            if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < vocab_size):
                raise RequestError(
                    f"{given.where}: {key[:80]!r} is no id below {vocab_size}", given.where
                )
            biases[int(key)] = 0.0 if bias is None else bias
        if biases:
            made.append(partial(LogitBias, biases))
    return made


def variables_of(body: Fields) -> dict[str, Any]:
    """Variables of the chat template: `chat_template_kwargs`."""
    given = body.object("chat_template_kwargs")
    if given is None:
        return {}
    for name in _OURS & given.value.keys():
        raise RequestError(
            f"{given.name(name)} is not for requests to set", given.name(name)
        ) from None
    return dict(given.value)


def call_turn(id: str | None, name: str, arguments: Any) -> dict[str, Any]:
    """A tool call of an assistant's turn."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def in_order(turns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns, with results of tools in the order of their calls: templates write no ids."""
    calls: list[Any] = []

    def place(turn: dict[str, Any]) -> int:
        id = turn.get("tool_call_id")
        return calls.index(id) if id in calls else len(calls)

    ordered: list[dict[str, Any]] = []
    for _, group in groupby(turns, lambda turn: turn["role"] == "tool"):
        ordered += sorted(group, key=place)  # others than tools' are all in one place
        calls = [call["id"] for call in ordered[-1].get("tool_calls", ())]
    return ordered


def tool_definition(given: Fields, schema: str) -> dict[str, Any]:
    """A tool, with nothing that templates do not know; `schema` names its parameters' field."""
    parameters = given.object(schema)
    own: dict[str, Any] = {"name": given.needed_text("name")}
    if (description := given.text("description")) is not None:
        own["description"] = description
    own["parameters"] = parameters.value if parameters else {"type": "object", "properties": {}}
    return {"type": "function", "function": own}
