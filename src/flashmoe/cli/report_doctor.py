"""What `flashmoe doctor` shows: one block to paste."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flashmoe.cli.report import size

if TYPE_CHECKING:
    from flashmoe.measure.doctor import BackendReport, Reads, Report
    from flashmoe.measure.kernels import Check


def doctor_lines(report: Report) -> list[str]:
    """Everything that was found, what is wrong last."""
    m = report.machine
    lines = [
        f"flashmoe {m['flashmoe']}, Python {m['python']}, {m['system']} on {m['architecture']}",
        f"{m['processor'] or 'a processor without a name'}: {m['cores']} cores to compute on, "
        f"{size(m['memory'])} of memory, {size(m['memory_available'])} available",
    ]
    if report.quick:
        lines.append("quick: small shapes, few repeats; speeds mean nothing")
    lines += _read_lines(report.reads)
    for backend in report.backends:
        lines += ["", *_backend_lines(backend, m["kernels"])]
    wrong = _wrong(report)
    lines += ["", *(wrong or ["everything is right"])]
    return lines


def _read_lines(reads: list[Reads]) -> list[str]:
    if not reads:
        return ["", "reads: no room for a file to measure with"]
    readers = sorted({r.readers for r in reads})
    lines = ["", "reads at random places, GB/s, by how many at once:"]
    lines.append(f"  {'':24}" + "".join(f"{n:>7}" for n in readers))
    for name in dict.fromkeys(r.name for r in reads):
        for kind in ("cold", "warm"):
            rates = [getattr(r, kind) for r in reads if r.name == name]
            shown = "".join(f"{rate / 1e9:7.2f}" if rate else f"{'-':>7}" for rate in rates)
            lines.append(f"  {f'{name}, {kind}':24}{shown}")
    return lines


def _backend_lines(backend: BackendReport, cpu_kernels: str) -> list[str]:
    title = backend.name if backend.device else f"{backend.name}: {cpu_kernels}, float32 inputs"
    lines = [title]
    if backend.error is not None:
        lines.append(f"  FAILED: {backend.error}")
    for name, value in backend.device.items():
        if value.isdecimal():
            value = size(int(value))  # noqa: PLW2901
        if name != "compiler":
            lines.append(f"  {name:30} {value}")
    if backend.device:
        log = backend.device.get("compiler") or "nothing to say"
        lines += ["  compiler:", *(f"    {line}" for line in log.splitlines())]
        lines.append(f"  {_kernels(backend)}")
    if backend.latency is not None:
        lines.append(
            f"  from commit to start {backend.latency.start * 1e6:.0f} us, from end to wake "
            f"{backend.latency.wake * 1e6:.0f} us"
        )
    if backend.copy is not None:
        what = "copied by a kernel" if backend.device else "read from memory"
        lines.append(f"  {what}: {backend.copy / 1e9:.1f} GB/s")
    if backend.checks:
        lines += ["", f"  {'kernel':54}{'error':>9}{'us':>10}{'GB/s':>8}{'share':>7}{'GFLOP/s':>9}"]
    lines += [_check_line(check, backend.copy) for check in backend.checks]
    if backend.error is None:
        lines += ["", f"  {demo_line(backend)}"]
    for name, prediction in backend.predictions.items():
        lines.append(f"  predicted for {name}: {prediction.tokens_per_second:.1f} tok/s of text")
    return lines


def _kernels(backend: BackendReport) -> str:
    found = f"{len(backend.compiled)} specialised kernels compiled"
    if backend.missing:
        return f"{found}; MISSING {len(backend.missing)} that the published models need"
    return f"{found}, among them all that the published models need"


def _check_line(check: Check, copy: float | None) -> str:
    if check.error is None:
        return f"  {check.name:54}   FAILED: {check.failure}"
    share = f"{check.rate / copy:.0%}" if copy else "-"
    mark = "" if check.good else f"  FAILED: allowed is {check.bound:.0e}"
    return (
        f"  {check.name:54}{check.error:9.1e}{check.seconds * 1e6:10.1f}{check.rate / 1e9:8.1f}"
        f"{share:>7}{check.speed / 1e9:9.0f}{mark}"
    )


def demo_line(backend: BackendReport) -> str:
    """What a backend made of the demo model."""
    from flashmoe.measure.doctor import PROMPT, STEPS  # noqa: PLC0415

    demo = backend.demo
    if demo.difference is None:
        return f"{backend.name}: FAILED: {demo.error}"
    tokens = "the same tokens" if demo.same_tokens else "OTHER TOKENS"
    return (
        f"{backend.name}: {'ok' if demo.good else 'FAILED'}: demo model, a prompt of {PROMPT} and "
        f"{STEPS} more tokens: logits within {demo.difference:.1e} of their standard deviation, "
        f"{tokens}"
    )


def _wrong(report: Report) -> list[str]:
    lines = []
    for backend in report.backends:
        if backend.error is not None:
            lines.append(f"WRONG: {backend.name}: {backend.error}")
            continue
        lines += [f"WRONG: {backend.name}: {c.name}" for c in backend.checks if not c.good]
        lines += [f"WRONG: {backend.name}: not compiled: {kernel}" for kernel in backend.missing]
        if not backend.demo.good:
            lines.append(f"WRONG: {demo_line(backend)}")
    return lines
