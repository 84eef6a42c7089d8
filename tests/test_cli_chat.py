"""`flashmoe chat`: what people type, and what comes of it."""

import contextlib
import json
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest
from fake_engine import FakeEngine, install, make_directory, make_tokenizer, spelling
from typer.testing import CliRunner

from flashmoe.cli.main import app


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    return install(monkeypatch, spelling("Hi there.", make_tokenizer()))


@pytest.fixture
def model(engine: FakeEngine, tmp_path: Path) -> str:
    return str(make_directory(tmp_path / "model"))


def _talk(model: str, *lines: str, options: tuple[str, ...] = ()):
    text = "".join(f"{line}\n" for line in lines)
    return CliRunner().invoke(app, ["chat", model, *options], input=text)


def _prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the engine has taken in at each first token of an answer."""
    prompts: list[str] = []
    tokenizer, forward = make_tokenizer(), FakeEngine.forward

    def spy(self, state, ids, *rest, **options):
        out = forward(self, state, ids, *rest, **options)
        text = tokenizer.decode(state.tokens, skip_special_tokens=False)
        if text.endswith(("assistant\n<think>", "assistant\n")):
            prompts.append(text)
        return out

    monkeypatch.setattr(FakeEngine, "forward", spy)
    return prompts


def test_answers_go_to_stdout_and_the_conversation_goes_on(model, monkeypatch) -> None:
    prompts = _prompts(monkeypatch)
    result = _talk(model, "One", "", "Two \\", "lines", options=("--system", "Be brief."))
    assert result.exit_code == 0
    assert result.stdout == "Hi there.\nHi there.\n"
    start, end = "<|im_start|>", "<|im_end|>\n"
    begin = f"{start}system\nBe brief.{end}{start}user\nOne{end}{start}assistant\n"
    assert prompts == [
        begin + "<think>",
        f"{begin}Hi there.{end}{start}user\nTwo \nlines{end}{start}assistant\n<think>",
    ]


def test_commands_change_the_conversation(model, monkeypatch) -> None:
    prompts = _prompts(monkeypatch)
    result = _talk(
        model, "/help", "/system Lie.", "/think off", "One", "/stats", "/reset", "/think",
        "/system", "Two", "/nope", "/think maybe", "/exit", "Three",
    )  # fmt: skip
    assert result.exit_code == 0
    assert result.stdout == "Hi there.\nHi there.\n"
    for command in ("/help", "/reset", "/system", "/think", "/save FILE", "/load FILE", "/stats"):
        assert f"  {command}" in result.stderr
    assert "think: off" in result.stderr
    assert "/nope is not a command" in result.stderr
    assert "error: /think takes on, off or auto; got 'maybe'" in result.stderr
    assert "context: 45 of 2048 tokens, 2003 left" in result.stderr
    start, end = "<|im_start|>", "<|im_end|>\n"
    lie = f"{start}system\nLie.{end}"
    assert prompts == [f"{lie}{start}user\n{n}{end}{start}assistant\n" for n in ("One", "Two")]


def test_what_was_saved_is_gone_on_with(engine, tmp_path, monkeypatch) -> None:
    from conversing import DEMO  # noqa: PLC0415

    monkeypatch.undo()  # the real engine, whose states can be written
    file = tmp_path / "talk.json"
    options = ("-n", "5", "--temperature", "0")
    first = _talk(str(DEMO), "/system Be kind.", "Hello", f"/save {file}", options=options)
    assert f"2 turns written to {file}" in first.stderr
    saved = json.loads(file.read_text())
    assert [turn["role"] for turn in saved["turns"]] == ["user", "assistant"]
    assert saved["turns"][1]["content"] == first.stdout.strip()
    assert saved["system"] == "Be kind."

    second = _talk(str(DEMO), "And?", "/stats", options=(*options, "--load", str(file)))
    assert f"2 turns read from {file}" in second.stderr
    tokens = int(second.stderr.partition("\n")[2].split(" tokens of the latest")[0].split()[-1])
    assert tokens > 20
    (tmp_path / "talk.json.state").unlink()
    third = _talk(str(DEMO), f"/load {file}", "And?", options=options)
    assert "the prompt will be computed again" in third.stderr
    assert third.stdout == second.stdout


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "flashmoe.chat.1", "turns": [1]}'])
def test_what_is_no_conversation_is_refused(model, tmp_path, content) -> None:
    file = tmp_path / "talk.json"
    file.write_text(content)
    result = _talk(model, f"/load {file}", "/load", f"/load {tmp_path}/none", "Hello")
    assert result.stdout == "Hi there.\n"
    assert result.stderr.count("error: ") == 3
    assert str(file) in result.stderr
    assert _talk(model, options=("--load", str(file))).exit_code in (1, 2)


@pytest.mark.parametrize("passes", [0, 4])
def test_ctrl_c_stops_the_answer_and_not_the_program(model, engine, passes) -> None:
    def interrupt() -> None:
        if len(engine.calls) == passes:
            engine.calls.append(0)
            raise KeyboardInterrupt

    engine.before_forward = interrupt
    result = _talk(model, "One", "Two")
    assert result.exit_code == 0
    if passes == 0:
        assert result.stdout == "\nHi there.\n"
        assert "stopped before the answer began" in result.stderr
    else:
        assert result.stdout.startswith("Hi \nHi there.\n")
        assert "stopped; say on" in result.stderr


def test_an_error_ends_the_answer_and_not_the_program(model, engine) -> None:
    result = _talk(model, "x" * 5000, "Hello", options=("--context", "100"))
    assert result.exit_code == 0
    assert "nothing was sent" in result.stderr  # Hello was no yes
    result = _talk(model, "x" * 5000, "y", "Hello", options=("--context", "100"))
    assert "error: this message alone does not fit a context of 100 tokens" in result.stderr
    assert result.stdout == "Hi there.\n"


def test_a_full_context_asks_before_the_oldest_turns_go(model, monkeypatch) -> None:
    prompts = _prompts(monkeypatch)
    lines = [f"message number {i} of this talk" for i in range(4)]
    system = ("--system", "Be brief.", "--context", "220")
    result = _talk(model, *lines, "y", "/reset", options=system)
    assert result.stdout == "Hi there.\n" * 4
    assert "the conversation fills the context of 220 tokens" in result.stderr
    assert "4 turns were dropped" in result.stderr
    assert "Be brief." in prompts[-1]
    assert [f"number {i}" in prompts[-1] for i in range(4)] == [False, False, True, True]
    result = _talk(model, *lines, "n", options=system)
    assert result.stdout == "Hi there.\n" * 3


def test_an_answer_that_fills_the_context_says_so(model) -> None:
    result = _talk(model, "One", options=("--context", "28"))
    assert "the context is full: the answer ends here" in result.stderr


def test_a_model_without_a_template_is_refused(model) -> None:
    Path(model, "chat_template.jinja").unlink()
    result = _talk(model, "Hello")
    assert result.exit_code == 2
    assert "use flashmoe generate" in result.stderr


def test_a_pipe_of_something_else_is_refused(model) -> None:
    result = CliRunner().invoke(app, ["chat", model], input=b"\xff\xfe\n")
    assert "standard input is not text" in result.stderr


class Terminal:
    """The program on a terminal, with the demo model."""

    def __init__(self, *, toolkit: bool) -> None:
        hide = "" if toolkit else "sys.modules['prompt_toolkit'] = None; "
        code = f"import sys; {hide}from flashmoe.__main__ import main; main()"
        arguments = ["chat", "demo", "--temperature", "0", "-n", "2000"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
        self.process, self._master = pty.fork()
        if self.process == 0:
            os.execve(sys.executable, [sys.executable, "-c", code, *arguments], environment)
        self.seen = ""

    def expect(self, text: str, press: str = "") -> None:
        """Reads until the text has come since the last time.

        Args:
            press: keys that bring it, pressed again in each quiet second: Python's input() sleeps
                on where Ctrl-C comes between its prompt and its wait for a key.
        """
        end = time.monotonic() + 120
        self.send(press)
        while text not in self.seen:
            assert time.monotonic() < end, self.seen
            if not select.select([self._master], [], [], 1)[0]:
                self.send(press)
                continue
            self.seen += os.read(self._master, 65536).decode(errors="replace")
            if "\x1b[6n" in self.seen:  # prompt_toolkit asks where the cursor is
                self.seen = self.seen.replace("\x1b[6n", "")
                self.send("\x1b[1;1R")
        self.seen = self.seen.partition(text)[2]

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def close(self) -> int:
        with contextlib.suppress(OSError):  # all has been read
            while os.read(self._master, 65536):
                pass
        os.close(self._master)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.parametrize("toolkit", [True, False])
def test_ctrl_c_on_a_terminal(toolkit: bool) -> None:
    if toolkit:
        pytest.importorskip("prompt_toolkit")
    terminal = Terminal(toolkit=toolkit)
    try:
        terminal.expect("Ctrl-D leaves")
        terminal.expect(">")
        terminal.send("Continue: The old man looked at the sea.\r")
        terminal.expect("\x1b[?2004l" if toolkit else "\n")  # the line has been read
        terminal.expect(" the ")
        terminal.send("\x03")
        terminal.expect("stopped; say on")
        terminal.expect(">")
        terminal.send("/stats\r")
        terminal.expect("4096 tokens")
        terminal.expect(">")
        terminal.expect("Ctrl-D leaves", press="\x03")
        terminal.expect(">")
        terminal.send("\x04")
        assert terminal.close() == 0
    except BaseException:
        os.kill(terminal.process, signal.SIGKILL)
        terminal.close()
        raise
