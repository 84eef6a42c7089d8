"""What `flashmoe info` shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flashmoe.cli.report import size

if TYPE_CHECKING:
    from flashmoe.measure.family import Published
    from flashmoe.measure.fit import Fit
    from flashmoe.measure.info import Info


def info_lines(info: Info) -> list[str]:
    """A model, what it asks for, and what the machine makes of it."""
    s = info.summary
    lines = [
        f"{s.source}: {s.model_type}",
        f"  layers         {s.layers}, {s.attention_layers} of them full attention, "
        f"the others GatedDeltaNet; hidden size {s.hidden_size}",
        f"  experts        {s.num_experts} a layer, {size(s.expert)} each; {s.experts_per_token} "
        f"per token (the model's own: {s.own_experts_per_token}) and a shared one",
        f"  vocabulary     {s.vocab_size}",
        f"  context        {s.context} tokens",
        f"  parameters     {s.parameters:,}, of which {s.active_parameters:,} compute a token",
        "",
    ]
    width = max(len(role.name) for role in s.roles)
    for role in s.roles:
        formats = "; ".join(role.formats)
        lines.append(
            f"  {role.name:{width}}  {role.parameters:>17,}  {size(role.nbytes):>8}  {formats}"
        )
    return [*lines, "", *_needs(info), "", *_speed(info.fit)]


def _needs(info: Info) -> list[str]:
    s, f = info.summary, info.fit
    disk = "here" if f.present else "" if f.disk_free is None else f"{size(f.disk_free)} free"
    if f.reads_disk:
        room = f"less what is cached: memory has room for {f.cached_share:.0%} of them"
    else:
        room = "all of which memory has room for"
    return [
        f"  on disk        {size(s.disk)}" + (f"; {disk}" if disk else ""),
        f"  resident       {size(s.resident)} of memory; {size(f.memory_available)} available "
        f"of {size(f.memory)}",
        f"  a sequence     {size(s.state_fixed)}, and {size(s.state_per_token)} a token",
        f"  a token needs  {size(s.read_per_token)} of experts, {room}",
    ]


def _speed(f: Fit) -> list[str]:
    lines = [f"  {verdict(f)}"]
    if not f.fits_memory:
        return lines
    text, random = f.on_text, f.prediction
    speed = f"about {rate(text.tokens_per_second)} tok/s predicted"
    if f.reads_disk:
        speed += (
            f" if experts repeat as on text, {rate(random.tokens_per_second)} if all are equally "
            "likely"
        )
    limit = f"{rate(text.limit)}" if f.reads_disk else f"{rate(random.limit)}"
    lines.append(f"  {speed}; {limit} if only bytes took time")
    parts = {
        "mixers": text.mixer,
        "routers": text.router,
        "experts": text.experts,
        "the host's waits": text.wait,
        "reading experts": text.reading,
        "head": text.head,
    }
    shown = ", ".join(f"{_milliseconds(t)} {name}" for name, t in parts.items() if t > 0)
    lines.append(f"  a token        {_milliseconds(text.seconds)} ms: {shown}")
    computes = "its GPU" if f.threads is None else f"{f.threads} threads"
    rates = f"memory {f.memory_rate / 1e9:.3g} GB/s ({f.memory_rate_basis})"
    if f.reads_disk:
        rates += f", drive {f.disk_rate / 1e9:.2g} GB/s ({f.disk_rate_basis})"
    lines.append(f"  by             {f.machine}, {computes}: {rates}")
    return lines + _warnings(f)


def _warnings(f: Fit) -> list[str]:
    if not f.slow_disk:
        return []
    return [
        "",
        f"  warning: this drive gives {f.disk_rate / 1e9:.2g} GB/s; streaming experts wants 1 GB/s "
        "at least. Put the model on an internal SSD, or take one whose experts fit into memory",
    ]


def family_lines(family: Sequence[tuple[Published, Fit]]) -> list[str]:
    """The published models in a table."""
    f = family[0][1]
    computes = "GPU" if f.threads is None else f"{f.threads} threads"
    free = "" if f.disk_free is None else f", {size(f.disk_free)} of disk free"
    lines = [
        f"{f.machine}: {size(f.memory)} of memory, {size(f.memory_available)} for models{free}",
        f"{computes}; memory {f.memory_rate / 1e9:.3g} GB/s ({f.memory_rate_basis}), "
        f"drive {f.disk_rate / 1e9:.2g} GB/s ({f.disk_rate_basis})",
        "",
        f"  {'':46}  on disk  resident  cached  tok/s  limit",
    ]
    for model, fit in family:
        speed = limit = "-"
        if fit.fits_memory:
            speed, limit = (rate(x) for x in (fit.on_text.tokens_per_second, fit.on_text.limit))
        lines.append(
            f"  {model.name:46} {size(model.disk):>8}  {size(model.resident):>8}"
            f"{fit.cached_share:>8.0%}{speed:>7}{limit:>7}  {verdict(fit)}"
        )
    lines += [
        "",
        "tok/s: of text, predicted and not measured. cached: the share of the experts that memory",
        "has room for. limit: if only bytes took time. 'flashmoe info MODEL' says more of one.",
    ]
    return lines + _warnings(f)


def verdict(f: Fit) -> str:
    """Whether it fits, in a few words."""
    missing = [] if f.fits_memory else ["memory"]
    missing += [] if f.fits_disk else ["disk"]
    where = "here" if f.machine == "this machine" else f"on {f.machine}"
    if missing:
        return f"too little {' and '.join(missing)} {where}"
    return "fits this machine" if f.machine == "this machine" else f"fits {f.machine}"


def rate(tokens_per_second: float) -> str:
    """Two digits where a prediction deserves no more, no exponents."""
    return f"{tokens_per_second:.0f}" if tokens_per_second >= 10 else f"{tokens_per_second:.1f}"


def _milliseconds(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.2g}"
