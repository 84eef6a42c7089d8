"""The campaign: damaged inputs, injected faults, Ctrl-C and kills, all from fixed seeds.

    python tests/campaign/run.py --inputs 20000 --faults 10000 --interrupts 500 --kills 200

Needs a C compiler and Linux. Prints what came of it, and with --out writes it as JSON. Exit code 1
where anything crashed, hung, raised what is no FlashMoeError, or went on wrongly.
"""

import argparse
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BAD = ("crash", "hang", "foreign", "wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("inputs", 2200), ("faults", 900), ("interrupts", 60), ("kills", 20)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the first damaged input")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side")
    parser.add_argument("--job", type=int, help="which of them this is, from 0")
    parser.add_argument("--only", default="", metavar="TEXT", help="faults whose name begins so")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--scratch", type=Path, help="a directory to work in")
    arguments = parser.parse_args()
    if arguments.jobs > 1 and arguments.job is None:
        sys.exit(_side_by_side(arguments))
    if "FLASHMOE_CAMPAIGN" not in os.environ:
        _restart_with_shim()
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        sys.exit(Campaign(Path(scratch).resolve(), arguments).run())


def _side_by_side(arguments: argparse.Namespace) -> int:
    """The campaign in as many processes as asked for, and what came of all."""
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        outs = [Path(folder) / f"{job}.json" for job in range(arguments.jobs)]
        jobs = [
            subprocess.Popen([sys.executable, *sys.argv, "--job", str(job), "--out", out])
            for job, out in enumerate(outs)
        ]
        for job in jobs:
            job.wait()
        results = [json.loads(out.read_text()) for out in outs]
    total = Results()
    for result in results:
        total.add(result)
    return total.report(arguments.out)


def _restart_with_shim() -> None:
    """The same program, with the shim loaded before everything else."""
    with tempfile.TemporaryDirectory() as folder:
        shim = Path(folder) / "shim.so"
        compiler = os.environ.get("CC", "cc")
        command = [compiler, "-shared", "-fPIC", "-O2", str(HERE / "shim.c"), "-o", str(shim)]
        subprocess.run([*command, "-ldl"], check=True)
        preload = " ".join(filter(None, (os.environ.get("LD_PRELOAD"), str(shim))))
        environment = os.environ | {"LD_PRELOAD": preload, "FLASHMOE_CAMPAIGN": "1"}
        program = [sys.executable, *sys.argv]
        sys.exit(subprocess.run(program, check=False, env=environment).returncode)


def _name(row: tuple[str, str, str, int, bool]) -> str:
    """Of a row of the plan of faults."""
    scenario, operation, mode, code, written = row
    return f"{scenario}: {operation} {mode} {code}, {'written' if written else 'read'}"


class Results:
    """What came of a campaign."""

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self.findings: list[str] = []
        self.messages: dict[str, str] = {}  # one of each shape
        self.past_header = 0
        self.seconds = 0

    def say(self, message: str) -> None:
        """Keeps a message, unless one of its shape is here: the same less what differs by case."""
        self.messages.setdefault("".join(c for c in message[:160] if not c.isdigit()), message)

    def add(self, result: dict[str, Any]) -> None:
        """Adds what `report` wrote."""
        for title, counter in result["counts"].items():
            self.counts[title].update(counter)
        self.findings += result["findings"]
        for message in result["messages"]:
            self.say(message)
        self.past_header += result["past_header"]
        self.seconds = max(self.seconds, result["seconds"])

    def report(self, out: Path | None) -> int:
        """Prints it, and writes it as JSON; the program's exit code."""
        total = sum(sum(counter.values()) for counter in self.counts.values())
        for title, counter in self.counts.items():
            kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(counter.items()))
            print(f"{title}: {sum(counter.values())} ({kinds})")
        print(f"past a header: {self.past_header} of {sum(self.counts['damaged inputs'].values())}")
        print(f"{total} cases in {self.seconds} s, findings: {len(self.findings)}")
        if out:
            result = {
                "counts": self.counts,
                "past_header": self.past_header,
                "seconds": self.seconds,
                "findings": self.findings,
                "messages": list(self.messages.values()),
            }
            out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        return 1 if self.findings else 0


