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
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BAD = ("crash", "hang", "foreign", "wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("inputs", 2200), ("faults", 900), ("interrupts", 60), ("kills", 20)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the first damaged input")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    parser.add_argument("--scratch", type=Path, help="a directory to work in")
    arguments = parser.parse_args()
    if "FLASHMOE_CAMPAIGN" not in os.environ:
        _restart_with_shim()
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        sys.exit(Campaign(Path(scratch).resolve(), arguments).run())


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


class Campaign:
    def __init__(self, scratch: Path, arguments: argparse.Namespace) -> None:
        self.scratch = scratch
        self.arguments = arguments
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        self.findings: list[str] = []
        self.messages: dict[str, str] = {}
        self.past_header = 0

    def run(self) -> int:
        from damage import Bases, Damage  # noqa: PLC0415
        from inject import Injection, sweep  # noqa: PLC0415
        from workers import run  # noqa: PLC0415

        began = time.monotonic()
        self._make_bases()
        bases = Bases(self.scratch / "bases")
        damage = Damage(bases, self.scratch / "damaged")
        first, number = self.arguments.seed, self.arguments.inputs
        rows = [damage.case(seed) for seed in range(first, first + number)]
        for outcome in run([case for _, _, case in rows]):
            name, past, _ = rows[outcome.case]
            self.past_header += past
            self._note("damaged inputs", name, outcome, f"seed {first + outcome.case}")

        injection = Injection(bases, self.scratch / "faulty")
        left = self.arguments.faults
        plan = injection.plan()
        # In another order than they are written, so that a short run has some of all.
        random.Random(1).shuffle(plan)
        share = max(2, self.arguments.faults // len(plan))
        for most in (share, 1 << 20):
            for row in plan:
                if left <= 0:
                    break
                tried = 0
                for outcome in sweep(injection, run, row, min(most, left)):
                    scenario, operation, mode, code, written = row
                    name = f"{scenario}: {operation} {mode} {code}"
                    where = f"{'written' if written else 'read'}, call {tried + 1}"
                    self._note("faults", name, outcome, where)
                    tried += 1
                left -= tried
            if most == share and left > 0:
                continue
            break
        for title, count, function in (
            ("interrupts", self.arguments.interrupts, injection.interrupted),
            ("kills", self.arguments.kills, injection.killed),
        ):
            cases = [lambda seed=seed, f=function: f(seed) for seed in range(count)]
            for outcome in run(cases):
                self._note(title, f"{title} of kind {outcome.case % 6}", outcome, f"{outcome.case}")
        return self._report(time.monotonic() - began)

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
        self.counts[title][kind] += 1
        if kind in BAD:
            self.findings.append(
                f"{title}: {name}, {where}: {kind}: {outcome.detail} {outcome.message}"
            )
            print(self.findings[-1], flush=True)
        elif outcome.message:
            # One of each shape, without what differs from case to case.
            message = outcome.message.replace(str(self.scratch), "...")
            shape = "".join(c for c in message[:160] if not c.isdigit())
            self.messages.setdefault(shape, f"{outcome.detail}: {message}")

    def _report(self, seconds: float) -> int:
        total = sum(sum(counter.values()) for counter in self.counts.values())
        for title, counter in self.counts.items():
            kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(counter.items()))
            print(f"{title}: {sum(counter.values())} ({kinds})")
        print(f"past a header: {self.past_header} of {sum(self.counts['damaged inputs'].values())}")
        print(f"{total} cases in {seconds:.0f} s, findings: {len(self.findings)}")
        if self.arguments.out:
            result = {
                "counts": self.counts,
                "past_header": self.past_header,
                "seconds": round(seconds),
                "findings": self.findings,
                "messages": list(self.messages.values()),
            }
            self.arguments.out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        return 1 if self.findings else 0


if __name__ == "__main__":
    main()
