"""Statistics as text for people."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashmoe.generate.stats import Stats


def size(nbytes: float) -> str:
    """Bytes as a person reads them, in powers of 1000."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} bytes"


def stats_line(stats: Stats) -> str:
    """One generation in one line."""
    parts = [f"{stats.generated_tokens} tokens"]
    if stats.decode_rate is not None:
        parts.append(f"{stats.decode_rate:.1f} tok/s")
    if stats.first_token_seconds is not None:
        parts.append(f"first after {stats.first_token_seconds:.2f} s")
    if stats.prefill_rate is not None:
        parts.append(f"prompt of {stats.prompt_tokens} at {stats.prefill_rate:.0f} tok/s")
    parts.append(f"{size(stats.bytes_read)} of experts read")
    if stats.hit_rate is not None:
        parts.append(f"{stats.hit_rate:.0%} from memory")
    parts.append(f"peak memory {size(stats.peak_memory)}")
    parts.append(f"{stats.experts_per_token} experts per token")
    parts.append(f"{stats.precision} on {stats.threads} x {stats.kernels}")
    return " | ".join(parts)


def bench_lines(result: dict[str, Any]) -> list[str]:
    """What `flashmoe bench` shows."""
    runs = result["runs"]
    first = runs[0]
    names: dict[str, tuple[str, str | Callable[[float], str]]] = {
        "prefill_rate": ("prefill", "{:.1f} tok/s"),
        "decode_rate": ("decode", "{:.2f} tok/s"),
        "first_token_seconds": ("first token", "{:.3f} s"),
        "bytes_read": ("experts read", size),
        "hit_rate": ("from memory", "{:.1%}"),
        "read_seconds": ("reading", "{:.2f} s over all threads"),
        "wait_seconds": ("waiting for reads", "{:.2f} s"),
        "peak_memory": ("peak memory", size),
    }
    lines = [
        f"{result['source']}: medians of {len(runs)} runs, a prompt of "
        f"{result['prompt_tokens']} tokens and {result['tokens']} generated",
        f"{first['experts_per_token']} experts per token, {first['precision']}, "
        f"{first['threads']} threads, {first['kernels']}",
    ]
    for name, (label, form) in names.items():
        value = result["median"][name]
        if value is not None:
            text = form.format(value) if isinstance(form, str) else form(value)
            lines.append(f"  {label:17}  {text}")
    return [*lines, "", *_decode_lines(result["decode"])]


def _decode_lines(decode: dict[str, Any]) -> list[str]:
    """Where a token's time goes, and how near the machine's limits it is."""
    layers, kinds = decode["layers"], decode["layer_types"]
    labels = {
        "linear_attention": "GatedDeltaNet",
        "full_attention": "attention",
        "router": "router",
        "experts": "experts",
        "wait": "waiting for experts",
        "combine": "combine",
    }
    times = dict.fromkeys(labels, 0.0)
    for kind, layer in zip(kinds, layers, strict=True):
        times[kind] += layer["mixer"]
        for part in ("router", "experts", "wait", "combine"):
            times[part] += layer[part]
    rows = {labels[name]: seconds for name, seconds in times.items()}
    rows["head"] = decode["head_seconds"]
    rows["else"] = max(0.0, decode["seconds"] - sum(rows.values()))
    lines = [f"  a token of decode: {decode['seconds'] * 1e3:.2f} ms, {len(layers)} layers"]
    for label, seconds in rows.items():
        share = seconds / decode["seconds"]
        bar = "#" * round(40 * share)
        lines.append(f"    {label:20} {seconds * 1e3:8.2f} ms {share:5.0%}  {bar}".rstrip())
    parts = list(layers[0])
    lines.append(f"    {'a layer, ms':20}" + "".join(f"{part:>9}" for part in [*parts, "all"]))
    for kind in dict.fromkeys(kinds):
        alike = [layer for k, layer in zip(kinds, layers, strict=True) if k == kind]
        means = [1e3 * sum(layer[part] for layer in alike) / len(alike) for part in parts]
        label = f"{len(alike)} x {labels[kind]}"
        lines.append(f"    {label:20}" + "".join(f"{m:9.3f}" for m in [*means, sum(means)]))
    rate = decode["bytes_touched"] / decode["seconds"]
    lines.append(
        f"  touched            {size(decode['bytes_touched'])} a token, {rate / 1e9:.1f} GB/s: "
        f"{rate / decode['memory_rate']:.0%} of the {decode['memory_rate'] / 1e9:.1f} GB/s that "
        "memory gives"
    )
    if decode["busy"] > 0:
        lines.append(
            f"  threads computing  {decode['prompt_busy']:.0%} of the prompt's time, "
            f"{decode['busy']:.0%} of decode's"
        )
    if decode["bytes_read"] > 0 and decode["disk_rate"]:
        rate = decode["bytes_read"] / decode["seconds"]
        lines.append(
            f"  experts read       {size(decode['bytes_read'])} a token, {rate / 1e9:.2f} GB/s: "
            f"{rate / decode['disk_rate']:.0%} of the {decode['disk_rate'] / 1e9:.2f} GB/s that "
            "the disk gives"
        )
    return lines


def eval_lines(result: dict[str, Any]) -> list[str]:
    """What `flashmoe eval` shows."""
    lines = []
    for role in ("model", "reference"):
        if setting := result.get(role):
            lines.append(
                f"{role:9}  {setting['source']}: {setting['experts_per_token']} experts per token, "
                f"{setting['precision']}"
            )
    names = {
        "bits_per_byte": ("bits per byte", ".4f", ""),
        "perplexity": ("perplexity", ".3f", ""),
        "kl": ("KL from reference", ".3g", " nats a token"),
        "agreement": ("same likeliest", ".1%", ""),
        "json_valid": ("JSON valid", ".1%", ""),
        "json_schema": ("follows schema", ".1%", ""),
        "json_value": ("has the values", ".1%", ""),
        "call_well_formed": ("call well formed", ".1%", ""),
        "call_tool": ("right tool", ".1%", ""),
        "call_right": ("arguments too", ".1%", ""),
    }
    for part in ("text", "prompts"):
        if part not in result:
            continue
        found = result[part]
        size_of = (
            f"{found['count']} prompts"
            if part == "prompts"
            else (f"{found['tokens']} tokens, {found['bytes']} bytes")
        )
        lines += ["", f"{found['file']}: {size_of}"]
        for name, (label, form, unit) in names.items():
            if name in found:
                value, low, high = (format(found[name][k], form) for k in ("value", "low", "high"))
                lines.append(f"  {label:17}  {value}{unit}  ({low} to {high})")
    return lines