class Campaign:
    def __init__(self, scratch: Path, arguments: argparse.Namespace) -> None:
        self.scratch = scratch
        self.arguments = arguments
        self.results = Results()

    def run(self) -> int:
        from damage import Bases, Damage  # noqa: PLC0415
        from inject import Injection, sweep  # noqa: PLC0415
        from workers import run  # noqa: PLC0415

        began = time.monotonic()
        self._make_bases()
        bases = Bases(self.scratch / "bases")
        damage = Damage(bases, self.scratch / "damaged")
        first = self.arguments.seed
        seeds = self._mine(range(first, first + self.arguments.inputs))
        rows = [damage.case(seed) for seed in seeds]
        for outcome in run([case for _, _, case in rows]):
            name, past, _ = rows[outcome.case]
            self.results.past_header += past
            self._note("damaged inputs", name, outcome, f"seed {seeds[outcome.case]}")

        injection = Injection(bases, self.scratch / "faulty")
        left = len(self._mine(range(self.arguments.faults)))
        plan = [row for row in injection.plan() if _name(row).startswith(self.arguments.only)]
        # In another order than they are written, so that a short run has some of all.
        random.Random(1).shuffle(plan)
        plan = self._mine(plan)
        share = max(2, left // max(1, len(plan)))
        for at, most in ((1, share), (share + 1, 1 << 20)):
            for row in plan:
                outcomes = sweep(injection, run, row, at, min(most, at + left - 1))
                for call, outcome in enumerate(outcomes, at):
                    self._note("faults", _name(row), outcome, f"call {call}")
                    left -= 1
        for title, count, function in (
            ("interrupts", self.arguments.interrupts, injection.interrupted),
            ("kills", self.arguments.kills, injection.killed),
        ):
            seeds = self._mine(range(count))
            cases = [lambda seed=seed, f=function: f(seed) for seed in seeds]
            for outcome in run(cases):
                seed = seeds[outcome.case]
                self._note(title, f"{title} of kind {seed % 6}", outcome, f"{seed}")
        self.results.seconds = round(time.monotonic() - began)
        return self.results.report(self.arguments.out)

    def _mine(self, cases: Sequence[Any]) -> Sequence[Any]:
        """Those that fall to this job."""
        return cases[self.arguments.job or 0 :: self.arguments.jobs]

    def _make_bases(self) -> None:
        """In a process of its own: it opens models, and this one has no threads."""
        code = (
            "import importlib.util, sys; sys.path[:0] = sys.argv[1:3]\n"
            "from pathlib import Path\n"
            "spec = importlib.util.spec_from_file_location('maker', sys.argv[3])\n"
            "maker = importlib.util.module_from_spec(spec); sys.modules['maker'] = maker\n"
            "spec.loader.exec_module(maker)\n"
            "from damage import Bases\n"
            "Bases(Path(sys.argv[4])).make(maker)\n"
        )
        (self.scratch / "bases").mkdir()
        maker = HERE.parents[1] / "benchmarks/make_checkpoint.py"
        arguments = [HERE, HERE.parent, maker, self.scratch / "bases"]
        subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=True)

    def _note(self, title: str, name: str, outcome: Any, where: str) -> None:
        kind = outcome.kind
        if kind == "refused" and title != "damaged inputs":
            kind = "wrong"  # where the fault lies, an error is expected and caught
        self.results.counts[title][kind] += 1
        if kind in BAD:
            finding = f"{title}: {name}, {where}: {kind}: {outcome.detail} {outcome.message}"
            self.results.findings.append(finding)
            print(finding, flush=True)
        elif outcome.message:
            message = outcome.message.replace(str(self.scratch), "...")
            self.results.say(f"{outcome.detail}: {message}")


if __name__ == "__main__":
    main()
