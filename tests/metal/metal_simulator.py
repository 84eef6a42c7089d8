"""flashmoe on the simulated GPU of tests/metal: built once, run in processes of its own.

    simulator = Simulator(directory)
    simulator.logits(checkpoint, ids)

A process of its own, because a misuse of Metal ends it, as does an object that it never released.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
BACKEND = ROOT / "src" / "flashmoe_native" / "backend"
HOST = BACKEND / "metal"
PROFILE = Path("/usr/lib/llvm-19/lib/clang/19/lib/linux/libclang_rt.profile-x86_64.a")
PACKAGES = "clang-19 llvm-19 libclang-rt-19-dev gobjc++ libgnustep-base-dev libblocksruntime-dev"


def missing() -> str | None:
    """Why the simulator cannot be built here, or None."""
    tools = ("clang++-19", "llvm-cov-19", "c++", "cmake", "ninja")
    headers = ("/usr/include/GNUstep/Foundation/Foundation.h", "/usr/include/Block.h")
    absent = [tool for tool in tools if not shutil.which(tool)]
    absent += [path for path in (*headers, str(PROFILE)) if not Path(path).exists()]
    absent += ["nanobind"] if importlib.util.find_spec("nanobind") is None else []
    if not absent:
        return None
    return f"no {', '.join(absent)}; the simulated GPU needs Debian's {PACKAGES}"


class FailedError(Exception):
    """The process ended otherwise than it should; its words are the message."""


class Simulator:
    """Builds the Metal backend with coverage counters, over simulator and executor."""

    def __init__(self, directory: Path) -> None:
        self.build = directory / "build"
        self.profiles = directory / "profiles"
        counters = f"-Wl,-u,__llvm_profile_runtime {PROFILE}"
        flags = {
            "CMAKE_BUILD_TYPE": "MinSizeRel",
            "CMAKE_CXX_FLAGS_MINSIZEREL": "-O1 -DNDEBUG",  # only the executor need be fast
            "CMAKE_OBJCXX_FLAGS": "-fprofile-instr-generate -fcoverage-mapping",
            "CMAKE_EXE_LINKER_FLAGS": counters,
            "CMAKE_MODULE_LINKER_FLAGS": counters,
            "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
            "FLASHMOE_METAL_SIMULATOR": "ON",
            "FLASHMOE_WERROR": "ON",
            "Python_EXECUTABLE": sys.executable,
        }
        command = ["cmake", "-S", str(ROOT), "-B", str(self.build), "-G", "Ninja"]
        _run([*command, *(f"-D{name}={value}" for name, value in flags.items())])
        _run(["ninja", "-C", str(self.build)])
        (self.native,) = self.build.glob("_native*.so")
        self.site = self.install(directory / "site", self.native)

    def install(self, site: Path, native: Path) -> Path:
        """A directory for PYTHONPATH with the package of this repository and a native core."""
        ignore = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(ROOT / "src" / "flashmoe", site / "flashmoe", ignore=ignore)
        shutil.copytree(ROOT / "metal", site / "flashmoe" / "metal")
        shutil.copy(native, site / "flashmoe" / self.native.name)
        return site

    def mutant(self, site: Path, file: str, right: str, wrong: str) -> Path:
        """As install(), with a fault planted in one file of backend/.

        Raises FailedError with the compiler's words where it does not compile.
        """
        text = (BACKEND / file).read_text()
        assert text.count(right) == 1, f"{file}: {right!r} is there {text.count(right)} times"
        site.mkdir(parents=True)
        source, object_file = site / Path(file).name, site / "mutant.o"
        native = site / self.native.name
        source.write_text(text.replace(right, wrong))
        database = json.loads((self.build / "compile_commands.json").read_text())
        entry = next(e for e in database if e["file"] == str(BACKEND / file))
        command = shlex.split(entry["command"])
        command[command.index("-o") + 1 :] = [str(object_file), "-c", str(source)]
        _run(command, cwd=self.build)
        links = _run(["ninja", "-t", "commands", self.native.name], cwd=self.build)
        link = links.splitlines()[-1].split("&&")[1]
        # The mutant comes before the library that has the right object, which is then not taken.
        link = link.replace(f"-o {self.native.name}", f"-o {native} {object_file}")
        _run(shlex.split(link), cwd=self.build)
        return self.install(site / "site", native)

    def uncovered(self) -> list[str]:
        """Lines of the host code that no process so far has run, as "file:line"."""
        merged = self.profiles / "merged.profdata"
        profiles = [str(p) for p in self.profiles.glob("*.profraw")]
        _run(["llvm-profdata-19", "merge", "-sparse", *profiles, "-o", str(merged)])
        command = ["llvm-cov-19", "export", "-format=lcov", f"-instr-profile={merged}"]
        lcov = _run([*command, str(self.native), *map(str, sorted(HOST.glob("*.mm")))])
        missed, file = [], ""
        for line in lcov.splitlines():
            if line.startswith("SF:"):
                file = Path(line[3:]).name
            elif line.startswith("DA:") and line.endswith(",0"):
                missed.append(f"{file}:{line[3:].split(',')[0]}")
        return missed

    def python(
        self,
        code: str,
        *arguments: str,
        settings: Mapping[str, object] | None = None,
        site: Path | None = None,
    ) -> str:
        """Runs code in a new interpreter; what it prints. `settings` are the simulator's own.

        Raises FailedError with its stderr where it fails, leaks or misuses Metal.
        """
        return self._python(code, arguments, settings or {}, site).stdout

    def trace(
        self,
        code: str,
        *arguments: str,
        settings: Mapping[str, object] | None = None,
        site: Path | None = None,
    ) -> list[str]:
        """As python(), but the lines on stderr, those of the simulator's trace among them."""
        settings = {"TRACE": 1, **(settings or {})}
        return self._python(code, arguments, settings, site).stderr.splitlines()

    def _python(
        self,
        code: str,
        arguments: Sequence[str],
        settings: Mapping[str, object],
        site: Path | None,
    ) -> "subprocess.CompletedProcess[str]":
        environment = dict(os.environ)
        path = (site or self.site, Path(__file__).parent, Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
        environment["LLVM_PROFILE_FILE"] = str(self.profiles / "%p.profraw")
        for name, value in settings.items():
            environment[f"METAL_SIMULATOR_{name}"] = str(value)
        command = [sys.executable, "-c", code, *arguments]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        if result.returncode != 0:
            raise FailedError(result.stderr)
        return result

    def logits(
        self,
        checkpoint: Path,
        ids: Sequence[int],
        *,
        one_by_one: int = 0,
        settings: Mapping[str, object] | None = None,
        site: Path | None = None,
        **options: Any,
    ) -> np.ndarray:
        """float32 [len(ids), vocab] of `TestEngine(checkpoint, backend="metal", **options)`: the
        last `one_by_one` ids a token at a time, those before them at once.
        """
        job = {"ids": [int(i) for i in ids], "steps": one_by_one, "options": options}
        out = self.profiles.parent / "logits.npy"
        code = "import metal_simulator; metal_simulator.run_job()"
        arguments = (str(checkpoint), json.dumps(job), str(out))
        self.python(code, *arguments, settings=settings, site=site)
        return np.load(out)


def run_job() -> None:
    """In the process that `Simulator.logits` starts."""
    from engines import TestEngine  # noqa: PLC0415

    checkpoint, text, out = sys.argv[1:]
    job = json.loads(text)
    ids, steps = np.array(job["ids"], np.int32), job["steps"]
    engine = TestEngine(Path(checkpoint), backend="metal", **job["options"])
    state = engine.native.new_state()
    parts = [ids[: len(ids) - steps], *np.split(ids[len(ids) - steps :], steps)] if steps else [ids]
    np.save(out, np.concatenate([engine.logits(part, state) for part in parts if len(part)]))


def _run(command: Sequence[str], cwd: Path = ROOT) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    if result.returncode != 0:
        raise FailedError(result.stdout + result.stderr)
    return result.stdout
