"""The Python module compiles and links for arm64, on Linux and on macOS (compile.sh)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("target", ["aarch64-linux-gnu", "aarch64-macos"])
def test_the_module_compiles_and_links(target: str, tmp_path: Path) -> None:
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        ["bash", str(Path(__file__).with_name("compile.sh")), str(tmp_path), target],
        env={**os.environ, "PATH": tools},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert list((tmp_path / target).glob("_native*"))
