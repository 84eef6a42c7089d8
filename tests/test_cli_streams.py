"""The command line where streams are full, closed or of another encoding: no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import environment

MODEL = [sys.executable, "-m", "flashmoe", "generate", "demo"]
PROMPT = ["--raw", "Once upon a time", "-n", "8", "--seed", "1", "--temperature", "1"]
CASES: dict[str, tuple[str, dict[str, str], int, str]] = {
    "a full disk": ("> /dev/full", {}, 1, "standard output: cannot be written: No space left"),
    "a full disk, as JSON": ("--json > /dev/full", {}, 1, "cannot be written: No space left"),
    "an output of ASCII": ("> OUT", {"PYTHONIOENCODING": "ascii"}, 0, ""),
    "the C locale": (
        "> OUT",
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        0,
        "",
    ),
    "a closed output": (">&-", {}, 0, ""),
    "a closed input": ("< /dev/null <&-", {}, 0, ""),
    "a cache of 400 digits": (f"--cache {'9' * 400} > OUT", {}, 2, "a size is at most"),
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize(("redirected", "environment", "code", "said"), CASES.values(), ids=CASES)
def test_no_stream_ends_in_a_traceback(tmp_path, redirected, environment, code, said) -> None:
    redirected = redirected.replace("OUT", str(tmp_path / "out"))
    run = subprocess.run(
        ["sh", "-c", f'"$@" {redirected}', "sh", *MODEL, *PROMPT],
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | environment,
    )
    assert "Traceback" not in run.stderr and "Error:" not in run.stderr, run.stderr
    assert run.returncode == code, run.stderr
    assert said in run.stderr


PRINTED = {
    "version": ["--version"],
    "help": ["--help"],
    "a command's help": ["eval", "--help"],
    "info": ["info", "demo", "--disk-rate", "5", "--memory-rate", "10"],
}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("printed", PRINTED)
def test_what_is_printed_on_a_full_disk_is_one_line_of_an_error(printed) -> None:
    run = subprocess.run(
        ["sh", "-c", '"$@" > /dev/full', "sh", *MODEL[:3], *PRINTED[printed]],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr == "error: standard output: cannot be written: No space left on device\n"


def test_no_file_is_opened_in_the_place_of_a_stream_that_is_closed() -> None:
    code = (
        "import os, sys, flashmoe.cli.main as cli\n"
        "cli.run = lambda: os.open(sys.argv[1], os.O_RDONLY)\n"
        "from flashmoe.__main__ import main; main()"
    )
    run = subprocess.run(
        ["sh", "-c", '"$@" >&- <&-', "sh", sys.executable, "-c", code, __file__], check=False
    )
    assert run.returncode > 2


@pytest.mark.parametrize("threads", ["0", "9" * 400])
@pytest.mark.parametrize("command", [["info", "demo"], ["pack", "demo", "/dev/null"]], ids=str)
def test_threads_that_no_machine_has_are_refused(command, threads) -> None:
    run = subprocess.run(
        [*MODEL[:3], *command, "--threads", threads],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "Invalid value for '--threads'" in run.stderr


@pytest.mark.parametrize("imported", ["typer", "numpy", "flashmoe.cli.report_info"])
def test_ctrl_c_while_modules_are_imported_shows_no_traceback(tmp_path, imported) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Press:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {imported!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\n"
    )
    run = subprocess.run(
        [*MODEL[:3], *PRINTED["info"]],
        check=False,
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path])),
    )
    assert run.returncode == 130
    assert "Traceback" not in run.stderr and "KeyboardInterrupt" not in run.stderr


def test_a_prompt_from_a_closed_input_is_told_to_be_empty() -> None:
    run = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *MODEL, "--raw", "-n", "2"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "the prompt is empty" in run.stderr, run.stderr
