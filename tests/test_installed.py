"""The sources of GPU kernels are found in the package as installed, and in a zipped application."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flashmoe

SHADERS = Path(__file__).parents[1] / "metal"
_LIST = """
import sys
# Else an editable install would come before PYTHONPATH.
sys.meta_path = [f for f in sys.meta_path if type(f).__name__ != "ScikitBuildRedirectingFinder"]
from flashmoe.generate.engine import kernel_sources
folder = kernel_sources()
assert kernel_sources() == folder
for file in sorted(folder.iterdir()):
    print(folder / file.name, len(file.read_bytes()))
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """The package with kernels in it, as on macOS; without a native core, which no zip can hold."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "demo_model")
    package = Path(flashmoe.__file__).parent
    shutil.copytree(package, tmp_path / "site" / "flashmoe", ignore=ignored)
    shutil.copytree(SHADERS, tmp_path / "site" / "flashmoe" / "metal", dirs_exist_ok=True)
    return tmp_path / "site"


def found(place: Path) -> dict[Path, int]:
    """The kernel files that the package in `place` finds, and their bytes."""
    run = subprocess.run(
        [sys.executable, "-c", _LIST],
        env={**os.environ, "PYTHONPATH": str(place)},
        cwd=place.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    lines = (line.rpartition(" ") for line in run.stdout.splitlines())
    return {Path(path): int(size) for path, _, size in lines}


def test_kernels_are_found_where_they_are_installed(site: Path) -> None:
    expected = {site / "flashmoe" / "metal" / f.name: f.stat().st_size for f in SHADERS.iterdir()}
    assert found(site) == expected


def test_kernels_in_a_zip_are_copied_to_files_until_exit(site: Path, tmp_path: Path) -> None:
    app = Path(shutil.make_archive(str(tmp_path / "app"), "zip", site))
    files = found(app)
    assert {path.name: size for path, size in files.items()} == {
        file.name: file.stat().st_size for file in SHADERS.iterdir()
    }
    assert not any(path.exists() for path in files)
