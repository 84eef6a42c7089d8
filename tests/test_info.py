"""What flashmoe info says of a checkpoint, and of this machine."""

import itertools
import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from checkpoints import weights
from hub_server import Hub
from programs import environment
from published import QWEN35_397B, mlx_tensors
from tensors import load

from flashmoe import ArgumentError, Model
from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.headers import Tensor
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.cli.report import size
from flashmoe.cli.report_info import info_lines
from flashmoe.machine import probe
from flashmoe.machine.budget import check_room, default_cache
from flashmoe.measure.fit import Target
from flashmoe.measure.info import describe, summarise


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Qwen3.5-397B-A17B at 4 bits, as its headers describe it."""
    directory = tmp_path_factory.mktemp("397b")
    exceptions = {
        f"language_model.model.layers.{i}.mlp.{gate}": {"bits": 8, "group_size": 64}
        for i in range(60)
        for gate in ("gate", "shared_expert_gate")
    }
    quantization = {"bits": 4, "group_size": 64, **exceptions}
    (directory / "config.json").write_text(json.dumps(QWEN35_397B | {"quantization": quantization}))
    metadata = Metadata(directory)
    config = ModelConfig.of(metadata)
    tensors, offset, item = {}, 0, {"U32": 4, "BF16": 2, "F32": 4}
    for name, dtype, shape in mlx_tensors(config):
        nbytes = math.prod(shape) * item[dtype]
        tensors[name] = Tensor(name, Path("model.safetensors"), offset, nbytes, dtype, shape)
        offset += nbytes
    return Checkpoint.of_tensors("the 397B", metadata, config, tensors, Path("the 397B"), offset)


def test_the_397b_in_numbers(big: Checkpoint) -> None:
    summary = summarise(big, 4)
    assert summary.parameters == 396_346_350_336
    assert summary.expert == 7_077_888
    assert summary.read_per_token == 60 * 4 * 7_077_888
    assert summary.experts == 60 * 512 * 7_077_888
    # The published sizes: 209 GB of routed experts and 5.5 GB of everything else, in GiB or GB.
    assert 5.0e9 < summary.resident < 6.0e9
    # 17 billion at its own 10 experts per token give the model its name.
    assert round(summarise(big, 10).active_parameters / 1e9) in (16, 17)
    assert summary.state_fixed == 45 * 4 * (64 * 128 * 128 + 3 * 12288)
    assert summary.state_per_token == 15 * 2 * 2 * 256 * 2
    formats = {role.name: role.formats for role in summary.roles}
    assert formats["routed experts"] == ("4-bit, group 64",)
    assert formats["router"] == ("8-bit, group 64",)
    assert set(formats["norms, convolutions"]) == {"bf16", "f32"}


def test_memory_that_all_experts_do_not_fit_into_caches_some(
    big: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = partial(big.needs, 4)
    resident, experts = ask()["resident"], ask()["all_slots"]
    # Rounded to cache lines, norms as float32; slots to 16 KiB, with room for direct reads.
    stored = sum(matrix.format.nbytes for matrix in big.matrices.values())
    assert stored < resident < stored + 16e6
    assert 60 * 512 * 7_077_888 < experts < 60 * 512 * (7_077_888 + (80 << 10))
    monkeypatch.setattr(sys, "platform", "linux")
    assert default_cache(ask, 512 << 30) == experts
    assert default_cache(ask, int((experts + resident) / 0.7) + 2) == experts
    assert default_cache(ask, 48 << 30) == int(0.7 * (48 << 30)) - resident
    assert default_cache(ask, 1 << 30) == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_cache(ask, 48 << 30) == 0
    assert default_cache(ask, 512 << 30) == experts


def test_weights_or_a_cache_that_memory_has_no_room_for_are_refused(
    big: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = partial(big.needs, 4)
    check_room(ask, 30 << 30, 48 << 30)
    check_room(ask, 1 << 60, 512 << 30)  # no more than all experts
    with pytest.raises(ArgumentError, match=r"take 5\.\d+ GB .*; 1\.07 GB are .* fewer bits"):
        check_room(ask, 0, 1 << 30)
    with pytest.raises(ArgumentError, match=r"cache 64\.42 GB more; 51\.54 GB .* a smaller cache"):
        check_room(ask, 60 << 30, 48 << 30)
    monkeypatch.setattr(probe, "available_memory", lambda: 1_000_000)
    with pytest.raises(ArgumentError, match="fewer bits"):
        Model("demo")


@pytest.mark.parametrize("name", ["base", "tied", "next", "mlx-4", "mlx-4-partly-dense", "mlx-8"])
def test_parameters_and_bytes_are_those_of_the_files(
    checkpoint: Callable[[str], Path], name: str
) -> None:
    directory = checkpoint(name)
    summary = describe(str(directory), target=Target(disk_rate=1e9, memory_rate=1e10)).summary
    stored = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert summary.disk == stored
    nbytes = sum(
        tensor.array.nbytes
        for file in directory.glob("*.safetensors")
        for tensor in load(file).values()
    )
    assert sum(role.nbytes for role in summary.roles) == nbytes


def test_a_sequence_takes_what_info_says(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("mlx-4")
    summary = describe(str(directory), target=Target(disk_rate=1e9, memory_rate=1e9)).summary
    with Model(directory) as model:
        state = model.new_state()
        assert state.nbytes == summary.state_fixed
        list(model.generate([5] * 256, max_tokens=0, state=state))  # caches grow by 256 tokens
        assert state.nbytes == summary.state_fixed + 256 * summary.state_per_token


def test_parameters_are_those_that_transformers_counts(checkpoint: Callable[[str], Path]) -> None:
    for name in ("base", "tied", "ratio-4"):
        summary = describe(
            str(checkpoint(name)), target=Target(disk_rate=1e9, memory_rate=1e10)
        ).summary
        # By transformers' names: tests/reference loads them into its model, none missing or over.
        assert summary.parameters == sum(tensor.array.size for tensor in weights(name).values())


def test_the_estimate_follows_from_the_stated_rates(checkpoint, monkeypatch) -> None:
    directory = str(checkpoint("mlx-4"))
    summary = describe(directory, target=Target(disk_rate=1e6, memory_rate=1e9)).summary
    target = Target(disk_rate=1e6, memory_rate=1e9, cache=summary.experts // 2)
    fit = describe(directory, target=target).fit
    assert fit.cached_share == pytest.approx(0.5, abs=0.01)
    assert (fit.disk_rate_basis, fit.memory_rate_basis) == ("stated", "stated")
    from_disk = (1 - fit.cached_share) * summary.read_per_token / 1e6
    # Computing takes its time too, and hides some of the reading.
    assert fit.prediction.seconds == pytest.approx(from_disk, rel=0.05, abs=5e-3)
    assert fit.fits_memory
    monkeypatch.setattr(probe, "available_memory", lambda: summary.resident - 1)
    info = describe(directory, target=Target(disk_rate=1e6, memory_rate=1e9))
    assert not info.fit.fits_memory
    assert "too little memory here" in "\n".join(info_lines(info))


def test_a_model_on_the_hub_is_described_without_its_weights(hub: Hub) -> None:
    hub_here = environment(
        HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}",
        HF_HOME=str(hub.directory.with_name("home")),
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flashmoe", "info", *arguments]
        return subprocess.run(command, env=hub_here, capture_output=True, text=True, check=False)

    result = run("tests/model", "--json")
    assert result.returncode == 0, result.stderr
    remote = json.loads(result.stdout)
    local = describe(str(hub.directory), target=Target(disk_rate=1e9)).to_dict()
    same = {"source", "disk"}
    assert {k: v for k, v in remote["summary"].items() if k not in same} == json.loads(
        json.dumps({k: v for k, v in local["summary"].items() if k not in same})
    )
    assert not remote["fit"]["present"]
    assert remote["fit"]["disk_rate_basis"] == "assumed"
    kept = [p.name for p in hub.directory.with_name("home").rglob("*") if p.is_file()]
    assert not [name for name in kept if name.endswith(".safetensors")]
    missing = run("tests/absent")
    assert missing.returncode == 1
    assert missing.stderr.startswith("error: tests/absent: ")


def test_sizes_read_well() -> None:
    assert [size(n) for n in (0, 999, 1000, 7_077_888, 208_999_999_999, 2e12)] == [
        *("0 bytes", "999 bytes", "1 kB", "7.08 MB", "209 GB", "2 TB")
    ]


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder that is taken for that of this process's cgroup, of version 2."""
    real = probe._read
    monkeypatch.setattr(probe, "_CGROUP", tmp_path)
    monkeypatch.setattr(
        probe, "_read", lambda p: "0::/" if str(p) == "/proc/self/cgroup" else real(p)
    )
    (tmp_path / "cgroup.controllers").touch()
    return tmp_path


