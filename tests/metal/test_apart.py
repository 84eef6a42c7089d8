"""A GPU may have memory that the host cannot reach: here the CPU backend computes in such memory.

States and slots are brought there and back by `Backend::copy`; nothing else may touch them.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from metal_simulator import Simulator

HEADER = Path(__file__).parent / "apart.h"

# Prompt and decode; a fork, which goes its own way; a state that was exported and restored.
LOGITS = """
import sys
from pathlib import Path
import numpy as np
from engines import TestEngine, random_ids
engine = TestEngine(Path(sys.argv[1]), cache_bytes=int(sys.argv[2]))
state = engine.native.new_state()
found = [engine.logits(random_ids(300, 150), state)]
fork = state.fork()
found += [engine.logits([5, 6], state), engine.logits([7], fork)]
restored = engine.native.new_state()
restored.restore(fork.position, fork.export())
found += [engine.logits([8], fork), engine.logits([8], restored)]
np.save(sys.argv[3], np.concatenate(found))
"""


@pytest.fixture(scope="module")
def apart(simulator: Simulator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with such a backend in place of the CPU's."""
    end = """  return std::make_unique<CpuBackend>(precision, threads);
}

}  // namespace flashmoe
"""
    apart = f"""  std::unique_ptr<Backend> make_apart(std::unique_ptr<Backend> cpu);
  return make_apart(std::make_unique<CpuBackend>(precision, threads));
}}

}}  // namespace flashmoe
#include "{HEADER}"
"""
    site = tmp_path_factory.mktemp("apart") / "apart"
    return simulator.mutant(site, "cpu/cpu_backend.cpp", end, apart)


# As few slots as can be; slots for some of the experts; slots for all.
@pytest.mark.parametrize("cache", [0, 200_000, 1 << 30])
def test_states_and_slots_may_be_out_of_the_hosts_reach(
    cache: int,
    simulator: Simulator,
    apart: Path,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    found = []
    for site in (simulator.site, apart):
        out = tmp_path / "logits.npy"
        simulator.python(LOGITS, str(checkpoint("mlx-4")), str(cache), str(out), site=site)
        found.append(np.load(out))
    assert np.array_equal(*found)
    assert np.array_equal(found[0][-1], found[0][-2])
