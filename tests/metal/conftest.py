"""The simulated GPU that tests of the Metal host code share."""

import os
from pathlib import Path

import pytest
from metal_simulator import Simulator, missing


@pytest.fixture(scope="session")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Simulator:
    """flashmoe on a simulated GPU; FLASHMOE_SIMULATOR names a directory to keep its build in."""
    reason = missing()
    if reason:
        pytest.skip(reason)  # names Debian's packages, which .ci/run installs
    keep = os.environ.get("FLASHMOE_SIMULATOR")
    return Simulator(Path(keep) if keep else tmp_path_factory.mktemp("simulator"))
