"""What a checkpoint is, and what it asks of a machine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flashmoe.checkpoint.architecture import EXPERTS, ROLES, SMALL, Kind, weights_of
from flashmoe.checkpoint.config import ExpertsPerToken
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.table import Format
from flashmoe.measure.fit import HERE, Fit, Sizes, Target, fit_model
from flashmoe.measure.time_model import bytes_of, spell


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
class Info:
    """A checkpoint and what a machine makes of it."""

    summary: Summary
    fit: Fit

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {"summary": dataclasses.asdict(self.summary), "fit": self.fit.to_dict()}


def describe(
    source: str | os.PathLike[str],
    *,
    experts_per_token: ExpertsPerToken = "auto",
    target: Target = HERE,
) -> Info:
    """Looks at a directory, "demo", or a hub id of which only metadata is fetched.

    Args:
        experts_per_token: as `Model` takes it.
    Raises:
        ArgumentError: a rate, a machine or a number of experts that cannot be.
        CheckpointError: no such checkpoint, or one that flashmoe does not run.
    """
    target.check()
    checkpoint = Checkpoint.look(source)
    summary = summarise(checkpoint, checkpoint.config.experts_in_force(experts_per_token))
    sizes = Sizes(summary.resident, summary.experts, summary.disk)
    here = checkpoint if checkpoint.here and target.machine is None else None
    fit = fit_model(target, sizes, bytes_of(checkpoint), summary.experts_per_token, here)
    return Info(summary, fit)


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
    needs = checkpoint.needs(experts_per_token)
    return Summary(
        source=checkpoint.source,
        model_type=c.model_type,
        layers=len(c.layer_types),
        attention_layers=c.layer_types.count("full_attention"),
        hidden_size=c.hidden_size,
        vocab_size=c.vocab_size,
        num_experts=c.num_experts,
        own_experts_per_token=c.num_experts_per_tok,
        experts_per_token=experts_per_token,
        context=c.max_position_embeddings,
        parameters=parameters,
        active_parameters=always + experts_per_token * expert_parameters,
        disk=checkpoint.disk_bytes,
        resident=needs["resident"],
        expert=max(per_layer),
        experts=c.num_experts * sum(per_layer),
        read_per_token=experts_per_token * sum(per_layer),
        state_fixed=needs["recurrent"],
        state_per_token=needs["token"],
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
            _unique(spell(f) for f, _ in formats[name]),
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


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))
