"""Served models, one of each for all tests of this layer."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from serving import Served, reasoning_model, served

import flashmoe


@pytest.fixture(scope="session")
def demo_model() -> Iterator[flashmoe.Model]:
    with flashmoe.Model("demo", precision="float32") as model:
        yield model


@pytest.fixture(scope="session")
def thinking_model(
    tmp_path_factory: pytest.TempPathFactory, maker: ModuleType
) -> Iterator[flashmoe.Model]:
    with reasoning_model(Path(tmp_path_factory.mktemp("thinks")) / "thinks", maker) as model:
        yield model


@pytest.fixture(scope="session")
def _demo_server(demo_model: flashmoe.Model) -> Iterator[Served]:
    with served(demo_model) as server:
        yield server


@pytest.fixture(scope="session")
def _thinking_server(thinking_model: flashmoe.Model) -> Iterator[Served]:
    with served(thinking_model) as server:
        yield server


def _fresh(server: Served) -> Served:
    """The server as if nothing had been asked yet."""
    server.wait_until_idle()
    server.says(None)
    server.before_token = lambda: None
    server.prompts.clear()
    server.model.conversations.clear()
    return server


@pytest.fixture
def demo(_demo_server: Served) -> Served:
    """The demo model, which says what it will until told what to say."""
    return _fresh(_demo_server)


@pytest.fixture
def thinker(_thinking_server: Served) -> Served:
    """A model whose template lets it reason; what it says makes sense only where it is told."""
    return _fresh(_thinking_server)
