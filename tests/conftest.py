"""Fixtures that every test may use."""

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from metal_simulator import Simulator, missing


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint("mlx-4") is the directory of that variant of tests/checkpoints.py, made once.

    A test that changes it copies it first.
    """
    from checkpoints import make  # noqa: PLC0415  (it imports torch, which most tests do not need)

    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        directory = root / name
        return directory if directory.exists() else make(directory, name)

    return get


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    """flashmoe on a simulated GPU; FLASHMOE_SIMULATOR names a directory to keep its build in."""
    reason = missing()
    if reason:
        pytest.skip(reason)  # names Debian's packages, which .ci/run installs
    keep = os.environ.get("FLASHMOE_SIMULATOR")
    return Simulator(Path(keep) if keep else tmp_path_factory.mktemp("simulator"))


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    """benchmarks/make_checkpoint.py, which makes checkpoints without torch."""
    path = Path(__file__).parents[1] / "benchmarks/make_checkpoint.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def endless(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model with a tokenizer and a template, that never ends its text."""
    from fake_engine import TEMPLATE, make_tokenizer  # noqa: PLC0415

    directory = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(checkpoint("mlx-4"), directory)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "generation_config.json").unlink(missing_ok=True)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for section in (config, config.get("text_config", {})):
        section.pop("eos_token_id", None)
    path.write_text(json.dumps(config))
    return directory
