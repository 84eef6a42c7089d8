"""`flashmoe chat`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmoe.cli.lines import reader
from flashmoe.cli.options import (
    Backend,
    Cache,
    Context,
    Eos,
    Experts,
    MaxTokens,
    Precision,
    Seed,
    Source,
    Temperature,
    Threads,
    parse_eos,
)
from flashmoe.cli.progress import Bar
from flashmoe.cli.report import stats_line
from flashmoe.cli.running import open_model
from flashmoe.errors import ArgumentError, FlashMoeError, printable

if TYPE_CHECKING:
    from flashmoe.generate.model import Model

FORMAT = "flashmoe.chat.1"
_MOST_BYTES = 256 << 20
_LEAST_ROOM = 0.25
"""Share of the context that is free again when the oldest turns were dropped."""


def chat(
    source: Source,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The system message of the conversation.")
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Whether the model reasons before it answers."),
    ] = None,
    load: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Continue a conversation saved with /save.")
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    eos: Eos = None,
    experts_per_token: Experts = "auto",
    backend: Backend = "auto",
    precision: Precision = "int8",
    threads: Threads = None,
    cache: Cache = None,
    context: Context = None,
) -> None:
    """Chat with a model. /help lists the commands; Ctrl-C stops an answer.

    Answers go to stdout; everything else, including the reasoning (dimmed), goes to stderr. The
    arrow keys edit the line and recall earlier ones; a line that ends with \\ continues on the
    next.

    \b
    Examples:
      flashmoe chat mlx-community/Qwen3.5-397B-A17B-4bit --no-think
      flashmoe chat demo --system "Answer in one sentence."
      flashmoe chat ./packed --load talk.json
    """
    with open_model(
        source, experts_per_token, backend, precision, threads, cache, context
    ) as model:
        if model.chat_template is None:
            raise ArgumentError(
                f"{model.directory}: the checkpoint has no chat template; use flashmoe generate"
            )
        options = {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "eos": parse_eos(eos),
        }
        talk = Talk(model, reader(), system=system, think=think, options=options)
        if load is not None:
            talk.load(str(load))
        talk.run()


class Talk:
    """A conversation with a person.

    Args:
        read: gives the next line that they type; EOFError when there is none.
        options: of `Model.chat`.
    """

    def __init__(
        self,
        model: Model,
        read: Callable[[str], str],
        *,
        system: str | None = None,
        think: bool | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self._model = model
        self._read = read
        self._system = system
        self._think = think
        self._options = options or {}
        self._turns: list[dict[str, Any]] = []
        self._state = model.new_state()
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "what can be typed", self._help),
            "reset": ("", "forget the conversation", self._reset),
            "system": ("[TEXT]", "show the system message, or set it", self._set_system),
            "think": ("[on|off|auto]", "whether to reason before an answer", self._set_think),
            "save": ("FILE", "write the conversation, and what was computed of it", self.save),
            "load": ("FILE", "go on with a conversation that was saved", self.load),
            "stats": ("", "what the latest answer took, and the context left", self._stats),
            "exit": ("", "leave, as Ctrl-D does", self._exit),
        }

    def run(self) -> None:
        """Talks until the person leaves."""
        _say("/help for help, Ctrl-C stops an answer, Ctrl-D leaves")
        while True:
            try:
                line = self._line()
                if line.startswith("/"):
                    self._command(line)
                elif line.strip():
                    self._answer(line)
            except EOFError:
                _say("")
                return
            except KeyboardInterrupt:
                _say("Ctrl-D leaves")
            except FlashMoeError as error:
                _say(f"error: {error}", dim=False)

    def save(self, name: str) -> None:
        """Writes the turns to FILE, and the state of the model to FILE.state."""
        from flashmoe.machine.files import replacing  # noqa: PLC0415

        path = _path(name, "/save")
        record = {
            "format": FORMAT,
            "model": printable(self._model.source, 4096),  # a path need not be UTF-8
            "system": self._system,
            "think": self._think,
            "turns": self._turns,
        }
        with (
            replacing(path) as descriptor,
            open(descriptor, "w", encoding="utf-8", closefd=False) as file,
        ):
            json.dump(record, file, indent=1, ensure_ascii=False)
        self._state.save(_state_of(path))
        _say(f"{len(self._turns)} turns written to {path}, what was computed to {_state_of(path)}")

    def load(self, name: str) -> None:
        """Goes on with the turns of FILE, and if it is there and this model's with FILE.state."""
        from flashmoe.checkpoint.json import parse_object  # noqa: PLC0415
        from flashmoe.generate.state import State  # noqa: PLC0415
        from flashmoe.machine.files import read_file  # noqa: PLC0415

        path = _path(name, "/load")
        record = parse_object(read_file(path, _MOST_BYTES), str(path))
        turns: Any = record.get("turns")
        whole = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
        if record.get("format") != FORMAT or not whole:
            raise ArgumentError(f"{path}: not a conversation that /save wrote")
        try:
            state = State.load(self._model, _state_of(path))
        except FlashMoeError as error:
            _say(f"the prompt will be computed again: {error}")
            state = self._model.new_state()
        self._turns, self._state = turns, state
        self._system, self._think = record.get("system"), record.get("think")
        _say(f"{len(turns)} turns read from {path}")

    def _line(self) -> str:
        lines = [self._read("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read(". "))
        return "\n".join(lines)

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        if name not in self._commands:
            _say(f"/{name} is not a command; /help lists them")
            return
        self._commands[name][2](argument.strip())

    def _messages(self) -> list[dict[str, Any]]:
        head = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*head, *self._turns]

    def _answer(self, text: str) -> None:
        self._turns.append({"role": "user", "content": text})
        try:
            if not self._make_room():
                self._turns.pop()
                return
            self._stream()
        except (FlashMoeError, KeyboardInterrupt, EOFError):
            if self._turns[-1]["role"] == "user":
                self._turns.pop()
            raise

    def _stream(self) -> None:
        """Prints the answer as it comes. Ctrl-C ends it; what is there stays in the talk."""
        with Bar("reading the prompt", "tokens") as bar:
            chat = self._model.chat(
                self._messages(),
                think=self._think,
                state=self._state,
                progress=bar,
                **self._options,
            )
            stopped = thinking = False
            try:
                for delta in chat:
                    if delta.kind == "reasoning":
                        typer.secho(delta.text, err=True, dim=True, nl=False)
                    elif delta.text:
                        if thinking:
                            typer.echo("\n", err=True)
                        typer.echo(delta.text, nl=False)
                        sys.stdout.flush()
                    thinking = delta.kind == "reasoning"
            except KeyboardInterrupt:
                stopped = True
            finally:
                chat.close()
        answer = chat.answer
        typer.echo()
        if stopped and not answer.generated_tokens:
            self._turns.pop()  # an arrow key brings it back
            _say("stopped before the answer began; nothing was sent")
            return
        self._turns.append(answer.message)
        if stopped:
            _say("stopped; say on, and it knows what it said so far")
        elif self._model.stats.finish_reason == "context":
            _say("the context is full: the answer ends here")

    def _make_room(self) -> bool:
        """Whether the context holds the talk and an answer; asks before it drops a turn."""
        context = self._model.context
        if self._length() < context:
            return True
        _say(f"the conversation fills the context of {context} tokens", dim=False)
        if self._read("drop its oldest turns? [y/N] ").strip().lower() not in ("y", "yes"):
            _say("nothing was sent; /reset begins anew, /save keeps this one")
            return False
        kept, before = list(self._turns), len(self._turns)
        while len(self._turns) > 1 and self._length() > (1 - _LEAST_ROOM) * context:
            del self._turns[0]
            while len(self._turns) > 1 and self._turns[0]["role"] != "user":
                del self._turns[0]
        if self._length() >= context:
            self._turns = kept
            raise ArgumentError(f"this message alone does not fit a context of {context} tokens")
        _say(f"{before - len(self._turns)} turns were dropped")
        return True

    def _length(self) -> int:
        return len(self._model.prompt_ids(self._messages(), think=self._think))

    def _help(self, _: str) -> None:
        for name, (argument, what, _run) in self._commands.items():
            _say(f"  {f'/{name} {argument}':22}{what}")

    def _reset(self, _: str) -> None:
        self._turns, self._state = [], self._model.new_state()
        _say("the conversation begins anew")

    def _set_system(self, text: str) -> None:
        if text:
            self._system = text
        _say(f"system message: {self._system or 'none'}")

    def _set_think(self, word: str) -> None:
        words = {"on": True, "off": False, "auto": None}
        if word and word not in words:
            raise ArgumentError(f"/think takes on, off or auto; got {word!r}")
        self._think = words[word] if word else self._think
        _say(f"think: {next(w for w, value in words.items() if value is self._think)}")

    def _stats(self, _: str) -> None:
        used = self._state.position
        _say(stats_line(self._model.stats))
        cached = self._model.stats.cached_tokens
        _say(f"{cached} tokens of the latest prompt had been computed before")
        _say(f"context: {used} of {self._model.context} tokens, {self._model.context - used} left")

    def _exit(self, _: str) -> None:
        raise EOFError


def _path(name: str, command: str) -> Path:
    if not name:
        raise ArgumentError(f"{command} needs the name of a file, such as {command} talk.json")
    return Path(name).expanduser()


def _state_of(path: Path) -> Path:
    return path.with_name(path.name + ".state")


def _say(text: str, *, dim: bool = True) -> None:
    typer.secho(text, err=True, dim=dim)
