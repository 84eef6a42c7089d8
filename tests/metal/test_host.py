"""The Metal host code without a Mac.

- Types: clang for macOS accepts it, with headers declared as Apple declares them.
- API truth: these declarations are in the tables that Apple's own compiler made.
- Behaviour: it runs on a simulated GPU that sees every misuse, and every line of it is run.
- Each check rejects faults planted for it.
"""

import ast
import json
import mmap
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import TestEngine, random_ids, spread
from metal_simulator import HOST, ROOT, FailedError, Simulator
from test_page_cache import cached, forget

import flashmoe

METAL = ROOT / "tests" / "metal"
HEADER = METAL / "include" / "Metal" / "Metal.h"
FACTS = json.loads((METAL / "api" / "apple.json").read_text())
GetCheckpoint = Callable[[str], Path]


# ---- types


def compile_for_macos(
    source: Path, out: Path, *flags: str, headers: Path = HEADER.parents[1]
) -> str:
    """Compiles with ziglang for Apple silicon: the compiler's words, none if it agrees."""
    pytest.importorskip("ziglang")
    command = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-macos", "-std=c++20"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unused-command-line-argument", "-fblocks"]
    command += ["-I", str(headers), "-isystem", str(METAL / "include" / "macos")]
    command += ["-I", str(HOST.parents[1]), "-I", str(ROOT / "metal")]
    command += [*flags, "-x", "objective-c++", str(source), "-o", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0 or result.stderr
    return result.stderr if result.returncode else ""


CORE = ROOT / "src" / "flashmoe_native" / "core"
SOURCES = [*sorted(HOST.glob("*.mm")), CORE / "io_queue_gcd.cpp", CORE / "file.cpp"]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_clang_for_macos_accepts(source: Path, tmp_path: Path) -> None:
    assert compile_for_macos(source, tmp_path / "out.o", "-c") == ""


@pytest.mark.parametrize(
    ("architectures", "processor", "named"),
    [
        ("arm64", "x86_64", ""),
        ("", "arm64", ""),
        ("", "x86_64", "built for x86_64"),
        ("arm64;x86_64", "arm64", "built for arm64 and x86_64"),
    ],
)
def test_only_apple_silicon_is_built_for(architectures: str, processor: str, named: str) -> None:
    command = ["cmake", f"-DCMAKE_OSX_ARCHITECTURES={architectures}"]
    command += [
        f"-DCMAKE_SYSTEM_PROCESSOR={processor}",
        "-P",
        str(HOST.parents[1] / "apple_silicon.cmake"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode != 0) == bool(named)
    assert named in " ".join(result.stderr.split())


def test_clang_for_macos_rejects_a_misspelt_selector(tmp_path: Path) -> None:
    source = tmp_path / "mutant.mm"
    text = (HOST / "commands.mm").read_text()
    source.write_text(text.replace("waitUntilCompleted", "waitUntilComplete"))
    assert "waitUntilComplete" in compile_for_macos(source, tmp_path / "out.o", "-c")


# ---- API truth


def declarations(tmp_path: Path, header: str) -> dict[str, dict[str, str]]:
    """Type encodings by protocol or class and selector, as clang for macOS compiles a header."""
    folder = tmp_path / "include" / "Metal"
    folder.mkdir(parents=True)
    (folder / "Metal.h").write_text(header)
    out = tmp_path / "declarations.s"
    assert (
        compile_for_macos(METAL / "api" / "declarations.mm", out, "-S", headers=folder.parent) == ""
    )
    assembly = out.read_text()
    strings = dict(
        re.findall(r"^(l_OBJC_METH_VAR_\w+?_(?:\.\d+)?):.*\n\s+\.asciz\s+\"(.*)\"", assembly, re.M)
    )
    found = {}
    lists = re.findall(
        r"^__OBJC_\$_(?:PROTOCOL_)?INSTANCE_METHODS_(?:Newer)?(MTL\w+):(.*?)\n\n",
        assembly,
        re.M | re.S,
    )
    for name, body in lists:
        pairs = re.findall(
            r"(l_OBJC_METH_VAR_NAME_[.\d]*).*\n\s+\.quad\s+(l_OBJC_METH_VAR_TYPE_[.\d]*)", body
        )
        methods = {strings[s]: re.sub(r"\d+", "", strings[e]) for s, e in pairs}
        found[name] = found.get(name, {}) | methods
    return found


def untruths(tmp_path: Path, header: str) -> list[str]:
    """What a header declares otherwise than Apple."""
    wrong = []
    compiled = set(FACTS["compiled by Apple"])
    for name, methods in declarations(tmp_path, header).items():
        for selector, encoding in methods.items():
            theirs = FACTS["methods"][name].get(selector)
            ours = encoding
            if theirs and name not in compiled:  # metal-cpp adds a const that Apple has not
                theirs, ours = theirs.replace("r^v", "^v"), ours.replace("r^v", "^v")
            if ours != theirs:
                wrong.append(f"{name} {selector}: {ours}, not {theirs}")
    for name, value in re.findall(r"\b(MTL\w+) = (\d+)", header):
        if FACTS["constants"].get(name) != int(value):
            wrong.append(f"{name}: {value}, not {FACTS['constants'].get(name)}")
    return wrong


def test_declarations_equal_apples_own(tmp_path: Path) -> None:
    header = HEADER.read_text()
    found = declarations(tmp_path / "all", header)
    declared = header + (HOST / "newer.h").read_text()
    assert sum(map(len, found.values())) == declared.count("\n- (") + declared.count("@property")
    assert untruths(tmp_path, header) == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("MTLDataTypeUInt = 33", "MTLDataTypeUInt = 29"),
        ("MTLCommandBufferStatusError = 5", "MTLCommandBufferStatusError = 6"),
        ("endEncoding", "finishEncoding"),
        ("count:(NSUInteger)count", "count:(int)count"),
        ("MTLGPUFamilyApple7 = 1007", "MTLGPUFamilyApple7 = 1006"),
        ("uint64_t recommendedMaxWorkingSetSize", "uint32_t recommendedMaxWorkingSetSize"),
    ],
)
def test_false_declarations_are_found(right: str, wrong: str, tmp_path: Path) -> None:
    header = HEADER.read_text()
    assert right in header
    assert len(untruths(tmp_path, header.replace(right, wrong))) == 1


