"""The flashmoe program: what goes to stdout, to stderr and into the exit code."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from fake_engine import (
    FakeEngine,
    install,
    make_directory,
    make_tokenizer,
    spelling,
)
from typer.testing import CliRunner

import flashmoe
from flashmoe.checkpoint import find as source
from flashmoe.cli.main import app
from flashmoe.measure.bench import PARTS

DOCS = Path(__file__).parent.parent / "docs" / "cli.md"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A directory whose model answers "Hi there."."""
    install(monkeypatch, spelling("Hi there.", make_tokenizer()))
    return str(make_directory(tmp_path / "model"))


def _run(*arguments: str, stdin: str | None = None):
    return CliRunner().invoke(app, list(arguments), input=stdin)


def test_text_goes_to_stdout_and_all_else_to_stderr(model: str) -> None:
    result = _run("generate", model, "Hello", "-e", "4")
    assert result.exit_code == 0
    assert result.stdout == "Hi there.\n"
    assert result.stderr.count("4 of 8 experts per token (the model's own: 6; ") == 1
    assert "keys and values" in result.stderr
    assert "10 tokens | " in result.stderr
    assert "tok/s" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo"],
        ["chat", "demo"],
        ["generate", "demo", "x"],
        ["bench", "demo"],
        ["eval", "demo", "--text", __file__],
    ],
    ids=lambda arguments: arguments[0],
)
def test_every_command_that_runs_a_model_takes_a_backend(arguments: list[str]) -> None:
    result = _run(*arguments, "--backend", "abacus")
    assert result.exit_code == 2
    assert "backend must be one of" in result.stderr


def test_a_prompt_may_come_through_a_pipe(model: str) -> None:
    assert _run("generate", model, stdin="Hello").stdout == "Hi there.\n"
    assert _run("generate", model, "-", stdin="Hello").stdout == "Hi there.\n"


def test_a_pipe_of_something_else_is_refused(model: str) -> None:
    result = CliRunner().invoke(app, ["generate", model], input=b"\xff\xfe")
    assert result.exit_code == 2
    assert "standard input is not text" in result.stderr


def _prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Decoded prompts of the fake engine's first forward passes."""
    prompts: list[str] = []
    tokenizer = make_tokenizer()
    forward = FakeEngine.forward

    def spy(self, state, ids, *rest, **options):
        if state.position == 0:
            prompts.append(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
        return forward(self, state, ids, *rest, **options)

    monkeypatch.setattr(FakeEngine, "forward", spy)
    return prompts


def test_a_prompt_is_a_users_turn_where_there_is_a_template_unless_raw(model, monkeypatch) -> None:
    prompts = _prompts(monkeypatch)
    _run("generate", model, "Hello")
    _run("generate", model, "Hello", "--raw")
    _run("generate", model, "Hello", "--no-think", "--system", "Be brief.")
    Path(model, "chat_template.jinja").unlink()
    _run("generate", model, "Hello")
    start, turn = "<|im_start|>", "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [
        turn + "<think>",
        "Hello",
        f"{start}system\nBe brief.<|im_end|>\n{turn}",
        "Hello",
    ]


def test_json_is_one_object_on_stdout(model: str) -> None:
    result = _run("generate", model, "Hello", "--json")
    answer = json.loads(result.stdout)
    assert answer["text"] == "Hi there."
    assert "".join(token["text"] for token in answer["tokens"]) == "Hi there."
    assert answer["stats"]["finish_reason"] == "eos"
    assert answer["stats"]["experts_per_token"] == 6


