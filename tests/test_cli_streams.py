"""The command line where streams are full, closed or of another encoding: no traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_prompt_from_a_closed_input_is_told_to_be_empty() -> None:
    run = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *MODEL, "--raw", "-n", "2"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "the prompt is empty" in run.stderr, run.stderr
