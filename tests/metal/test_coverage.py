"""Every line of the kernels is executed by their tests (gcov over the executor's build)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from shader_executor import ROOT, SHADERS, build, compiler


def _counts(directory: Path) -> dict[str, dict[int, int]]:
    """How often each line of each shader was executed."""
    data = [str(path) for path in directory.glob("*shaders*.gcda")]
    command = ["gcov", "--json-format", "--stdout", *data]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=directory)
    counts: dict[str, dict[int, int]] = {}
    for report in output.stdout.splitlines():
        for file in json.loads(report)["files"]:
            path = Path(file["file"])
            if path.parent != SHADERS:
                continue
            lines = counts.setdefault(path.name, {})
            source = path.read_text().splitlines()
            for line in file["lines"]:
                number = line["line_number"]
                if source[number - 1].startswith("KERNEL("):
                    continue  # the entry that a GPU calls; the executor calls what is behind it
                lines[number] = lines.get(number, 0) + line["count"]
    return counts


def _is_gcc() -> bool:
    cxx = compiler()
    if cxx is None or shutil.which("gcov") is None:
        return False
    version = subprocess.run([cxx, "--version"], check=True, capture_output=True, text=True).stdout
    return "Free Software Foundation" in version


@pytest.mark.skipif(not _is_gcc(), reason="needs gcc and gcov")
def test_every_line_of_the_kernels_is_executed(tmp_path: Path) -> None:
    library = build(tmp_path, flags=["-O0", "--coverage"])
    environment = {**os.environ, "FLASHMOE_SHADER_LIBRARY": str(library)}
    command = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests/metal/test_kernels.py")]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    counts = _counts(tmp_path)
    assert set(counts) >= {path.name for path in SHADERS.glob("*.metal")}
    for name, lines in sorted(counts.items()):
        executed = sum(count > 0 for count in lines.values())
        print(f"{name}: {executed} of {len(lines)} lines executed")
    missed = [f"{name}:{n}" for name, lines in counts.items() for n in lines if not lines[n]]
    assert missed == []
