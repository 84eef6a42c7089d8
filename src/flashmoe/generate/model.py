"""A model that runs: opened once, then asked for tokens, logits and states."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flashmoe.checkpoint.config import ExpertsPerToken, ModelConfig
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.template import ChatTemplate, Message
from flashmoe.errors import ArgumentError, ContextError, StateError
from flashmoe.generate.answer import Token
from flashmoe.generate.background import AsyncChat, Background
from flashmoe.generate.chat import Chat, Turn
from flashmoe.generate.constraint import Constraint, constraint_of
from flashmoe.generate.conversations import Conversations
from flashmoe.generate.dialect import Dialect
from flashmoe.generate.engine import Progress, open_engine
from flashmoe.generate.in_force import in_force, kernels_of, runs_fewer
from flashmoe.generate.options import (
    check_choice,
    check_count,
    ends_of,
    ids_of,
    sampling_of,
    stream_of,
    variables_of,
)
from flashmoe.generate.parse import AnswerParser
from flashmoe.generate.processors import LogitsProcessor
from flashmoe.generate.prompt import Prompt, Prompts
from flashmoe.generate.sampling import Sampler, Sampling
from flashmoe.generate.scheduler import Scheduler
from flashmoe.generate.setting import decide
from flashmoe.generate.state import State
from flashmoe.generate.stats import Meter, Stats
from flashmoe.generate.steps import Tokens, Work
from flashmoe.generate.tools import ToolSpec, chosen, tools_of
from flashmoe.machine import probe
from flashmoe.machine.budget import (
    parse_bytes,
)

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger("flashmoe")

PRECISIONS = ("int8", "float32")
BACKENDS = ("auto", "cpu", "metal")
MAX_THREADS = 1024
_open_models: weakref.WeakSet[Model] = weakref.WeakSet()


class Model:
    """A Mixture-of-Experts model whose experts are read from disk as tokens need them.

    Several threads may use one model: they take turns, a token or a chunk of a prompt each.
    `in_force` says in one line how it runs, as does its repr; the logger "flashmoe" has it too, as
    a warning where fewer experts run than the model's own.

    Args:
        source: a hub id such as "mlx-community/Qwen3.5-397B-A17B-4bit" (downloaded on first use), a
            directory, or "demo" (a small model that flashmoe brings along).
        experts_per_token: how many experts each layer runs for a token, at most the model's own
            number; None is the model's own. Fewer are faster and less exact. "auto" is 4 for
            Qwen3.5-397B-A17B and the model's own for all others.
        backend: "cpu"; "metal", the GPU of a Mac; or "auto": on macOS the GPU (or with a warning
            the CPU, where it cannot be used), elsewhere the CPU.
        precision: "int8" quantizes the inputs of quantized matrices to 8 bits per group on the CPU,
            and keeps the KV cache in bfloat16, in which attention also multiplies where the
            processor can (AVX-512 BF16); "float32" does none of it, the reference.
        threads: to compute with; None takes every physical core that the process may use.
        cache: memory for experts, as bytes or as in "4GB"; 0 leaves caching to the system's page
            cache; None decides with `default_cache`.
        context: most tokens of a sequence; None is the model's own limit.
        conversations: memory to keep the states of conversations in, so that `chat` computes only
            what is new in them; as bytes or as in "4GB"; None is a tenth of the memory available.
        overlap: whether a GPU computes experts while others are being read. On a Mac both share the
            memory's bandwidth, so by default they take turns. The CPU always overlaps.
        progress: called with (bytes read, bytes in all) while the resident weights are loaded.
    Raises:
        ArgumentError: an argument cannot be used, or memory has no room for the model.
        CheckpointError: the checkpoint is absent, damaged, or of a kind that is not supported.
        DeviceError: the GPU is absent, too small, or refuses a kernel.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        experts_per_token: ExpertsPerToken = "auto",
        backend: str = "auto",
        precision: str = "int8",
        threads: int | None = None,
        cache: int | str | None = None,
        context: int | None = None,
        conversations: int | str | None = None,
        overlap: bool = False,
        progress: Progress | None = None,
    ) -> None:
        check_choice("backend", backend, BACKENDS)
        check_choice("precision", precision, PRECISIONS)
        check_count("threads", threads, 1, MAX_THREADS)
        check_count("context", context, 1)
        # More than 2^62 bytes would overflow the native core, and hold no more experts.
        cache_bytes = None if cache is None else min(parse_bytes(cache), 1 << 62)

        self.checkpoint = checkpoint = Checkpoint.open(source)
        config = checkpoint.config
        limit = config.max_position_embeddings
        if context is not None and context > limit:
            raise ArgumentError(f"context is {context}; the model's own limit is {limit}")
        self.context = context or limit
        try:
            self.setting = decide(
                checkpoint,
                experts_per_token=experts_per_token,
                backend=backend,
                precision=precision,
                threads=threads,
                cache=cache_bytes,
                context=context,
                overlap=overlap,
            )
        except ArgumentError as error:
            raise ArgumentError(f"{error}{_also_open()}") from None
        self.sampling = sampling_of(checkpoint)
        self._engine = open_engine(checkpoint, self.setting, progress)
        self._native = self._engine.native
        self._scheduler = Scheduler(self._native, self.setting.chunk)
        self._prompts = Prompts(checkpoint)
        self._conversations = Conversations(
            probe.available_memory() // 10 if conversations is None else parse_bytes(conversations)
        )
        self._closed = False
        _open_models.add(self)
        self.backend = self._native.backend
        self._totals: Mapping[str, float] = self._native.stats()
        self._meter = Meter(self._totals)
        self.in_force = in_force(config, self.setting, self.backend, self.context)
        level = logging.WARNING if runs_fewer(config, self.setting) else logging.INFO
        log.log(level, "%s: %s", self.source, self.in_force)

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<flashmoe.Model {self.source}: {self.in_force}>"

    def close(self) -> None:
        """Frees memory and files and ends threads; using the model afterwards raises StateError.

        Where a signal handler closes it in the middle of a call, that call ends with a StateError.
        """
        with contextlib.suppress(StateError):  # closed before, or in the middle of a call
            self._totals = self._native.stats()
        with contextlib.suppress(StateError):  # the program ends
            self._native.close()
        self._closed = True
        _open_models.discard(self)
        self._conversations.clear()

    @property
    def source(self) -> str:
        """What the model was opened by."""
        return self.checkpoint.source

    @property
    def directory(self) -> Path:
        """Where its checkpoint is."""
        return self.checkpoint.directory

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.checkpoint.config

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """The checkpoint's tokenizer, of the `tokenizers` library."""
        return self.checkpoint.tokenizer.library

    @property
    def experts_per_token(self) -> int:
        """Experts that run for a token in each layer."""
        return self.setting.experts_per_token

    @property
    def precision(self) -> str:
        return self.setting.precision

    @property
    def threads(self) -> int:
        return self.setting.threads

    @property
    def stats(self) -> Stats:
        """What the latest `generate()` or `logits()` took, to date if it is not over."""
        with contextlib.suppress(StateError):  # closed: what it was then
            self._totals = self._native.stats()
        return self._meter.stats(self._totals, self.setting, kernels_of(self.backend))

    def layer_times(self) -> list[dict[str, float]]:
        """Seconds spent in each layer since the model was opened, by part, as the host saw them.

        The parts are "mixer" (norm and GatedDeltaNet or attention), "router" (norm, router, top-k),
        "wait" (for experts from disk), "experts" (the shared one too) and "combine" (their sum).
        """
        return self._native.layer_times()

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Iterable[str] | None = None,
        eos: int | str | Iterable[int | str] = (),
        ignore_eos: bool = False,
        logprobs: int = 0,
        processors: Sequence[LogitsProcessor] = (),
        state: State | None = None,
        progress: Progress | None = None,
    ) -> Tokens:
        """Continues a prompt, token by token.

        A text is taken as it is; `chat` renders a conversation first. What of temperature, top_k,
        top_p, min_p and the penalties is None is the checkpoint's `generation_config.json`'s; see
        `Sampling`. It ends after an end-of-sequence token, which is given out like any other, after
        a stop string, max_tokens, or when the context is full (`stats.finish_reason`).

        Args:
            prompt: text, or ids. May be empty where a state has something to go on with.
            max_tokens: to give out at most; None for as many as the context holds. 0 only adds the
                prompt to the state.
            seed: the same seed draws the same tokens; None draws others each time.
            stop: ends the answer before the first of these strings. A special token, which gives
                no text, ends it too.
            eos: more tokens that end a sequence, as ids or as the tokenizer writes them.
            ignore_eos: go on after the checkpoint's own end-of-sequence tokens.
            logprobs: how many of the most probable tokens each token is to carry.
            processors: change logits after the penalties; see `LogitsProcessor`.
            state: what came before; it then holds the prompt and every token given out.
            progress: called with (prompt tokens computed, prompt tokens) after each chunk.
        Raises:
            ArgumentError: at once, for a value that cannot be used.
            StateError: the prompt does not fit the context, the model is closed, or the state is of
                another model or in use.
            ReadError, OutOfMemoryError: while iterating, an expert could not be read, or the state
                could not grow. As after Ctrl-C, the state keeps its tokens: an empty prompt goes on
                from there.
        """
        sampling = self.sampling.override(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
        )
        check_count("max_tokens", max_tokens, 0)
        check_count("logprobs", logprobs, 0)
        ids = ids_of(self.checkpoint, prompt)
        self._check_open()
        before: list[int] = []
        if state is not None:
            self._check_own(state)
            before = state._tokens
        self._check_room(state, ids)

        def begin(state: State) -> None:
            self._check_room(state, ids)  # once more: it may have gone on since the call
            state._tokens += ids

        work = Work(
            state=lambda: self.new_state() if state is None else state,
            begin=begin,
            meter=self._new_meter,
            sampler=Sampler(sampling, seed, (*before, *ids), processors=tuple(processors)),
            stream=stream_of(self.checkpoint, stop),
            max_tokens=max_tokens,
            context=self.context,
            eos=ends_of(self.checkpoint, eos, ignored=ignore_eos),
            progress=progress,
            logprobs=logprobs,
        )
        return Tokens(self._scheduler.request(), work)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Iterable[Any] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        schema: Mapping[str, Any] | None = None,
        json_object: bool = False,
        regex: str | None = None,
        grammar: str | None = None,
        think: bool | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final: bool = False,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Iterable[str] | None = None,
        eos: int | str | Iterable[int | str] = (),
        ignore_eos: bool = False,
        logprobs: int = 0,
        processors: Sequence[LogitsProcessor] = (),
        state: State | None = None,
        progress: Progress | None = None,
    ) -> Chat:
        """Answers a conversation, piece by piece.

        What of the conversation was computed before is not computed again: give all of it each
        time. Its reasoning may be left out; it is remembered.

        Args:
            messages: turns such as {"role": "user", "content": "Hello"}, the oldest first.
            tools: that the model may call: JSON schemas, or Python functions.
            tool_choice: "auto"; "none"; "required", any of them must be called; or the one that
                must be, by its name.
            parallel_tool_calls: whether an answer may call more than once.
            schema: the answer is JSON that follows this JSON schema.
            json_object: the answer is a JSON object.
            regex: the answer matches this regular expression, whole.
            grammar: the answer follows this Lark grammar, in llguidance's dialect.
            think: whether to reason before the answer; None is the template's default.
            variables: of the template, such as {"reasoning_effort": "low"}.
            continue_final: go on with the last message, one of the assistant's.
            state: what it holds is used as far as the conversation begins with it, and it then
                holds the conversation: to be saved, and to go on from elsewhere.
            max_tokens, …: as for `generate`. Stop strings count in reasoning too.
        Raises:
            ArgumentError, StateError, ReadError: as `generate`.
        """
        sampling = self.sampling.override(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
        )
        self._check_open()
        if state is not None:
            self._check_own(state)
        prompt = self._prompts.make(
            messages,
            tools_of(tools),
            variables_of(variables, think),
            continues=continue_final,
            begun=() if state is None else state._tokens,
        )
        self._check_fits(0, prompt.ids)
        offered, _ = chosen(prompt.tools, tool_choice)
        dialect = Dialect.of(self._prompts.template(prompt.tools))
        constraint = constraint_of(
            self.checkpoint,
            schema=schema,
            json_object=json_object,
            regex=regex,
            grammar=grammar,
            tools=prompt.tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            dialect=dialect,
            in_reasoning=prompt.in_reasoning,
        )
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "seed": seed,
            "stop": stop,
            "eos": eos,
            "ignore_eos": ignore_eos,
            "logprobs": logprobs,
            "processors": processors,
            "state": state,
            "progress": progress,
        }
        return self._answer(prompt, sampling, dialect, offered, constraint, **options)

    def complete(self, prompt: str | Sequence[int], **options: Any) -> Chat:
        """Continues a prompt as `generate` does, piece by piece as `chat` answers a conversation.

        What of the prompt was computed before is not computed again.

        Args:
            options: of `generate`, but no state.
        Raises:
            ArgumentError, StateError, ReadError: as `generate`.
        """
        names = [field.name for field in dataclasses.fields(Sampling)]
        sampling = self.sampling.override(**{name: options.pop(name, None) for name in names})
        ids = ids_of(self.checkpoint, prompt)
        self._check_open()
        self._check_room(None, ids)
        text = prompt if isinstance(prompt, str) else ""
        return self._answer(Prompt(text, ids), sampling, Dialect(), (), None, **options)

    def _answer(
        self,
        prompt: Prompt,
        sampling: Sampling,
        dialect: Dialect,
        offered: Sequence[ToolSpec],
        constraint: Constraint | None,
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: str | Iterable[str] | None = None,
        eos: int | str | Iterable[int | str] = (),
        ignore_eos: bool = False,
        logprobs: int = 0,
        processors: Sequence[LogitsProcessor] = (),
        state: State | None = None,
        progress: Progress | None = None,
    ) -> Chat:
        """The answer to a prompt: see `chat`, whose options these are."""
        check_count("max_tokens", max_tokens, 0)
        check_count("logprobs", logprobs, 0)
        stream = stream_of(self.checkpoint, stop)
        turn = Turn(
            self._engine,
            self._conversations,
            self._prompts,
            prompt,
            constraint,
            stream,
            state,
            self._new_meter,
        )
        work = Work(
            state=turn.state,
            begin=turn.begin,
            meter=turn.meter,
            sampler=Sampler(sampling, seed, prompt.ids, constraint, tuple(processors)),
            stream=stream,
            max_tokens=max_tokens,
            context=self.context,
            eos=ends_of(self.checkpoint, eos, ignored=ignore_eos),
            progress=progress,
            logprobs=logprobs,
            marks=prompt.marks,
            mark=turn.mark,
            end=turn.end,
        )
        parser = AnswerParser(dialect, offered, in_reasoning=prompt.in_reasoning)
        return Chat(turn, Tokens(self._scheduler.request(), work), parser)

    def agenerate(self, prompt: str | Sequence[int], **options: Any) -> Background[Token]:
        """`generate` for asyncio: an async iterator. A cancelled task stops the work."""
        tokens = self.generate(prompt, **options)
        return Background(tokens, tokens.cancel, tokens.close)

    def achat(self, messages: Sequence[Message], **options: Any) -> AsyncChat:
        """`chat` for asyncio: an async iterator, with `await chat.answer()`."""
        return AsyncChat(self.chat(messages, **options))

    def prompt_ids(
        self,
        messages: Sequence[Message],
        *,
        tools: Iterable[Any] | None = None,
        think: bool | None = None,
        variables: Mapping[str, Any] | None = None,
        continue_final: bool = False,
    ) -> list[int]:
        """The ids that `chat` reads for a conversation, its arguments being these."""
        given = variables_of(variables, think)
        return self._prompts.make(messages, tools_of(tools), given, continues=continue_final).ids

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """A conversation as the text of a prompt; see `ChatTemplate.render`."""
        return self._prompts.template(tools).render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    @property
    def conversations(self) -> Conversations:
        """What is kept of conversations, for `chat` and `complete` to go on from."""
        return self._conversations

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The checkpoint's chat template, or None."""
        return self.checkpoint.template

    def logits(self, ids: Sequence[int], *, state: State | None = None) -> npt.NDArray[np.float32]:
        """The model's prediction after each of the ids: float32 [len(ids), vocab].

        Args:
            state: what came before; the ids join it. None begins with nothing.
        Raises:
            ArgumentError, StateError, ReadError: as `generate`.
        """
        ids = ids_of(self.checkpoint, ids)
        if not ids:
            raise ArgumentError("ids are empty; give at least one token")
        state = self.new_state() if state is None else state
        self._check_own(state)
        with self._scheduler.request() as request, state._held():
            self._check_room(state, ids)
            meter = self._new_meter()
            state._tokens += ids
            todo = state._tokens[state._native.position :]
            start = time.perf_counter()
            parts = []
            for done, part in request.prompt(state._native, todo, all_logits=True):
                parts.append(part)
                meter.prompt_tokens = done
                meter.prefill_seconds = time.perf_counter() - start
        return np.concatenate(parts)[len(todo) - len(ids) :]

    def routing(self, ids: Sequence[int]) -> npt.NDArray[np.int32]:
        """The experts that compute each of the ids: int32 [len(ids), layers, experts_per_token].

        A token's experts in a layer are in the order of the router's probabilities, largest first.

        Raises:
            ArgumentError, StateError, ReadError: as `generate`.
        """
        ids = ids_of(self.checkpoint, ids)
        if not ids:
            raise ArgumentError("ids are empty; give at least one token")
        self._check_fits(0, ids)
        array = np.array(ids, np.int32)
        return self._native.forward(self._native.new_state(), array, routing=True)[1]

    def new_state(self) -> State:
        """A state that holds no token yet."""
        return State(self._engine, self._native.new_state(), [])

    def _new_meter(self) -> Meter:
        """What counts a call, which is the latest from now on."""
        self._meter = Meter(self._native.stats())
        return self._meter

    def _check_own(self, state: State) -> None:
        if not isinstance(state, State):
            raise ArgumentError(f"a state is what new_state() makes; got {state!r}")
        if state._engine is not self._engine:
            raise StateError("this state is another model's; make one with new_state()")

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("this model is closed; open it again with flashmoe.Model(...)")

    def _check_room(self, state: State | None, ids: list[int]) -> None:
        """Whether there is something to compute behind a state, and the context holds it."""
        before = 0 if state is None else state.position
        ready = state is not None and (
            before > state._native.position or state._native.logits is not None
        )
        if not ids and not ready:
            raise ArgumentError("the prompt is empty; give at least one token")
        self._check_fits(before, ids)

    def _check_fits(self, before: int, ids: list[int]) -> None:
        """Whether the context holds a prompt behind so many tokens."""
        if before + len(ids) > self.context:
            raise ContextError(
                f"the context holds {self.context} tokens; {before} before and a prompt of "
                f"{len(ids)} are more; shorten the prompt or open the model with a larger context",
                before + len(ids),
                self.context,
            )


def _also_open() -> str:
    """What to say of models that this process has open, where another finds no room."""
    sources = sorted(model.source for model in _open_models)
    if not sources:
        return ""
    return f"; this process has {', '.join(sources)} open: close() what is not needed first"
