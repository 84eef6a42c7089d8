"""flashmoe doctor: right where all is right, and says what is wrong where something is."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from flashmoe import _native
from flashmoe.cli.main import app
from flashmoe.errors import DeviceError
from flashmoe.machine import probe
from flashmoe.measure import doctor, kernels
from flashmoe.measure.specialised import needed


def _backend() -> Any:
    return _native.ops.Backend("float32", 2)


class Wrong:
    """A backend one of whose operations is off by a thousandth."""

    def __init__(self, operation: str) -> None:
        self.right, self.operation = _backend(), operation

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.right, name)
        if name != self.operation:
            return method

        def wrong(*arguments: Any, **named: Any) -> Any:
            result = method(*arguments, **named)
            first = result[0] if isinstance(result, tuple | list) else result
            first[...] = first + max(1, np.abs(first).max() * 0.01)
            return result

        return wrong


def test_every_kernel_agrees_with_numpy_and_none_is_checked_twice() -> None:
    backend = _backend()
    found = [kernels.check(backend, case, 1) for case in kernels.cases(backend, quick=True)]
    assert [c.name for c in found if not c.good] == []
    assert len({c.name for c in found}) == len(found) > 60
    assert all(c.seconds > 0 and c.rate > 0 for c in found)


@pytest.mark.parametrize(
    ("operation", "named"),
    [
        ("matmul", "product"),
        ("experts", "expert"),
        ("gated_delta", "gated delta"),
        ("causal_conv", "convolution"),
        ("attention", "attention"),
        ("route", "route"),
        ("all_finite", "finite"),
        ("rms_norm", "norm"),
        ("combine", "combine"),
        ("embed", "embed"),
    ],
)
def test_a_wrong_kernel_is_named(operation: str, named: str) -> None:
    backend = Wrong(operation)
    bad = {
        case.name
        for case in kernels.cases(backend, quick=True)
        if not kernels.check(backend, case, 1).good
    }
    assert bad
    assert all(named in name for name in bad)


def test_a_kernel_that_fails_is_reported_and_the_rest_goes_on() -> None:
    def run() -> None:
        raise DeviceError("no registers left")

    found = kernels.check(_backend(), kernels.Case("broken", run, lambda _: [], 1), 1)
    assert not found.good
    assert found.failure == "no registers left"


def _run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["doctor", "--quick", *arguments])


def test_the_report_is_one_block_and_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run()
    assert result.exit_code == 0, result.stdout
    assert result.stdout.rstrip().endswith("everything is right")
    for part in ("reads at random places", f"cpu: {_native.cpu_kernels()}", "demo model, a prompt"):
        assert part in result.stdout
    assert "FAILED" not in result.stdout
    report = json.loads(_run("--json").stdout)
    assert report["good"]
    assert [backend["name"] for backend in report["backends"]] == _native.backends()
    assert {r["readers"] for r in report["reads"]} == set(doctor.READERS)
    # A GPU's waits are its own clock's; the CPU has none.
    assert report["backends"][0]["latency"] is None


def test_what_is_wrong_is_said_last_with_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.cases
    monkeypatch.setattr(
        kernels, "cases", lambda *a: (dataclasses.replace(c, bound=0.0) for c in right(*a))
    )
    monkeypatch.setattr(doctor, "BOUND", -1.0)
    monkeypatch.setattr(probe, "disk_rate", lambda *_, **__: None)
    result = _run()
    assert result.exit_code == 1
    wrong = [line for line in result.stdout.splitlines() if line.startswith("WRONG: ")]
    assert result.stdout.rstrip().splitlines()[-len(wrong) :] == wrong
    assert any(line.startswith("WRONG: cpu: product") for line in wrong)
    assert "demo model" in wrong[-1]
    assert "no room for a file" not in result.stdout


class Gpu:
    """The CPU as a GPU that compiled all that is needed but one kernel."""

    def __init__(self, _: str) -> None:
        self.right = _backend()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)

    def describe(self) -> dict[str, str]:
        return {"device": "a GPU"}

    def compiled(self) -> list[str]:
        return sorted(needed() - {"rms_norm"})


def test_a_kernel_that_models_need_and_that_never_ran_is_wrong(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_open", Gpu)
    monkeypatch.setattr(kernels, "cases", lambda *_: iter(()))
    monkeypatch.setattr(kernels, "copy_rate", lambda *_: 1e9)
    result = _run()
    assert result.exit_code == 1
    assert "MISSING 1 that the published models need" in result.stdout
    assert result.stdout.rstrip().endswith("WRONG: cpu: not compiled: rms_norm")


def test_kernels_are_needed_in_each_format_and_for_few_and_many_rows() -> None:
    found = needed()
    for bits in (2, 4, 8):
        stored = f"bits {bits}, group 64, dtype BF16"
        for quads in (1, 2):
            for kernel in ("matvec", "experts_down"):
                assert f"{kernel}, {stored}, quads {quads}" in found
        assert {
            f"{kernel}, {stored}" for kernel in ("embed", "matmul", "experts_down_tiles")
        } < found
    for kernel in ("append", "split", "merge"):
        assert {f"attention_{kernel}", f"attention_{kernel}, cache dtype BF16"} < found


def test_a_backend_that_does_not_open_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(name: str) -> Any:
        raise DeviceError(f"Metal: this machine has no GPU for {name}")

    monkeypatch.setattr(doctor, "_open", closed)
    report = doctor.examine(quick=True)
    assert not report.good
    assert report.backends[0].error == "Metal: this machine has no GPU for cpu"
