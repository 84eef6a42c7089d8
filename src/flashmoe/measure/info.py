"""What a checkpoint is, what it asks of a machine, and how fast this one could run it."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashmoe import hub
from flashmoe.checkpoint.architecture import EXPERTS, ROLES, SMALL, Kind, weights_of
from flashmoe.checkpoint.config import ExpertsPerToken
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.table import Format
from flashmoe.errors import ArgumentError
from flashmoe.machine import probe

ASSUMED_DISK_RATE = 3e9
"""Bytes a second of a middling NVMe SSD, where nothing was stated and nothing can be measured."""


@dataclass(frozen=True)
class Role:
    """Weights of one role: parameters, bytes as stored, and the formats they are stored in."""

    name: str
    parameters: int
    nbytes: int
    formats: tuple[str, ...]


@dataclass(frozen=True)
class Summary:
    """A checkpoint in numbers; sizes in bytes.

    Attributes:
        active_parameters: that compute one token, with experts_per_token in force.
        resident: always in memory, caches and states of sequences not counted.
        expert: one routed expert, as stored; the largest where layers differ.
        experts: all of them.
        read_per_token: of routed experts, of which the caches save a part.
        state_fixed, state_per_token: what a sequence holds: convolution and recurrent states, and
            the KV cache for each of its tokens, in bfloat16 (float32 where that is the precision).
    """

    source: str
    model_type: str
    layers: int
    attention_layers: int
    hidden_size: int
    vocab_size: int
    num_experts: int
    own_experts_per_token: int
    experts_per_token: int
    context: int
    parameters: int
    active_parameters: int
    disk: int
    resident: int
    expert: int
    experts: int
    read_per_token: int
    state_fixed: int
    state_per_token: int
    roles: tuple[Role, ...]


@dataclass(frozen=True)
class Fit:
    """A checkpoint on this machine; bytes, bytes a second, tokens a second.

    Attributes:
        present: the checkpoint lies here already, so that free disk is not needed.
        disk_rate_basis, memory_rate_basis: "measured", "stated" or "assumed".
        cached_share: of the experts, what memory left free by the resident part holds.
        tokens_per_second: if every token reads its weights once, at these rates, and all experts
            are equally likely. Real routing favours some, which are cached; computing costs extra.
    """

    memory: int
    memory_available: int
    disk_free: int
    present: bool
    fits_memory: bool
    fits_disk: bool
    disk_rate: float
    disk_rate_basis: str
    memory_rate: float
    memory_rate_basis: str
    cached_share: float
    tokens_per_second: float


@dataclass(frozen=True)
class Info:
    """A checkpoint and what this machine makes of it."""

    summary: Summary
    fit: Fit

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return dataclasses.asdict(self)


def describe(
    source: str | os.PathLike[str],
    *,
    experts_per_token: ExpertsPerToken = "auto",
    disk_rate: float | None = None,
    memory_rate: float | None = None,
) -> Info:
    """Looks at a directory, "demo", or a hub id of which only metadata is fetched.

    Args:
        experts_per_token: as `Model` takes it.
        disk_rate, memory_rate: bytes a second; None measures them here, in about a second.
    Raises:
        ArgumentError: a rate or number of experts that cannot be.
        CheckpointError: no such checkpoint, or one that flashmoe does not run.
    """
    for name, rate in (("disk", disk_rate), ("memory", memory_rate)):
        if rate is not None and not 0 < rate < math.inf:
            raise ArgumentError(f"the rate of the {name} must be more than 0; got {rate!r}")
    checkpoint = Checkpoint.look(source)
    summary = summarise(checkpoint, checkpoint.config.experts_in_force(experts_per_token))
    return Info(summary, _fit(checkpoint, summary, disk_rate, memory_rate))


def summarise(checkpoint: Checkpoint, experts_per_token: int) -> Summary:
    """The numbers of a checkpoint of which so many experts run for a token."""
    c = checkpoint.config
    roles = _roles(checkpoint)
    expert_parameters = sum(
        sum(f.rows * f.cols for f in (layer.gate, layer.up, layer.down))
        for layer in checkpoint.experts
    )
    parameters = sum(role.parameters for role in roles)
    always = parameters - expert_parameters * c.num_experts
    if not c.tie_word_embeddings:
        always -= c.vocab_size * c.hidden_size  # of the embedding, one row is used
    per_layer = [layer.expert_bytes for layer in checkpoint.experts]
    attention = c.layer_types.count("full_attention")
    delta = len(c.layer_types) - attention
    state_layer = (c.linear_conv_kernel_dim - 1) * c.conv_channels + (
        c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim
    )
    return Summary(
        source=checkpoint.source,
        model_type=c.model_type,
        layers=len(c.layer_types),
        attention_layers=attention,
        hidden_size=c.hidden_size,
        vocab_size=c.vocab_size,
        num_experts=c.num_experts,
        own_experts_per_token=c.num_experts_per_tok,
        experts_per_token=experts_per_token,
        context=c.max_position_embeddings,
        parameters=parameters,
        active_parameters=always + experts_per_token * expert_parameters,
        disk=checkpoint.disk_bytes,
        resident=(
            sum(m.format.nbytes for m in checkpoint.matrices.values())
            + sum(4 * v.length for v in checkpoint.vectors.values())
        ),
        expert=max(per_layer),
        experts=c.num_experts * sum(per_layer),
        read_per_token=experts_per_token * sum(per_layer),
        state_fixed=4 * delta * state_layer,
        state_per_token=2 * attention * 2 * c.num_key_value_heads * c.head_dim,
        roles=roles,
    )


def _roles(checkpoint: Checkpoint) -> tuple[Role, ...]:
    formats: dict[str, list[tuple[Format, int]]] = {}
    for weight in weights_of(checkpoint.config):
        if weight.kind is Kind.MATRIX:
            formats.setdefault(weight.role, []).append((checkpoint.matrices[weight.name].format, 1))
    formats[EXPERTS] = [
        (f, checkpoint.config.num_experts)
        for layer in checkpoint.experts
        for f in (layer.gate, layer.up, layer.down)
    ]
    roles = [
        Role(
            name,
            sum(f.rows * f.cols * count for f, count in formats[name]),
            sum(f.nbytes * count for f, count in formats[name]),
            _unique(_spell(f) for f, _ in formats[name]),
        )
        for name in ROLES
        if name in formats
    ]
    vectors = checkpoint.vectors.values()
    small = Role(
        SMALL,
        sum(v.length for v in vectors),
        sum(int(v.extents[:, 2].sum()) for v in vectors),
        _unique(v.dtype.lower() for v in vectors),
    )
    return (*roles, small)


def _spell(format: Format) -> str:
    if format.bits:
        return f"{format.bits}-bit, group {format.group}"
    return format.dtype.lower()


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


def _fit(
    checkpoint: Checkpoint,
    summary: Summary,
    disk_rate: float | None,
    memory_rate: float | None,
) -> Fit:
    available = probe.available_memory()
    here = checkpoint.here
    free = shutil.disk_usage(checkpoint.directory if here else hub.cache_place()).free
    disk_basis = "assumed" if disk_rate is None else "stated"
    if disk_rate is None and here:
        lengths = np.concatenate([layer.extents[:, 2] for layer in checkpoint.experts])
        disk_rate = probe.disk_rate(checkpoint.files, int(np.median(lengths)))
        disk_basis = "assumed" if disk_rate is None else "measured"
    memory_basis = "measured" if memory_rate is None else "stated"
    disk_rate = disk_rate or ASSUMED_DISK_RATE
    memory_rate = memory_rate or probe.memory_rate(probe.physical_cores())

    cached = min(1.0, max(0, available - summary.resident) / summary.experts)
    embedding = checkpoint.matrices["embed_tokens"].format.nbytes
    swept = summary.resident - (0 if checkpoint.config.tie_word_embeddings else embedding)
    seconds = (swept + summary.read_per_token) / memory_rate
    seconds += (1 - cached) * summary.read_per_token / disk_rate
    return Fit(
        memory=probe.total_memory(),
        memory_available=available,
        disk_free=free,
        present=here,
        fits_memory=summary.resident <= available,
        fits_disk=here or summary.disk <= free,
        disk_rate=disk_rate,
        disk_rate_basis=disk_basis,
        memory_rate=memory_rate,
        memory_rate_basis=memory_basis,
        cached_share=cached,
        tokens_per_second=1 / seconds,
    )
