"""A model that runs: opened once, then asked for tokens, logits and states."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from flashmoe.checkpoint.find import find_model
from flashmoe.checkpoint.json import read_json
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.errors import ArgumentError, CheckpointError, DeviceError, StateError
from flashmoe.generate.chat import ChatTemplate, Message
from flashmoe.generate.sampling import Sampler, Sampling
from flashmoe.generate.state import State
from flashmoe.generate.stats import Meter, Stats
from flashmoe.generate.text import TextStream, load_tokenizer
from flashmoe.machine import probe
from flashmoe.machine.budget import check_room, default_cache, parse_bytes, prompt_chunk

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from flashmoe import _native
    from flashmoe.checkpoint.config import ModelConfig

log = logging.getLogger("flashmoe")

PRECISIONS = ("int8", "float32")
KERNELS = Path(__file__).parents[1] / "metal"
"""Where an installed flashmoe has the sources of its GPU kernels."""
BACKENDS = ("auto", "cpu", "metal")
MAX_THREADS = 1024
Progress = Callable[[int, int], None]
_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True)
class Token:
    """One step of a generation.

    Attributes:
        id: in the model's vocabulary.
        text: what became final with it. Often "", where a character or what may be a stop string is
            not complete yet, and for special tokens; all texts together are the answer.
        logprob: natural logarithm of its probability under the model, before penalties,
            temperature and filters.
    """

    id: int
    text: str
    logprob: float


class Model:
    """A Mixture-of-Experts model whose experts are read from disk as tokens need them.

    Several threads may use one model: they take turns, a token or a chunk of a prompt each.

    Args:
        source: a hub id such as "mlx-community/Qwen3.5-397B-A17B-4bit" (downloaded on first use), a
            directory, or "demo" (a small model that flashmoe brings along).
        experts_per_token: how many experts each layer runs for a token, at most the model's own
            number; None is the model's own. Fewer are faster and less exact.
        backend: "cpu"; "metal", the GPU of a Mac; or "auto": on macOS the GPU (or with a warning
            the CPU, where it cannot be used), elsewhere the CPU.
        precision: "int8" quantises the inputs of quantised matrices to 8 bits per group on the CPU,
            and keeps the KV cache in bfloat16, in which attention also multiplies where the
            processor can (AVX-512 BF16); "float32" does none of it, the reference.
        threads: to compute with; None takes every physical core that the process may use.
        cache: memory for experts, as bytes or as in "4GB"; 0 leaves caching to the system's page
            cache; None decides with `default_cache`.
        context: most tokens of a sequence; None is the model's own limit.
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
        experts_per_token: int | None = 4,
        backend: str = "auto",
        precision: str = "int8",
        threads: int | None = None,
        cache: int | str | None = None,
        context: int | None = None,
        overlap: bool = False,
        progress: Progress | None = None,
    ) -> None:
        _check_choice("backend", backend, BACKENDS)
        _check_choice("precision", precision, PRECISIONS)
        _check_count("experts_per_token", experts_per_token, 1)
        _check_count("threads", threads, 1, MAX_THREADS)
        _check_count("context", context, 1)
        # More than 2^62 bytes would overflow the native core, and hold no more experts.
        cache_bytes = None if cache is None else min(parse_bytes(cache), 1 << 62)

        self.source = os.fspath(source)
        self.directory = find_model(self.source)
        checkpoint = Checkpoint.open(self.directory)
        self.config: ModelConfig = checkpoint.config
        own, limit = self.config.num_experts_per_tok, self.config.max_position_embeddings
        if context is not None and context > limit:
            raise ArgumentError(f"context is {context}; the model's own limit is {limit}")
        self.experts_per_token = own if experts_per_token is None else min(experts_per_token, own)
        self.precision = precision
        self.threads = threads or probe.physical_cores()
        self.context = context or limit
        available = probe.available_memory()
        if cache_bytes is None:
            cache_bytes = default_cache(checkpoint, available)
        check_room(checkpoint, cache_bytes, available)
        self._chunk = prompt_chunk(self.config, self.experts_per_token, available)
        self.sampling = self._default_sampling()
        self.fingerprint = _fingerprint(checkpoint)
        self._turn = threading.Lock()
        try:
            self._engine = open_engine(
                checkpoint,
                backend=backend,
                experts_per_token=self.experts_per_token,
                precision=precision,
                threads=self.threads,
                cache_bytes=cache_bytes,
                chunk=self._chunk,
                overlap=overlap,
                progress=progress,
            )
        except MemoryError:
            raise ArgumentError(
                f"{self.source}: the system does not grant the memory for resident weights, "
                f"activations and a cache of {cache_bytes / 1e9:.1f} GB; {available / 1e9:.1f} GB "
                "are available: give a smaller cache, and see what 'flashmoe info' says"
            ) from None
        self.backend = self._engine.backend
        self._closed = False
        self._meter = Meter(self._engine.stats())
        self._last_totals: Mapping[str, float] = self._engine.stats()
        log.info(
            "%s: %d of %d experts per token (the model's own number is %d), %s, %s, %d threads, %s",
            self.source,
            self.experts_per_token,
            self.config.num_experts,
            own,
            self.backend,
            precision,
            self.threads,
            f"{cache_bytes / 1e9:.2f} GB for experts" if cache_bytes else "page cache for experts",
        )

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"Model({self.source!r}, experts_per_token={self.experts_per_token}, "
            f"precision={self.precision!r}, threads={self.threads})"
        )

    def close(self) -> None:
        """Frees memory and files; using the model afterwards raises StateError."""
        with self._turn:
            if not self._closed:
                self._last_totals = self._engine.stats()
                self._closed = True
                self._engine.close()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer, of the `tokenizers` library."""
        return load_tokenizer(self.directory)

    @property
    def stats(self) -> Stats:
        """What the latest `generate()` or `logits()` took, to date if it is not over."""
        from flashmoe import _native  # noqa: PLC0415

        with self._turn:
            if not self._closed:
                self._last_totals = self._engine.stats()
        return self._meter.stats(
            self._last_totals,
            experts_per_token=self.experts_per_token,
            precision=self.precision,
            threads=self.threads,
            kernels=_native.cpu_kernels() if self.backend == "cpu" else self.backend,
        )

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
        stop: str | Sequence[str] | None = None,
        state: State | None = None,
        progress: Progress | None = None,
    ) -> Generator[Token, None, None]:
        """Continues a prompt, token by token.

        A text is taken as it is; `chat` renders a conversation first. What of temperature, top_k,
        top_p, min_p and the penalties is None is the checkpoint's `generation_config.json`'s; see
        `Sampling`. It ends after an end-of-sequence token, which is given out like any other, after
        a stop string, max_tokens, or when the context is full (`stats.finish_reason`).

        Args:
            prompt: text, or ids. May be empty where a state has an answer to go on with.
            max_tokens: to give out at most; None for as many as the context holds. 0 only adds the
                prompt to the state.
            seed: the same seed draws the same tokens; None draws others each time.
            stop: ends the answer before the first of these strings.
            state: what came before; it then holds the prompt and every token given out.
            progress: called with (prompt tokens computed, prompt tokens) after each chunk.
        Raises:
            ArgumentError: at once, for a value that cannot be used.
            StateError: the prompt does not fit the context, the model is closed, or the state is of
                another model or in use.
            ReadError: while iterating, an expert could not be read. The state keeps its tokens: an
                empty prompt goes on from there.
        """
        _check_count("max_tokens", max_tokens, 0)
        sampling = self.sampling.override(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
        )
        ids = self._encode(prompt)
        if state is None:
            state = self.new_state()
        self._check_own(state)
        self._check_room(state, ids)
        stream = self._text_stream(stop)
        sampler = Sampler(sampling, seed, seen=(*state._tokens, *ids))
        eos = frozenset(self.config.eos_token_ids)
        return self._steps(ids, state, sampler, stream, max_tokens, eos, progress)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Generator[Token, None, None]:
        """Answers a conversation: `generate` on what `render` makes of it.

        Args:
            messages: turns such as {"role": "user", "content": "Hello"}, all of them.
            tools: functions that the model may call, as JSON schemas.
            variables: of the template, such as {"enable_thinking": False}.
            options: those of `generate`. A `state` is used as far as the conversation begins with
                it, and started afresh otherwise: the answer is the same, only the time differs.
        """
        text = self.render(messages, tools=tools, **(variables or {}))
        ids = self._encode_text(text, special=False)
        state: State | None = options.get("state")
        if state is not None:
            self._check_own(state)
            before = len(state._tokens)
            if state._tokens == ids[:before] and before < len(ids):
                ids = ids[before:]
            else:
                # Refuses bad arguments while the state still holds what it did.
                self.generate(ids, **options | {"state": None})
                state._restart()
        return self.generate(ids, **options)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """A conversation as the text of a prompt; see `ChatTemplate.render`."""
        template = self.chat_template(tools=bool(tools))
        if template is None:
            raise ArgumentError(
                f"{self.directory}: the checkpoint has no chat template (chat_template.jinja); "
                "use generate() with a plain prompt"
            )
        return template.render(
            messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
        )

    def chat_template(self, *, tools: bool = False) -> ChatTemplate | None:
        """The checkpoint's chat template, or None."""
        return ChatTemplate.load(self.directory, tools=tools)

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """The model's prediction after each of the ids: float32 [len(ids), vocab].

        Raises:
            ArgumentError, StateError, ReadError: as `generate`.
        """
        return self._whole(
            ids, lambda native, array: self._engine.forward(native, array, all_logits=True)
        )

    def routing(self, ids: Sequence[int]) -> npt.NDArray[np.int32]:
        """The experts that compute each of the ids: int32 [len(ids), layers, experts_per_token].

        A token's experts in a layer are in the order of the router's probabilities, largest first.

        Raises:
            ArgumentError, StateError, ReadError: as `generate`.
        """
        return self._whole(
            ids, lambda native, array: self._engine.forward(native, array, routing=True)[1]
        )

    def _whole(
        self,
        ids: Sequence[int],
        compute: Callable[[_native.State, npt.NDArray[np.int32]], npt.NDArray[_Number]],
    ) -> npt.NDArray[_Number]:
        """What `compute` makes of a text that is read at once, from an empty state."""
        ids = self._encode(ids)
        if not ids:
            raise ArgumentError("ids are empty; give at least one token")
        if len(ids) > self.context:
            raise StateError(f"{len(ids)} ids; the context holds {self.context}")
        state = self.new_state()
        with self._turn:
            self._check_open()
            self._meter = meter = Meter(self._engine.stats())
            start = time.perf_counter()
            out = compute(state._native, np.array(ids, np.int32))
            meter.prompt_tokens, meter.prefill_seconds = len(ids), time.perf_counter() - start
        return out

    def new_state(self) -> State:
        """A state that holds no token yet."""
        with self._turn:
            self._check_open()
            return State(self, self._engine.new_state(), [])

    def _steps(
        self,
        ids: list[int],
        state: State,
        sampler: Sampler,
        stream: TextStream | None,
        max_tokens: int | None,
        eos: frozenset[int],
        progress: Progress | None,
    ) -> Generator[Token, None, None]:
        with state._held():
            with self._turn:
                self._check_open()
                self._meter = meter = Meter(self._engine.stats())
            self._check_room(state, ids)  # once more: the state may have gone on since the call
            state._tokens += ids
            logits = self._prefill(state, meter, progress)
            if max_tokens == 0:
                meter.finish_reason = "length"
            elif state.position == self.context:
                meter.finish_reason = "context"
            while meter.finish_reason is None:
                start = time.perf_counter()
                token, logprob = sampler.draw(logits)
                state._tokens.append(token)
                meter.token()
                text = ""
                if token in eos:
                    meter.finish_reason = "eos"
                elif stream is not None:
                    text = stream.push(token)
                    if stream.stopped:
                        meter.finish_reason = "stop"
                if meter.finish_reason is None and meter.generated_tokens == max_tokens:
                    meter.finish_reason = "length"
                elif meter.finish_reason is None and state.position == self.context:
                    meter.finish_reason = "context"
                if meter.finish_reason is not None and stream is not None:
                    text += stream.finish()
                spent = time.perf_counter() - start
                yield Token(token, text, logprob)
                if meter.finish_reason is None:
                    start = time.perf_counter()
                    logits = self._forward(state, [token])
                    meter.decode_seconds += spent + time.perf_counter() - start

    def _prefill(
        self, state: State, meter: Meter, progress: Progress | None
    ) -> npt.NDArray[np.float32]:
        """Computes the tokens that the state has but the native state has not."""
        todo = state._tokens[state._native.position :]
        start = time.perf_counter()
        if progress is not None:
            progress(0, len(todo))
        for i in range(0, len(todo), self._chunk):
            logits = self._forward(state, todo[i : i + self._chunk])
            meter.prompt_tokens = min(i + self._chunk, len(todo))
            meter.prefill_seconds = time.perf_counter() - start
            if progress is not None:
                progress(meter.prompt_tokens, len(todo))
        return logits

    def _forward(self, state: State, ids: list[int]) -> npt.NDArray[np.float32]:
        with self._turn:
            self._check_open()
            return self._engine.forward(state._native, np.array(ids, np.int32))

    def _check_own(self, state: State) -> None:
        if not isinstance(state, State):
            raise ArgumentError(f"a state is what new_state() makes; got {state!r}")
        if state._model is not self:
            raise StateError("this state is another model's; make one with new_state()")

    def _check_room(self, state: State, ids: list[int]) -> None:
        """Whether there is something to compute, and the context holds it."""
        if not ids and state.position == state._native.position:
            raise ArgumentError("the prompt is empty; give at least one token")
        if state.position + len(ids) > self.context:
            raise StateError(
                f"the context holds {self.context} tokens; {state.position} before and a prompt of "
                f"{len(ids)} are more; shorten the prompt or open the model with a larger context"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the model is closed; open it again with flashmoe.Model")

    def _encode(self, prompt: str | Iterable[int]) -> list[int]:
        if isinstance(prompt, str):
            return self._encode_text(prompt)
        vocab = self.config.vocab_size
        if not isinstance(prompt, Iterable) or isinstance(prompt, (bytes, bytearray)):
            raise ArgumentError(f"a prompt is text or a sequence of ids; got {prompt!r}")
        ids = [int(i) if isinstance(i, np.integer) else i for i in prompt]
        for i in ids:
            if type(i) is not int:
                raise ArgumentError(f"a prompt is text or a sequence of ids; it holds {i!r}")
            if not 0 <= i < vocab:
                raise ArgumentError(f"token id {i} is not in the vocabulary of {vocab}")
        return ids

    def _encode_text(self, text: str, *, special: bool = True) -> list[int]:
        """The text's ids, with the tokens that the tokenizer puts around a text if `special`."""
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=special).ids)
        except TypeError:
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if at is None:
                raise
            raise ArgumentError(
                f"the prompt is not valid Unicode: character {at} is {text[at]!r}, half of a "
                "surrogate pair; was it decoded from bytes that are not UTF-8?"
            ) from None

    def _text_stream(self, stop: str | Sequence[str] | None) -> TextStream | None:
        """None for a checkpoint without a tokenizer, which runs on ids and gives no text."""
        if stop is None and not (self.directory / "tokenizer.json").exists():
            return None
        return TextStream(self.tokenizer, stop)

    def _default_sampling(self) -> Sampling:
        path = self.directory / "generation_config.json"
        if not path.exists():
            return Sampling()
        try:
            return Sampling.from_generation_config(read_json(path))
        except ArgumentError as error:
            raise CheckpointError(f"{path}: {error}") from error