# ---- the simulator sees misuses

MISUSES = {
    "another index": "no kernel has an argument at this index",
    "long setBytes": "1 to 4096 bytes",
    "short struct": "4 bytes are bound",
    "unbound struct": "nothing is bound at index 0",
    "a host pointer": "a host pointer, not a GPU address",
    "not resident": "read or write outside every buffer",
    "an address past the end": "read or write outside every buffer",
    "a misaligned address": "misaligned",
    "a set not committed": "read or write outside every buffer",
    "removed from a set that has it not": "it was not added",
    "no fence": "no fence orders this encoder",
    "no pipeline": "no pipeline state",
    "too many threads": "threads per threadgroup",
    "empty grid": "an empty grid",
    "commit with an open encoder": "an encoder is open",
    "commit twice": "called twice",
    "wait before commit": "before commit",
    "two encoders": "another encoder is open",
    "encoder after the end": "after endEncoding",
    "wait after the end": "after endEncoding",
    "two fences": "a second fence",
    "encoder released open": "released before endEncoding",
    "use after release": "a released object",
    "release twice": "release of a released object",
    "unaligned pointer": "not page-aligned",
    "unaligned length": "not a multiple of the page size",
    "above maxBufferLength": "above maxBufferLength",
    "another storage mode": "not shared",
    "leak": "1 SimBuffer never released",
}


