"""Run Mixture-of-Experts language models far larger than memory.

import flashmoe

model = flashmoe.Model("demo")  # or a hub id, or a directory
for token in model.generate("Once upon a time", max_tokens=100):
    print(token.text, end="", flush=True)
"""

from __future__ import annotations

# Nothing is imported here: until the program runs, Ctrl-C would end in a traceback.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from flashmoe.errors import (
        ArgumentError,
        CheckpointError,
        DeviceError,
        FlashMoeError,
        OutOfMemoryError,
        ReadError,
        StateError,
        WriteError,
    )
    from flashmoe.generate.answer import Token
    from flashmoe.generate.model import Model
    from flashmoe.generate.sampling import Sampling
    from flashmoe.generate.state import State
    from flashmoe.generate.stats import Stats

    __version__: str

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "DeviceError",
    "FlashMoeError",
    "Model",
    "OutOfMemoryError",
    "ReadError",
    "Sampling",
    "State",
    "StateError",
    "Stats",
    "Token",
    "WriteError",
    "__version__",
]

# On first use: the command line answers --help without numpy and the native core.
_MODULES = {
    "Model": "flashmoe.generate.model",
    "Sampling": "flashmoe.generate.sampling",
    "State": "flashmoe.generate.state",
    "Stats": "flashmoe.generate.stats",
    "Token": "flashmoe.generate.answer",
} | dict.fromkeys(
    (
        "ArgumentError",
        "CheckpointError",
        "DeviceError",
        "FlashMoeError",
        "OutOfMemoryError",
        "ReadError",
        "StateError",
        "WriteError",
    ),
    "flashmoe.errors",
)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

        try:
            return version("flashmoe")
        except PackageNotFoundError:
            return "0+uninstalled"  # run from a source tree
    if name in _MODULES:
        from importlib import import_module  # noqa: PLC0415

        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'flashmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
