"""What a generation took: tokens, seconds, bytes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe.generate.setting import Setting
from flashmoe.machine import probe


@dataclass(frozen=True)
class Stats:
    """Of the latest `generate()` or `logits()` of a model; times in seconds, rates in tokens/s.

    Attributes:
        prompt_tokens: computed as a prompt in this call; what a state already held is not counted.
        cached_tokens: these, from a state or a snapshot of the conversation.
        generated_tokens: given out.
        prefill_seconds, decode_seconds: spent computing, not waiting for the caller.
        first_token_seconds: from the call's first work to its first token; None before that.
        finish_reason: "eos", "stop", "length" (max_tokens), "context" (full), "complete" (a
            constraint lets nothing follow), "cancelled", None if not ended.
        forward_rows: rows that were passed through the layers, as the engine counts them.
        reads, bytes_read: reads of experts.
        bytes_from_page_cache: of these, what was in memory already, as `preadv2(RWF_NOWAIT)` tells
            on Linux; None where the platform cannot tell.
        expert_hits, expert_misses: experts found in the program's own cache, and read.
        read_seconds, wait_seconds: spent reading, over all threads; computing waited for reads.
        forward_seconds, head_seconds: in the engine; of them for the output head.
        busy_seconds: that the engine's threads computed, all together; 0 on a GPU.
        peak_memory: largest resident size of the process so far, in bytes.
        resident_bytes, cache_bytes: weights that are always in memory; slots for experts.
        experts_per_token, precision, threads, kernels: what is in force.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    prefill_seconds: float
    decode_seconds: float
    first_token_seconds: float | None
    finish_reason: str | None
    forward_rows: int
    reads: int
    bytes_read: int
    bytes_from_page_cache: int | None
    expert_hits: int
    expert_misses: int
    read_seconds: float
    wait_seconds: float
    forward_seconds: float
    head_seconds: float
    busy_seconds: float
    peak_memory: int
    resident_bytes: int
    cache_bytes: int
    experts_per_token: int
    precision: str
    threads: int
    kernels: str

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens a second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first, which the prompt gives."""
        decoded = self.generated_tokens - 1
        return decoded / self.decode_seconds if decoded > 0 and self.decode_seconds else None

    @property
    def hit_rate(self) -> float | None:
        """Share of the experts needed that came from memory: own cache, or page cache by bytes."""
        needed = self.expert_hits + self.expert_misses
        if needed == 0:
            return None
        cached = self.bytes_from_page_cache
        share = cached / self.bytes_read if cached is not None and self.bytes_read else 0.0
        return (self.expert_hits + self.expert_misses * share) / needed

    def to_dict(self) -> dict[str, Any]:
        """Every attribute and rate, for JSON."""
        rates = ("prefill_rate", "decode_rate", "hit_rate")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in rates}


class Meter:
    """Counts one call. `before` and `now` are the engine's running totals."""

    def __init__(self, before: Mapping[str, float]) -> None:
        self._before = before
        self._start = time.perf_counter()
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.prefill_seconds = 0.0
        self.decode_seconds = 0.0
        self.first_token_seconds: float | None = None
        self.finish_reason: str | None = None

    def token(self) -> None:
        """A token is there."""
        self.generated_tokens += 1
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self._start

    def stats(
        self,
        now: Mapping[str, float],
        setting: Setting,
        kernels: str,
    ) -> Stats:
        """The totals' growth since the call began, with what is in force."""

        def grown(name: str) -> float:
            return now[name] - self._before[name]

        return Stats(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            first_token_seconds=self.first_token_seconds,
            finish_reason=self.finish_reason,
            forward_rows=int(grown("rows")),
            reads=int(grown("reads")),
            bytes_read=int(grown("bytes_read")),
            bytes_from_page_cache=(None if now["bytes_cached"] < 0 else int(grown("bytes_cached"))),
            expert_hits=int(grown("expert_hits")),
            expert_misses=int(grown("expert_misses")),
            read_seconds=grown("read_seconds"),
            wait_seconds=grown("wait_seconds"),
            forward_seconds=grown("forward_seconds"),
            head_seconds=grown("head_seconds"),
            busy_seconds=grown("busy_seconds"),
            peak_memory=probe.peak_memory(),
            resident_bytes=int(now["resident_bytes"]),
            cache_bytes=int(now["slot_bytes"]),
            experts_per_token=setting.experts_per_token,
            precision=setting.precision,
            threads=setting.threads,
            kernels=kernels,
        )
