"""flashmoe doctor, whole, on the simulated GPU."""

import json
from typing import Any

import pytest
from metal_simulator import Simulator

from flashmoe.checkpoint.open import Checkpoint
from flashmoe.measure.family import Published
from flashmoe.measure.specialised import needed, plans_of

DOCTOR = """
from flashmoe.cli.main import app
try:
    app(["doctor", "--quick", "--json"])
except SystemExit as end:
    print(end.code)
"""


def _doctor(simulator: Simulator, fail: str) -> tuple[Any, int]:
    """The report, and the program's exit code."""
    *report, code = simulator.python(DOCTOR, settings={"FAIL": fail}).splitlines()
    return json.loads("\n".join(report)), int(code)


@pytest.fixture(scope="module")
def report(simulator: Simulator) -> Any:
    found, code = _doctor(simulator, "nothing but warn")
    assert code == 0
    return found


def test_every_kernel_and_the_demo_model_are_right(report: Any) -> None:
    assert report["good"]
    cpu, metal = report["backends"]
    assert [c["name"] for c in metal["checks"]] == [c["name"] for c in cpu["checks"]]
    assert all(c["error"] is not None and c["seconds"] > 0 for c in metal["checks"])
    assert metal["demo"]["same_tokens"]


def test_all_kernels_that_published_models_need_are_compiled_and_run(report: Any) -> None:
    cpu, metal = report["backends"]
    assert (metal["missing"], cpu["compiled"]) == ([], [])
    assert needed() < set(metal["compiled"])


def test_what_a_model_runs_is_what_was_planned_for_it(simulator: Simulator) -> None:
    """The demo model's formats are those of the published ones."""
    code = """
import sys
from pathlib import Path
from engines import TestEngine, random_ids
for precision in ("float32", "int8"):
    engine = TestEngine(Path(sys.argv[1]), backend="metal", precision=precision, overlap=True)
    state = engine.native.new_state()
    for count in (140, 4, 1):
        engine.logits(random_ids(6000, count), state)
"""
    demo = simulator.site / "flashmoe" / "demo_model"
    lines = simulator.trace(code, str(demo))
    found = {line.removeprefix("pipeline ") for line in lines if line.startswith("pipeline ")}
    planned = plans_of(Published("", Checkpoint.open(demo).config))
    assert len(found) > 15
    assert found <= {" ".join(map(str, (plan.kernel, *plan.constants))) for plan in planned}


def test_the_device_and_all_that_its_compiler_said_are_reported(report: Any) -> None:
    metal = report["backends"][1]
    assert metal["device"] == {
        "device": "Metal simulator",
        "family": "Apple9",
        "maxBufferLength": str(32 << 30),
        "recommendedMaxWorkingSetSize": str(64 << 30),
        "compiler": "warning: unused variable 'simulator'",
    }
    latency = metal["latency"]
    assert 0 < latency["start"] < 1
    assert 0 < latency["wake"] < 1


def test_a_pipeline_that_does_not_compile_is_said_with_exit_code_1(simulator: Simulator) -> None:
    found, code = _doctor(simulator, "pipeline")
    assert code == 1
    cpu, metal = found["backends"]
    assert all(check["error"] is not None for check in cpu["checks"])
    assert all("too many registers, says" in check["failure"] for check in metal["checks"])
    assert "too many registers, says" in metal["demo"]["error"]