def test_the_simulator_reports_every_misuse(simulator: Simulator, tmp_path: Path) -> None:
    def run(name: str) -> subprocess.CompletedProcess[str]:
        command = [str(simulator.build / "tests" / "metal" / "misuse"), name]
        environment = {"LLVM_PROFILE_FILE": str(tmp_path / "ignored.profraw")}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, env=environment
        )

    right = run("none")
    assert (right.returncode, right.stderr) == (0, "")
    for name, words in MISUSES.items():
        result = run(name)
        assert result.returncode != 0, name
        assert words in result.stderr, name


# ---- errors reach Python with Metal's words, and what to do

ERRORS = [
    ({"FAIL": "device"}, "this machine has no GPU; use backend"),
    ({"FAIL": "queue"}, "gives no command queue"),
    ({"FAIL": "buffer"}, "no buffer over"),
    ({"FAIL": "function"}, "kernel embed: the library has no function embed"),
    ({"FAIL": "pipeline"}, "kernel embed: too many registers, says the simulator"),
    ({"FAIL": "command"}, "could not finish its work: a page fault, says the simulator"),
    ({"FAIL": "timeout"}, "held the GPU too long: close what else uses the GPU"),
    ({"FAIL": "memory"}, "out of memory, says the simulator. Give experts a smaller cache"),
    ({"FAIL": "residency"}, "no residency set: no set, says the simulator"),
    ({"FAMILY": 6}, "not a GPU of Apple silicon (family Apple7, unified memory)"),
    ({"UNIFIED": 0}, "not a GPU of Apple silicon (family Apple7, unified memory)"),
    ({"MACOS": 12}, "no Metal 3 here, which macOS 13 brought; update macOS"),
    ({"WORKING_SET": 1_000_000}, "this GPU may use 0.00 GB. Give experts a smaller cache"),
    ({"MAX_BUFFER": 8192}, "this GPU allows 0.00 GB. Shorten the context"),
    ({"MAX_THREADS": 512}, "kernel rms_norm needs 1024 threads a threadgroup; this GPU allows 512"),
    ({"SIMD_WIDTH": 64}, "simdgroups of 32 threads; this GPU's have 64"),
]

TRY = """
import sys, flashmoe
from flashmoe.errors import DeviceError
from pathlib import Path
from engines import TestEngine
kernels = Path(sys.argv[2]) if len(sys.argv) > 2 else None
try:
    TestEngine(Path(sys.argv[1]), backend="metal", kernels=kernels).logits([5, 6, 7])
except DeviceError as error:
    print(error)
"""


def demo(simulator: Simulator) -> Path:
    return simulator.site / "flashmoe" / "demo_model"


@pytest.mark.parametrize(("settings", "words"), ERRORS, ids=lambda value: str(value)[:30])
def test_errors_say_what_metal_says(
    settings: dict[str, object], words: str, simulator: Simulator
) -> None:
    assert words in simulator.python(TRY, str(demo(simulator)), settings=settings)


def test_errors_of_the_compiler_and_of_absent_kernels(simulator: Simulator, tmp_path: Path) -> None:
    assert "no Metal kernels; install" in simulator.python(TRY, str(demo(simulator)), str(tmp_path))
    (tmp_path / "broken.metal").write_text('#include "absent.h"\n#error half a kernel\n')
    answer = simulator.python(TRY, str(demo(simulator)), str(tmp_path))
    assert "cannot compile the kernels: program_source: #error half a kernel" in answer


def test_shapes_without_a_kernel_are_named(simulator: Simulator, checkpoint: GetCheckpoint) -> None:
    answer = simulator.python(TRY, str(checkpoint("heads-of-48")))
    assert 'no kernel for attention heads of 48; use backend="cpu"' in answer