def open_engine(
    checkpoint: Checkpoint,
    *,
    backend: str,
    experts_per_token: int,
    precision: str,
    threads: int,
    cache_bytes: int,
    chunk: int,
    overlap: bool,
    progress: Progress | None,
) -> _native.Engine:
    """The native engine for a checkpoint, its resident weights loaded."""
    from flashmoe import _native  # noqa: PLC0415

    def load(name: str) -> _native.Engine:
        if name not in _native.backends():
            raise ArgumentError(
                f'backend "{name}" is not in this build of flashmoe, which has '
                f"{', '.join(_native.backends())}; Metal needs macOS"
            )
        return _native.Engine(
            dataclasses.asdict(checkpoint.config) | {"experts_per_token": experts_per_token},
            checkpoint.native(),
            backend=name,
            precision=precision,
            threads=threads,
            cache_bytes=cache_bytes,
            chunk=chunk,
            kernels=str(KERNELS),
            overlap=overlap,
            progress=progress,
        )

    try:
        _native.cpu_kernels()
    except ValueError as error:  # FLASHMOE_ISA names what this machine has not
        raise ArgumentError(str(error)) from error
    if backend != "auto":
        return load(backend)
    if sys.platform == "darwin" and "metal" in _native.backends():
        try:
            return load("metal")
        except DeviceError as error:
            log.warning('%s; going on with backend="cpu"', error)
    return load("cpu")


def _fingerprint(checkpoint: Checkpoint) -> str:
    """Tells models apart, fine-tunes of one architecture too: its config and its final norm."""
    digest = hashlib.sha256()
    config = dataclasses.asdict(checkpoint.config)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for file, offset, length in checkpoint.vectors["norm"].extents.tolist():
        with Path(checkpoint.files[file]).open("rb") as f:
            f.seek(offset)
            digest.update(f.read(length))
    return digest.hexdigest()[:32]


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _check_count(name: str, value: int | None, least: int, most: int | None = None) -> None:
    if value is None:
        return
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"at least {least}" + ("" if most is None else f", at most {most}")
        raise ArgumentError(f"{name} must be None or a whole number, {limits}; got {value!r}")
