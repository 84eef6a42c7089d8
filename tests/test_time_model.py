"""The time model: a checkpoint's bytes, arithmetic by hand, and what others published."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from published import QWEN35_397B
from test_info import big  # noqa: F401  (a fixture)

from flashmoe import ArgumentError
from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.cli.report_info import family_lines, info_lines
from flashmoe.machine import probe
from flashmoe.machine.chips import find_chip, this_chip
from flashmoe.measure import fit as fits
from flashmoe.measure.family import FAMILY
from flashmoe.measure.fit import Target, fit_family, fit_published
from flashmoe.measure.info import describe, summarise
from flashmoe.measure.rates import cpu_rates, gpu_rates
from flashmoe.measure.time_model import (
    CPU_LAUNCHES,
    TEXT_HITS,
    Rates,
    bytes_by_layer,
    bytes_of,
    predict,
    text_hits,
    touched,
)


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """benchmarks/predict.py, which makes the tables of docs/metal.md."""
    path = Path(__file__).parents[1] / "benchmarks/predict.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("predict", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["predict"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_original_engines_published_times_are_within_15_percent(tables: ModuleType) -> None:
    rows = tables.published()
    assert [theirs for _, theirs, _ in rows] == [1.22, 0.55, 2.41, 3.90, 4.36, 5.74]
    for what, theirs, ours in rows:
        assert abs(ours / theirs - 1) < 0.15, what


def test_the_tables_of_the_docs_are_what_the_model_says(tables: ModuleType) -> None:
    page = tables.PAGE.read_text()
    for made in (tables._original(), tables._macs(), tables._arithmetic()):
        assert made in page


def test_the_limit_of_an_m3_max_with_the_published_hits(big: Checkpoint) -> None:  # noqa: F811
    chip = find_chip("M3 Max 48GB")
    rates = gpu_rates(chip.bandwidth, page_cache=True, disk=5.5e9)
    assert predict(bytes_of(big), rates, 4, 0.71).limit == pytest.approx(9.3, abs=0.1)


def test_the_family_is_what_config_json_and_headers_say(big: Checkpoint, tmp_path: Path) -> None:  # noqa: F811
    model = FAMILY[0]
    summary = summarise(big, 4)
    assert model.experts == summary.experts
    assert model.resident == summary.resident
    assert bytes_by_layer(model.config, model.format_of) == bytes_of(big)
    (tmp_path / "config.json").write_text(json.dumps(QWEN35_397B))
    assert ModelConfig.of(Metadata(tmp_path)) == dataclasses.replace(
        model.config, eos_token_ids=ModelConfig.of(Metadata(tmp_path)).eos_token_ids
    )
    assert model.experts_per_token == 4
    assert len({m.name for m in FAMILY}) == len(FAMILY)


def test_a_token_touches_every_matrix_once(big: Checkpoint) -> None:  # noqa: F811
    matrices = sum(m.format.nbytes for name, m in big.matrices.items() if name != "embed_tokens")
    state = 45 * 2 * 4 * (64 * 128 * 128 + 12288 * 4)
    assert touched(bytes_of(big), 0) == matrices + state
    assert touched(bytes_of(big), 4) - touched(bytes_of(big), 0) == 60 * 4 * 7_077_888
    behind = touched(bytes_of(big, context=1000), 0) - touched(bytes_of(big), 0)
    assert behind == 15 * 1000 * 2 * 2 * 2 * 256


def _rates(**changes: object) -> Rates:
    rates = Rates(1e9, {"": 1e9}, 0.0, 0.0, 1e9, None, False, CPU_LAUNCHES)
    return dataclasses.replace(rates, **changes)  # type: ignore[arg-type]


def test_seconds_are_bytes_over_rates_and_launches_and_waits(big: Checkpoint) -> None:  # noqa: F811
    work = bytes_of(big)
    needed = 60 * 4 * 7_077_888
    everything = touched(work, 4) / 1e9
    assert predict(work, _rates(), 4, 1.0).seconds == pytest.approx(everything)
    assert predict(work, _rates(), 4, 0.75).reading == pytest.approx(0.25 * needed / 1e9)
    copied = predict(work, _rates(page_cache=2e9), 4, 0.75)
    assert copied.reading == pytest.approx((0.25 / 1e9 + 0.75 / 2e9) * needed)
    waits = predict(work, _rates(wait=1e-3), 4, 1.0)
    assert waits.seconds == pytest.approx(everything + 61e-3)  # 60 layers and the head
    launched = predict(work, _rates(dispatch=1e-3), 4, 1.0)
    assert launched.seconds == pytest.approx(everything + 1e-3 * (45 * 11 + 15 * 10 + 1))
    eight = predict(work, _rates(product={"": 1e9, "8-bit, group 64": 2e9}), 4, 1.0)
    assert eight.router == pytest.approx(predict(work, _rates(), 4, 1.0).router / 2)


def test_reading_hides_behind_experts_only_where_they_overlap(big: Checkpoint) -> None:  # noqa: F811
    work = bytes_of(big)
    alone = predict(work, _rates(), 4, 0.5)
    both = predict(work, _rates(overlap=True), 4, 0.5)
    # A layer's shared expert and all but the last of its experts are computed while it reads.
    assert alone.reading - both.reading == pytest.approx(60 * 2 * 7_077_888 / 1e9)
    assert predict(work, _rates(overlap=True, disk=1e12), 4, 0.5).reading == 0
    for rates in (_rates(), _rates(overlap=True), _rates(overlap=True, product={"": 3e9})):
        for hits in (0.0, 0.5, 1.0):
            prediction = predict(work, rates, 4, hits)
            assert prediction.tokens_per_second <= prediction.limit * (1 + 1e-9)


def test_hits_of_a_text_rise_with_memory_through_the_published_ones() -> None:
    for share, hits in TEXT_HITS:
        assert text_hits(share) == pytest.approx(hits)
    steps = [text_hits(share) for share in np.linspace(0, 1.2, 200)]
    assert steps == sorted(steps)
    assert steps[-1] == pytest.approx(1)
    assert all(text_hits(share) >= share for share in np.linspace(0, 1, 50))


def test_chips_are_told_by_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_chip("M3 Max 48GB").bandwidth == 400e9
    assert find_chip("apple m3 max, 36 gb").bandwidth == 300e9
    assert find_chip("M4 16GB").disk < find_chip("M4 Pro 24GB").disk
    for wrong in ("M3 Max", "M9 16GB", "M3 Mega 48GB", "48GB", "M3 Max 47GB", "M4Max48"):
        with pytest.raises(ArgumentError):
            find_chip(wrong)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(probe, "processor", lambda: "Apple M4 Max")
    monkeypatch.setattr(probe, "total_memory", lambda: 64 << 30)
    found = this_chip()
    assert found is not None and found.bandwidth == 546e9
    monkeypatch.setattr(probe, "processor", lambda: "Apple M99")
    assert this_chip() is None
    monkeypatch.setattr(sys, "platform", "linux")
    assert this_chip() is None


def test_this_machines_rates_are_measured_by_format() -> None:
    work = bytes_by_layer(FAMILY[0].config, FAMILY[0].format_of)
    assert list(work.formats) == ["4-bit, group 64", "8-bit, group 64"]
    rates = cpu_rates(work.formats, 1, 1e10, page_cache=True)
    assert set(rates.product) == {*work.formats, ""}
    assert all(rate > 1e7 for rate in rates.product.values())
    assert 0 < rates.dispatch < 0.01


def test_other_macs_are_answered_for_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> float:
        raise AssertionError("measured")

    for name in ("memory_rate", "disk_rate", "available_memory"):
        monkeypatch.setattr(probe, name, never)
    by_name = {model.name: fit for model, fit in fit_family(Target(machine="M3 Max 48GB"))}
    small = by_name["mlx-community/Qwen3.5-35B-A3B-4bit"]
    large = by_name["mlx-community/Qwen3.5-397B-A17B-4bit"]
    assert small.cached_share == 1
    assert not small.reads_disk
    assert 0.1 < large.cached_share < 0.2
    assert large.on_text.tokens_per_second > large.prediction.tokens_per_second
    assert 4 < large.on_text.tokens_per_second < 8
    assert (large.machine, large.backend, large.disk_free) == ("M3 Max 48 GB", "metal", None)
    lines = "\n".join(family_lines([(FAMILY[0], large)]))
    assert "M3 Max 48 GB" in lines and "fits M3 Max 48 GB" in lines
    # 8 GB leave no room for what every token needs.
    (tiny,) = [f for m, f in fit_family(Target(machine="M2 8GB")) if m is FAMILY[2]]
    assert tiny.fits_memory  # 3.5 of 6 GB
    lines = family_lines(fit_family(Target(machine="M1 4GB")))
    assert any(line.rstrip().endswith("too little memory on M1 4 GB") for line in lines)


def test_a_slow_drive_is_warned_of_only_where_it_is_read() -> None:
    slow = fit_published(Target(machine="M3 Max 48GB", disk_rate=0.5e9), FAMILY[0], 4)
    assert slow.slow_disk
    assert any(
        "warning: this drive gives 0.5 GB/s" in line for line in family_lines([(FAMILY[0], slow)])
    )
    for rate, model in ((1.1e9, FAMILY[0]), (0.5e9, FAMILY[-1])):
        fit = fit_published(Target(machine="M3 Max 48GB", disk_rate=rate), model, 4)
        assert not fit.slow_disk


def test_threads_cache_and_experts_change_the_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def measured(formats: object, threads: int, memory: float, *, page_cache: bool) -> Rates:
        asked.append(threads)
        return _rates(memory=memory, product={"": threads * 1e9}, overlap=True)

    monkeypatch.setattr(fits, "cpu_rates", measured)
    monkeypatch.setattr(sys, "platform", "linux")
    here = Target(memory_rate=1e11, disk_rate=1e8, threads=1, cache="40GB")
    one = fit_published(here, FAMILY[2], 8)
    two = fit_published(dataclasses.replace(here, threads=2), FAMILY[2], 8)
    few = fit_published(here, FAMILY[2], 4)
    none = fit_published(dataclasses.replace(here, cache="1GB"), FAMILY[2], 8)
    assert asked == [1, 2, 1, 1]
    assert one.cached_share == pytest.approx(40e9 / FAMILY[2].experts)
    speeds = [f.prediction.tokens_per_second for f in (none, one, two, few)]
    assert speeds[0] < speeds[1] < min(speeds[2:])


@pytest.mark.parametrize("arguments", [{}, {"cache": "1MB"}, {"cache": 0}])
def test_the_demo_model_reads_sensibly(arguments: dict[str, int | str]) -> None:
    info = describe("demo", target=Target(**arguments))  # type: ignore[arg-type]
    text = "\n".join(info_lines(info))
    assert "e+0" not in text
    assert " 0.0 GB/s" not in text
    assert ("drive" in text) == info.fit.reads_disk
    encoded = json.loads(json.dumps(info.to_dict()))
    assert encoded["fit"]["prediction"]["seconds"] > 0
    parts = ("mixer", "router", "experts", "wait", "reading", "head")
    assert sum(encoded["fit"]["on_text"][part] for part in parts) == pytest.approx(
        encoded["fit"]["on_text"]["seconds"]
    )


def test_what_cannot_be_asked_is_refused() -> None:
    for wrong in ({"disk_rate": 0.0}, {"memory_rate": -1.0}, {"machine": "M0 1GB"}, {"cache": "x"}):
        with pytest.raises(ArgumentError):
            describe("demo", target=Target(**wrong))  # type: ignore[arg-type]


def test_reads_pause_between_one_layer_and_the_next(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1 << 20))
    asleep: list[float] = []
    real = probe.time.sleep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe.time, "sleep", lambda s: (asleep.append(s), real(0))[1])
        rate = probe.disk_rate([path], 1 << 16, 0.01, 2, pause=0.25)
        cached = probe.disk_rate([path], 1 << 16, 0.01, 2, cached=True)
    assert cached is not None and cached > 0
    assert rate is None or set(asleep) >= {0.25}