def test_sampling_options_reach_the_model(model: str) -> None:
    result = _run(
        "generate", model, "x", "--raw", "--stop", "there", "-n", "100", "-e", "2", "--json"
    )
    answer = json.loads(result.stdout)
    assert answer["text"] == "Hi "
    assert answer["stats"]["experts_per_token"] == 2
    assert (
        json.loads(_run("generate", model, "x", "-e", "0", "--json").stdout)["stats"][
            "experts_per_token"
        ]
        == 6
    )


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["generate", "{model}", "x", "--temperature", "-1"], 2, "temperature must be"),
        (["generate", "{model}", "x", "--precision", "int3"], 2, "precision must be one of"),
        (["generate", "{model}", "x", "--cache", "lots"], 2, "such as"),
        (["generate", "{model}", "x", "--raw", "--no-think"], 2, "leave out --raw"),
        (["generate", "{model}", ""], 0, ""),
        (["generate", "{model}", "", "--raw"], 2, "prompt is empty"),
        (["generate", "/no/such/model", "x"], 1, "/no/such/model: no such directory; give"),
        (["generate", "", "x"], 1, "an empty name: no such directory"),
        (["generate", "~no-such-user/x", "x"], 1, "no such directory"),
        (["generate", "a" * 5000, "x"], 1, "no such directory"),
        (["info", "/no/such/model"], 1, "no such directory"),
        (["info", "{model}", "--disk-rate", "-5"], 2, "more than 0"),
        (["info", "{model}", "--memory-rate", "nan"], 2, "more than 0"),
        (["bench", "{model}", "--prompt-tokens", "2000", "--tokens", "49"], 2, "holds 2048"),
        (["bench", "/no/such/model"], 1, "no such directory"),
        (["generate", "{model}", "x", "--threads", "0"], 2, "--threads"),
        (["generate", "{model}", "x", "--no-such-option"], 2, "No such option"),
        (["no-such-command"], 2, "No such command"),
    ],
)
def test_errors_are_one_line_and_a_code(model, arguments, code, message) -> None:
    result = _run(*(a.format(model=model) for a in arguments))
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    if message and code == 1:
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_a_read_error_ends_with_code_1_after_the_text_so_far(model, monkeypatch) -> None:
    forward = FakeEngine.forward

    def fail_later(self, state, ids, *rest, **options):
        if len(self.calls) == 3:
            raise flashmoe.ReadError("layer-000.safetensors: short read at byte 123")
        return forward(self, state, ids, *rest, **options)

    monkeypatch.setattr(FakeEngine, "forward", fail_later)
    result = _run("generate", model, "x")
    assert result.exit_code == 1
    assert result.stdout.startswith("Hi ")
    assert "error: layer-000.safetensors: short read" in result.stderr


def test_ctrl_c_ends_with_code_130(model, monkeypatch) -> None:
    def interrupted(self, *_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeEngine, "forward", interrupted)
    result = _run("generate", model, "x")
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr


def test_demo_streams_from_the_model_in_the_package(model, monkeypatch) -> None:
    monkeypatch.setattr(source, "demo_directory", lambda: Path(model))
    result = _run("demo", "Hello")
    assert result.exit_code == 0
    assert result.stdout == "Hi there.\n"
    assert "> Hello\n" in result.stderr
    assert "tok/s" in result.stderr


def test_a_package_without_the_demo_model_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(source, "__file__", str(tmp_path / "checkpoint" / "find.py"))
    result = _run("demo")
    assert result.exit_code == 1
    assert "demo model is not in this installation" in result.stderr