def test_shapes_are_refused_before_a_weight_is_read(simulator: Simulator) -> None:
    code = """
import dataclasses
from engines import DEMO
from flashmoe import _native
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.errors import DeviceError
from flashmoe.generate.engine import kernel_sources
checkpoint = Checkpoint.open(DEMO)
for name, value in (("linear_conv_kernel_dim", 9), ("linear_key_head_dim", 130),
                    ("linear_value_head_dim", 264), ("head_dim", 80), ("experts_per_token", 33)):
    config = checkpoint.native_config(4) | {name: value}
    try:
        _native.Engine(config, checkpoint.native, backend="metal", kernels=str(kernel_sources()))
    except DeviceError as error:
        print(error)
"""
    assert simulator.python(code).splitlines() == [
        f'GPU: no kernel for {what}; use backend="cpu"'
        for what in (
            "convolutions of 9 taps",
            "GatedDeltaNet heads of 130 by 64",
            "GatedDeltaNet heads of 64 by 264",
            "attention heads of 80",
            "routing to 33 of 48 experts",
        )
    ]


def test_auto_falls_back_to_the_cpu_with_a_warning(simulator: Simulator) -> None:
    code = """
import sys; sys.platform = "darwin"
import flashmoe.machine.probe; flashmoe.machine.probe.physical_cores = lambda: 1
flashmoe.machine.probe.available_memory = lambda: 1 << 30
import logging; logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
import flashmoe
print(flashmoe.Model("demo", threads=1, context=64).backend)
"""
    assert simulator.python(code).split() == ["metal"]
    answer = simulator.python(code, settings={"FAIL": "device"})
    assert answer.startswith("WARNING Metal: this machine has no GPU")
    assert answer.split()[-1] == "cpu"


def test_a_build_without_metal_says_so() -> None:
    if "metal" in flashmoe._native.backends():
        pytest.skip("this build has Metal, as every one on macOS")
    with pytest.raises(flashmoe.ArgumentError, match="not in this build"):
        flashmoe.Model("demo", backend="metal")


# ---- behaviour


def cpu_logits(directory: Path, ids: np.ndarray) -> np.ndarray:
    return TestEngine(directory).logits(ids)


def test_the_demo_answers_as_on_the_cpu(simulator: Simulator) -> None:
    code = """
import flashmoe
with flashmoe.Model("demo", backend="metal", precision="float32", threads=1) as model:
    print(repr("".join(t.text for t in model.generate("Once", max_tokens=8, temperature=0))))
"""
    with flashmoe.Model("demo", backend="cpu", precision="float32") as model:
        text = "".join(t.text for t in model.generate("Once", max_tokens=8, temperature=0))
    assert simulator.python(code).strip() == repr(text)


@pytest.fixture
def aligned(simulator: Simulator, tmp_path: Path) -> Path:
    """The demo model, but that its embedding and its head lie aligned in their file."""
    directory = Path(shutil.copytree(demo(simulator), tmp_path / "aligned"))
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    pad = -(8 + length + head_of(data)[0]) % 16
    head = (length + pad).to_bytes(8, "little") + data[8 : 8 + length] + b" " * pad
    path.write_bytes(head + data[8 + length :])
    return directory


def head_of(data: bytes) -> tuple[int, int]:
    """Where the head's words lie behind the file's metadata."""
    tensors = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    begin, end = tensors["language_model.lm_head.weight"]["data_offsets"]
    return begin, end


def test_mapped_weights_are_read_before_they_are_needed(
    simulator: Simulator, aligned: Path
) -> None:
    file = aligned / "model.safetensors"
    data = file.read_bytes()
    begin, end = head_of(data)
    place = 8 + int.from_bytes(data[:8], "little") + begin, end - begin
    forget(file)
    if cached(file, *place):
        pytest.skip("this file system keeps what it was told to forget")
    code = "import sys; from pathlib import Path; from engines import TestEngine\n"
    simulator.python(code + "TestEngine(Path(sys.argv[1]), backend='metal')", str(aligned))
    assert cached(file, *place) * mmap.PAGESIZE >= end - begin


def test_a_mapping_that_no_buffer_can_be_had_for_is_given_back(
    simulator: Simulator, aligned: Path
) -> None:
    mapped = 'print("model.safetensors" in Path("/proc/self/maps").read_text())'
    answer = simulator.python(TRY + mapped, str(aligned), settings={"FAIL": "buffer"})
    assert "no buffer over" in answer
    assert answer.split()[-1] == "False"


