"""Layers of tests, and fixtures that every test may use."""

import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from hub_server import Hub

HERE = Path(__file__).parent
LAYERS: dict[str, tuple[str, ...]] = {
    "reference": ("torch", "transformers", "mlx", "mlx_lm"),
    "metal": ("clang", "cmake", "ninja", "nanobind", "ziglang"),
    "cross": ("cmake", "ninja", "nanobind", "ziglang"),
    "clients": ("starlette", "uvicorn", "openai", "anthropic", "langchain_openai"),
    "campaign": (),
}
"""The folders beside the fast layer and the modules that the extra of that name brings."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("layers", "layers of tests beside the fast one (see CONTRIBUTING.md)")
    for layer in LAYERS:
        group.addoption(f"--{layer}", action="store_true", help=f"also run tests/{layer}")
    group.addoption("--all", action="store_true", help="also run every layer")


def pytest_configure(config: pytest.Config) -> None:
    missing = {
        layer: [module for module in LAYERS[layer] if importlib.util.find_spec(module) is None]
        for layer in LAYERS
        if config.getoption("all") or config.getoption(layer)
    }
    lacking = [layer for layer, modules in missing.items() if modules]
    if lacking:
        modules = sorted({module for layer in lacking for module in missing[layer]})
        raise pytest.UsageError(
            f"{', '.join(f'--{layer}' for layer in lacking)}: no {', '.join(modules)} here;"
            f" pip install '.[{','.join(lacking)}]'"
        )
    # Started in a shell's background, where SIGINT is ignored, tests of Ctrl-C still see it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes for the whole of the fast layer; one for all else, which may build at length what
    its tests share."""
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    if whole and not any(config.getoption(option) for option in (*LAYERS, "all")):
        return min(os.cpu_count() or 1, 4)
    config.option.dist = "no"
    return 0


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    layer = _layer(collection_path)
    return True if layer and not _wanted(layer, config) else None


def _layer(path: Path) -> str | None:
    """The layer that a file or folder belongs to, None for the fast one."""
    if not path.is_relative_to(HERE) or path == HERE:
        return None
    name = path.relative_to(HERE).parts[0]
    return name if name in LAYERS else None


def _wanted(layer: str, config: pytest.Config) -> bool:
    """Asked for by its option, or by naming a file or folder of it."""
    if config.getoption("all") or config.getoption(layer):
        return True
    paths = (config.invocation_params.dir / str(name).partition("::")[0] for name in config.args)
    return any(_layer(path.resolve()) == layer for path in paths)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint("mlx-4") is the directory of that variant of tests/checkpoints.py, made once.

    A test that changes it copies it first.
    """
    from checkpoints import make  # noqa: PLC0415  (here and below: tests of kernels need numpy only)

    root = tmp_path_factory.mktemp("checkpoints")

    def get(name: str) -> Path:
        directory = root / name
        return directory if directory.exists() else make(directory, name)

    return get


@pytest.fixture(scope="session")
def maker() -> ModuleType:
    """benchmarks/make_checkpoint.py, which makes checkpoints of any shape."""
    path = HERE.parent / "benchmarks/make_checkpoint.py"
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
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for section in (config, config.get("text_config", {})):
        section.pop("eos_token_id", None)
    path.write_text(json.dumps(config))
    return directory


@pytest.fixture
def hub(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator["Hub"]:
    """A Hugging Face hub of one model, on this machine."""
    from hub_server import serve  # noqa: PLC0415

    directory = Path(shutil.copytree(checkpoint("nested-bf16-sharded"), tmp_path / "published"))
    (directory / "pytorch_model.bin").write_bytes(b"the same weights again")
    (directory / "README.md").write_text("# A model")
    with serve(directory) as server:
        yield server
