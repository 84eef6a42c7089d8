"""How much memory a model is given for what."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from flashmoe.errors import ArgumentError

if TYPE_CHECKING:
    from flashmoe import _native

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


Ask = Callable[..., "_native.Needs"]
"""`Checkpoint.needs` with all decided but what is asked about."""


def default_cache(ask: Ask, available: int) -> int:
    """Bytes to keep experts in: all of them where they fit into 70 % of the available memory.

    Else what is left of these 70 % beside the resident weights: a cache of our own, read past the
    page cache, is 1.6 to 2.2 times as fast on Linux as leaving the same memory to the page cache
    (docs/performance.md). Else, and on macOS where the original engine found the opposite, 0.
    """
    needs, on_mac = ask(), sys.platform == "darwin"
    return cache_for(needs["resident"], needs["all_slots"], available, on_mac=on_mac)


def cache_for(resident: int, experts: int, available: int, *, on_mac: bool) -> int:
    """Likewise for so many bytes of resident weights and of slots for all experts."""
    left = max(0, int(0.7 * available) - resident)
    if experts <= left:
        return experts
    return 0 if on_mac else left


def check_room(ask: Ask, cache: int, available: int, keys: int = 0) -> int:
    """Bytes of resident weights, a cache of so many bytes, and keys and values, which must fit.

    Memory is granted as it is first touched: without this the system would end the process later.
    Raises ArgumentError where they do not fit.
    """
    needs = ask(cache_bytes=cache)
    resident, slots = needs["resident"], needs["slots"] if cache else 0
    if resident + slots + keys <= available:
        return resident + slots + keys
    takes = f"the weights that every token needs take {resident / 1e9:.2f} GB of memory"
    has = f"{available / 1e9:.2f} GB are available"
    if resident > available:
        raise ArgumentError(f"{takes}; {has}: end other programs, or take a model of fewer bits")
    if resident + keys > available:
        raise ArgumentError(
            f"{takes} and the context that was asked for {keys / 1e9:.2f} GB more; {has}: ask for "
            "a shorter context"
        )
    raise ArgumentError(
        f"{takes} and the cache {slots / 1e9:.2f} GB more; {has}: give a smaller cache, or none "
        "to have one that fits"
    )


def prompt_chunk(ask: Ask, available: int) -> int:
    """Prompt tokens to compute together: a power of two from 128 to 2048.

    A chunk reads nearly every expert once, so that the longest is the fastest; what it computes in
    takes at most 5 % of the available memory.
    """
    chunk = 2048
    while chunk > 128:
        needs = ask(chunk=chunk, context=chunk)
        if needs["activations"] + needs["scratch"] <= 0.05 * available:
            break
        chunk //= 2
    return chunk


def parse_bytes(size: int | str) -> int:
    """Bytes from a number or from text such as "4GB" (10^9) or "512MiB" (2^20)."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(I?)B?", str(size).strip().upper())
    if not isinstance(size, str) or match is None or (match[3] and not match[2]):
        raise ArgumentError(f'a size is bytes, 0 or more, or text such as "4GB"; got {size!r}')
    nbytes = float(match[1]) * (_BINARY if match[3] else _UNITS)[match[2]]
    if nbytes > 1e30:
        raise ArgumentError(f"a size is at most 1e30 bytes; got {size[:40]!r}")
    return int(nbytes)