def test_weights_that_lie_aligned_are_mapped_not_copied(
    simulator: Simulator, aligned: Path
) -> None:
    code = """
import sys
from pathlib import Path
from engines import TestEngine
engine = TestEngine(Path(sys.argv[1]), backend="metal")
print("model.safetensors" in Path("/proc/self/maps").read_text())
if len(sys.argv) > 2:
    from flashmoe.errors import ReadError
    file = Path(sys.argv[1]) / "model.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size // 2)
    try:
        engine.logits([5])
    except ReadError as error:
        print(str(error).count("it changed since it was opened"))
"""
    assert simulator.python(code, str(aligned)).split() == ["True"]
    assert simulator.python(code, str(demo(simulator))).split() == ["False"]
    ids = random_ids(6000, 5)
    assert spread(simulator.logits(aligned, ids), cpu_logits(aligned, ids)) <= 2e-3
    assert simulator.python(code, str(aligned), "and truncate it").split() == ["True", "1"]


@pytest.mark.parametrize("settings", [{}, {"EAGER": 1, "SEED": 7}])
def test_overlap_gives_the_same_logits(settings: dict[str, object], simulator: Simulator) -> None:
    ids = random_ids(6000, 5)
    directory = demo(simulator)
    serial = simulator.logits(directory, ids, one_by_one=2)
    overlapped = simulator.logits(directory, ids, one_by_one=2, overlap=True, settings=settings)
    assert (serial == overlapped).all()


def test_attention_over_several_splits(simulator: Simulator) -> None:
    ids = random_ids(6000, 300)
    directory = demo(simulator)
    ours = simulator.logits(directory, ids, one_by_one=2)[-2:]
    assert spread(ours, cpu_logits(directory, ids)[-2:]) <= 2e-3


def test_more_experts_than_one_dispatch_holds(simulator: Simulator) -> None:
    ids = random_ids(6000, 64)
    directory = demo(simulator)
    ours = simulator.logits(directory, ids, cache_bytes=64 << 20)
    assert spread(ours, cpu_logits(directory, ids)) <= 2e-3


def test_older_systems_are_told_what_each_encoder_uses(simulator: Simulator) -> None:
    """macOS 13 and 14, which have no residency sets."""
    ids = random_ids(6000, 70)
    directory = demo(simulator)
    ours = simulator.logits(directory, ids, one_by_one=2, overlap=True, settings={"MACOS": 13})
    assert spread(ours, cpu_logits(directory, ids)) <= 2e-3


def test_memory_stays_resident_while_nothing_is_asked(simulator: Simulator) -> None:
    code = """
import sys, time
from pathlib import Path
from engines import TestEngine
engine = TestEngine(Path(sys.argv[1]), backend="metal")
engine.logits([5])
print("idle", file=sys.stderr)
time.sleep(1.3)
del engine
print("closed", file=sys.stderr)
"""
    trace = simulator.trace(code, str(demo(simulator)))
    assert trace[: trace.index("idle")].count("residency requested") >= 1
    assert trace[trace.index("idle") : trace.index("closed")].count("residency requested") >= 2


def test_a_long_prompt_is_committed_in_parts(simulator: Simulator, tmp_path: Path) -> None:
    ids = random_ids(6000, 40)
    directory = demo(simulator)
    site = simulator.mutant(
        tmp_path / "often", "metal/metal_backend.mm", "tuning().longest_seconds", "1e-4"
    )
    code = "import metal_simulator; metal_simulator.run_job()"
    job = json.dumps({"ids": ids.tolist(), "steps": 0, "options": {}})
    commits = []
    for place in (simulator.site, site):
        out = tmp_path / "logits.npy"
        trace = simulator.trace(code, str(directory), job, str(out), site=place)
        commits.append(trace.count("command buffer committed"))
        assert spread(np.load(out), cpu_logits(directory, ids)) <= 2e-3
    assert commits[1] >= commits[0] + 8  # the demo has 8 layers