def test_bench_measures_several_runs_and_says_where_the_time_goes() -> None:
    arguments = ("bench", "demo", "--runs", "2", "--prompt-tokens", "7", "--tokens", "5")
    result = _run(*arguments, "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert [run["generated_tokens"] for run in answer["runs"]] == [5, 5]
    assert answer["median"]["decode_rate"] > 0
    decode = answer["decode"]
    spent = sum(sum(layer.values()) for layer in decode["layers"]) + decode["head_seconds"]
    assert spent <= decode["seconds"]
    assert decode["head_seconds"] > 0
    assert 0 < decode["prompt_busy"] <= 1
    assert 0 < decode["busy"] <= 1
    assert len(decode["layers"]) == len(decode["layer_types"])
    for layer in decode["layers"]:
        assert layer.keys() == set(PARTS)
        assert all(layer[part] > 0 for part in PARTS if part != "wait"), layer
    assert "run 2 of 2" in result.stderr
    shown = _run(*arguments).stdout
    for label in ("prefill", "decode", "first token", "experts read", "from memory", "peak memory"):
        assert f"  {label}" in shown
    for label in ("GatedDeltaNet", "attention", "router", "experts", "head", "a layer, ms"):
        assert f"    {label}" in shown
    assert "that memory gives" in shown
    assert "  threads computing" in shown


def test_pack_takes_its_options_and_says_what_it_wrote(monkeypatch, tmp_path) -> None:
    from flashmoe.pack import pack  # noqa: PLC0415

    asked = {}

    def fake(source, destination, *, progress, **options):
        asked.update(options, source=source, destination=destination)
        progress(1, 2)
        progress(2, 2)
        return pack.PackSummary(Path(destination), 2_000_000, 1_000_000, ("layers.0.odd",))

    monkeypatch.setattr(pack, "pack", fake)
    result = _run("pack", "a", "b", "--bits", "2", "--group-size", "32")
    assert asked == {
        "source": "a",
        "destination": "b",
        "bits": 2,
        "group_size": 32,
        "threads": None,
    }
    assert result.stdout == "b: 2 MB, 1 MB of it written now\n"
    assert "groups of 32 do not divide it: layers.0.odd" in result.stderr
    answer = json.loads(_run("pack", "a", "b", "--json").stdout)
    assert answer == {
        "destination": "b",
        "nbytes": 2_000_000,
        "written": 1_000_000,
        "dense": ["layers.0.odd"],
    }


def test_a_pack_runs_and_a_wrong_option_is_refused(checkpoint, tmp_path) -> None:
    source, destination = str(checkpoint("bf16")), str(tmp_path / "packed")
    assert _run("pack", source, destination, "--bits", "3").exit_code == 2
    assert _run("pack", source, destination, "--group-size", "32").exit_code == 0
    info = json.loads(_run("info", destination, "--json", "--disk-rate", "1").stdout)
    roles = {role["name"]: role["formats"] for role in info["summary"]["roles"]}
    assert roles["routed experts"] == ["4-bit, group 32"]
    with flashmoe.Model(destination) as model:
        assert len(list(model.generate([5, 6], max_tokens=3))) == 3


def test_version_and_help_need_no_heavy_imports() -> None:
    code = (
        "import sys; sys.argv = ['flashmoe', '--help']\n"
        "from flashmoe.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'rich.console', 'tokenizers', 'jinja2', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert _run("--version").stdout == f"flashmoe {flashmoe.__version__}\n"


# From here on the real program with the real engine.


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    command = [sys.executable, "-m", "flashmoe", *arguments]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def test_ctrl_c_stops_the_real_program_at_once(endless: Path) -> None:
    process = _start("generate", str(endless), "the fox", "--temperature", "1", "--seed", "1")
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"stopped" in errors
    assert b"Traceback" not in errors


def test_output_into_a_closed_pipe_ends_quietly(endless: Path) -> None:
    process = _start("generate", str(endless), "the fox", "--temperature", "1", "--seed", "1")
    assert process.stdout.read(20)
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 141
    assert b"Traceback" not in errors
    assert b"BrokenPipe" not in errors


def test_the_real_program_repeats_itself_with_a_seed(endless: Path) -> None:
    outputs = []
    for threads in ("1", "2"):
        process = _start(
            *("generate", str(endless), "the fox", "--raw", "-n", "40", "--temperature", "1"),
            *("--seed", "3", "--threads", threads, "--json"),
        )
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        outputs.append([token["id"] for token in json.loads(out)["tokens"]])
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 40


def test_docs_hold_every_commands_help() -> None:
    if f"typer {typer.__version__}" not in DOCS.read_text():
        pytest.skip("docs/cli.md was made with another typer, which may lay help out differently")
    made = subprocess.run(
        [sys.executable, str(DOCS.parent / "cli_help.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr


def test_every_option_is_in_the_docs() -> None:
    text = DOCS.read_text()
    names = [
        name
        for command in typer.main.get_command(app).commands.values()
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--")
    ]
    assert len(names) > 30
    assert [name for name in names if name not in text] == []
