"""The campaign in its short form: fixed seeds, meant for under three minutes on two idle cores.

The long one is a command: see run.py. What it found is in docs/campaign.md.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


@pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD and /proc")
def test_nothing_crashes_hangs_leaks_or_goes_on_wrongly(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    numbers = ["--inputs", "2160", "--faults", "600", "--interrupts", "48", "--kills", "12"]
    command = [sys.executable, RUN, *numbers, "--out", out, "--scratch", tmp_path]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads(out.read_text())
    counts = {title: sum(kinds.values()) for title, kinds in result["counts"].items()}
    assert counts["damaged inputs"] >= 2000 and counts["faults"] >= 500
    assert result["past_header"] >= 0.4 * counts["damaged inputs"]
    refused = result["counts"]["damaged inputs"]["refused"]
    assert refused >= 0.4 * counts["damaged inputs"], "the damage does little"


@pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD and /proc")
def test_no_allocation_that_fails_spoils_a_later_answer(tmp_path: Path) -> None:
    command = [sys.executable, RUN, "--only", "generate: new", "--faults", "1000"]
    command += ["--inputs", "0", "--interrupts", "0", "--kills", "0", "--scratch", tmp_path]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "faults: " in run.stdout