def test_slots_lie_in_pieces_that_the_gpu_allows(simulator: Simulator) -> None:
    ids = random_ids(6000, 20)
    directory = demo(simulator)
    ours = simulator.logits(directory, ids, cache_bytes=16 << 20, settings={"MAX_BUFFER": 4 << 20})
    assert spread(ours, cpu_logits(directory, ids)) <= 2e-3


def test_slots_become_resident_as_they_are_used(simulator: Simulator) -> None:
    code = """
import sys
from pathlib import Path
from engines import TestEngine
engine = TestEngine(Path(sys.argv[1]), backend="metal", cache_bytes=64 << 20)
engine.logits([5])
print("slots", int(engine.native.stats()["slot_bytes"]), file=sys.stderr)
"""
    lines = simulator.trace(code, str(demo(simulator)), settings={"MAX_BUFFER": 5 << 18})
    told = [line.split() for line in lines]
    (slots,) = (int(line[1]) for line in told if line[0] == "slots")
    sizes = [int(line[1]) for line in told if line[0] == "resident"]
    piece = max(sizes)  # no other buffer is as large
    assert 0 < sizes.count(piece) * piece < slots / 2


def test_memory_of_states_is_given_back(simulator: Simulator) -> None:
    code = """
import sys
from pathlib import Path
from engines import TestEngine
engine = TestEngine(Path(sys.argv[1]), backend="metal")
for _ in range(40):
    engine.logits([5])
"""
    simulator.python(code, str(demo(simulator)), settings={"WORKING_SET": 48 << 20})