def test_cores_respect_affinity_and_quota(cgroup: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    siblings = {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5", 2: "2"}
    real = probe._read

    def read(path: Path) -> str | None:
        if "topology" in str(path):
            return siblings[int(path.parts[-3].removeprefix("cpu"))]
        return real(path)

    monkeypatch.setattr(probe, "_read", read)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4, 1, 5, 2}, raising=False)
    assert probe.physical_cores() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 4})
    assert probe.physical_cores() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    (cgroup / "cpu.max").write_text("200000 100000\n")
    assert probe.physical_cores() == 2
    (cgroup / "cpu.max").write_text("50000 100000\n")
    assert probe.physical_cores() == 1
    (cgroup / "cpu.max").write_text("max 100000\n")
    assert probe.physical_cores() == 3


def test_memory_respects_the_cgroups_limit(cgroup: Path) -> None:
    free = probe.available_memory()
    assert 0 < free <= probe.total_memory()
    (cgroup / "memory.max").write_text("1000000\n")
    (cgroup / "memory.current").write_text("400000\n")
    assert probe.available_memory() == 600000
    (cgroup / "memory.stat").write_text("anon 250000\ninactive_file 100000\nactive_file 50000\n")
    assert probe.available_memory() == 750000


def test_the_smallest_limit_around_a_nested_group_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inner = tmp_path / "memory" / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, 900000), (inner.parent, 500000), (tmp_path / "memory", 1 << 62)):
        (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (folder / "memory.usage_in_bytes").write_text("100000\n")
        (folder / "memory.stat").write_text("cache 1\ntotal_inactive_file 20000\n")
    real = probe._read
    own = "5:memory,x:/outer/inner\n1:cpu:/\n0::/\n"
    monkeypatch.setattr(probe, "_CGROUP", tmp_path)
    monkeypatch.setattr(probe, "_read", lambda p: own if str(p) == "/proc/self/cgroup" else real(p))
    assert probe.available_memory() == 500000 - 100000 + 20000


def test_rates_are_measured(tmp_path: Path) -> None:
    assert probe.memory_rate(1) > 1e8
    path = tmp_path / "weights"
    path.write_bytes(np.random.default_rng(0).bytes(1 << 20))
    rate = probe.disk_rate([path], 64 << 10, seconds=0.05)
    assert rate is None or rate > 0  # None where the file system has no direct reads
    assert probe.disk_rate([path], 1 << 20) is None


def test_reads_past_macos_page_cache_are_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(1 << 20))
    asked: list[tuple[int, int]] = []
    control = types.SimpleNamespace(F_NOCACHE=48, fcntl=lambda fd, *what: asked.append(what))
    monkeypatch.setitem(sys.modules, "fcntl", control)
    monkeypatch.setattr(probe.sys, "platform", "darwin")
    monkeypatch.delattr(probe.os, "O_DIRECT", raising=False)
    clock = itertools.count()  # in milliseconds: it ends after some reads, however slow they are
    monkeypatch.setattr(probe.time, "perf_counter", lambda: next(clock) / 1000)
    rate = probe.disk_rate([file], 1 << 16, seconds=0.02)
    assert rate is not None
    assert rate > 0
    assert set(asked) == {(48, 1)}


def test_no_rate_where_nothing_can_be_read_past_the_cache(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(bytes(1 << 16))
    assert probe.disk_rate([small], 1 << 16) is None