def test_an_expert_that_is_not_finite_is_named(simulator: Simulator, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(demo(simulator), tmp_path / "model"))
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8 : 8 + length])
    name = "language_model.model.layers.7.mlp.switch_mlp.down_proj.scales"
    begin, end = (8 + length + at for at in tensors[name]["data_offsets"])
    data[begin:end] = b"\xc0\x7f" * ((end - begin) // 2)
    path.write_bytes(data)
    code = TRY.replace("DeviceError", "CheckpointError")
    assert "layer 7, expert" in simulator.python(code, str(directory))


def test_half_precision_caches_cost_little(simulator: Simulator) -> None:
    ids = random_ids(6000, 40)
    directory = demo(simulator)
    ours = simulator.logits(directory, ids, one_by_one=2, precision="int8")
    exact = cpu_logits(directory, ids)
    # On average, for a router's near ties may fall the other way.
    assert 1e-4 < np.sqrt(np.mean((ours - exact) ** 2)) / exact.std() < 0.03


def test_the_device_says_what_it_is_and_when_it_worked(simulator: Simulator) -> None:
    code = """
import numpy as np
from flashmoe import _native
from flashmoe.generate.engine import kernel_sources
gpu = _native.ops.Backend("float32", 1, "metal", str(kernel_sources()))
gpu.rms_norm(np.ones((1, 64), np.float32), np.ones(64, np.float32), 1e-6)
times = gpu.times()
print(0 < times["committed"] <= times["began"] < times["ended"] <= times["woken"])
print(gpu.describe())
"""
    told, described = simulator.python(code, settings={"FAIL": "warn"}).splitlines()
    assert told == "True"
    assert {"device", "family", "maxBufferLength", "compiler"} <= set(ast.literal_eval(described))


# ---- what the checks above are worth

# (file, right, wrong, what the simulator says; None: it may run, but then its logits are others)
MUTANTS = [
    ("launch/products.cpp", "{address(x), address(weight),", "{address(weight), address(x),", None),
    ("launch/products.cpp", "products[i]->add ? 1u : 0u", "0u", None),
    (
        "launch/experts.cpp",
        "rows.insert(rows.end(), call->out_rows",
        "rows.insert(rows.end(), call->tokens",
        None,
    ),
    ("launch/experts.cpp", "plan.constants[kSecondBits] = up[kBits];", "", None),
    (
        "launch/experts.cpp",
        "address(call.ids), address(call.weights)",
        "address(call.weights), address(call.ids)",
        None,
    ),
    ("launch/experts.cpp", "kCombineThreads,", "2 * kCombineThreads,", "needs 2048 threads"),
    ("launch/mixers.cpp", "{u32(call.value_heads), 1, 1}", "{0, 1, 1}", "empty grid"),
    (
        "launch/mixers.cpp",
        "const bool several = arguments.splits > 1;",
        "const bool several = false;",
        "outside every buffer",
    ),
    ("launch/mixers.cpp", "plan.kernel = Kernel::attention_merge;", "continue;", None),
    ("metal/metal_backend.mm", "length:plan.size", "length:4", "4 bytes are bound"),
    (
        "metal/metal_backend.mm",
        "replaced_.push_back(std::exchange(growing.memory, std::move(fresh)))",
        "growing.memory = std::move(fresh)",
        "outside every buffer",
    ),
    (
        "metal/memory.mm",
        "[region.buffer.get() gpuAddress] +",
        "reinterpret_cast<uint64_t>(base) +",
        "a host pointer",
    ),
    (
        "metal/memory.mm",
        "if (!region.resident) residency_.add(region.buffer.get());",
        "",
        "outside every buffer",
    ),
    (
        "metal/memory.mm",
        "round_up(std::max<size_t>(bytes, 1), page_)",
        "bytes",
        "not a multiple of the page size",
    ),
    (
        "metal/memory.mm",
        "const Pages share = pages;",
        "const Pages share = nullptr;\n  (void)pages;",
        "",
    ),
    (
        "metal/residency.mm",
        "    [set_.get() commit];\n    [set_.get() requestResidency];",
        "",
        "outside every buffer",
    ),
    ("metal/commands.mm", "    [encoder_.get() waitForFence:fence_.get()];\n", "", "no fence"),
    (
        "metal/commands.mm",
        "    [buffer.get() waitUntilCompleted];\n    times_",
        "    times_",
        "GPUStartTime: before it has run",
    ),
    ("metal/commands.mm", "  [encoder_.get() endEncoding];\n", "", "released before endEncoding"),
    ("metal/commands.mm", "::share([queue_", "::adopt([queue_", "a released object"),
    (
        "metal/pipelines.mm",
        "Owned<MTLCompileOptions*>::adopt",
        "Owned<MTLCompileOptions*>::share",
        "1 SimOptions never released",
    ),
    ("metal/pipelines.mm", "atIndex:index];\n  }", "atIndex:index + 1];\n  }", "no value|index"),
    ("metal/pipelines.mm", "kSafe = 0", "kSafe = 2", "exact arithmetic"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m[0]}: {m[1].strip()[:30]}")
def test_planted_faults_are_rejected(
    mutant: tuple[str, str, str, str | None], simulator: Simulator, tmp_path: Path
) -> None:
    file, right, wrong, words = mutant
    site = simulator.mutant(tmp_path / "mutant", file, right, wrong)
    ids = random_ids(6000, 140)
    directory = demo(simulator)
    try:
        ours = simulator.logits(directory, ids, one_by_one=1, overlap=True, site=site)
    except FailedError as error:
        assert words is None or re.search(words, str(error)), str(error)[-500:]
        return
    assert words is None, "the simulator saw nothing"
    assert not spread(ours, cpu_logits(directory, ids)) <= 2e-3


def test_every_line_of_the_host_code_is_run(simulator: Simulator) -> None:
    """By the tests above, in this session, and the runs below."""
    directory = demo(simulator)
    simulator.logits(directory, random_ids(6000, 140), one_by_one=1, cache_bytes=64 << 20)
    simulator.logits(directory, random_ids(6000, 5), overlap=True)
    for settings, _ in ERRORS:
        simulator.python(TRY, str(directory), settings=settings)
    unreachable = "a pointer into memory that is not the backend's"
    missed = []
    for place in simulator.uncovered():
        file, line = place.split(":")
        if unreachable not in (HOST / file).read_text().splitlines()[int(line) - 1]:
            missed.append(place)
    assert missed == []
