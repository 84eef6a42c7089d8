"""What a checkpoint is, what it asks of a machine, and how fast this one could run it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.find import find_local
from flashmoe.checkpoint.headers import Tensor
from flashmoe.checkpoint.index import is_skipped
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.table import Format
from flashmoe.errors import ArgumentError, CheckpointError
from flashmoe.machine import probe

ASSUMED_DISK_RATE = 3e9
"""Bytes a second of a middling NVMe SSD, where nothing was stated and nothing can be measured."""

# Every matrix by the end of its canonical name; what is left over is small.
_KINDS = {
    "embeddings": ("embed_tokens",),
    "output head": ("lm_head",),
    "GatedDeltaNet": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "router": ("mlp.gate", "shared_expert_gate"),
    "shared expert": ("gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Kind:
    """Tensors of one kind: parameters, bytes as stored, and the formats they are stored in."""

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
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Fit:
    """A checkpoint on this machine; bytes, bytes a second, tokens a second.

    Attributes:
        present: the checkpoint lies here already, so that free disk is not needed.
        disk_rate_source, memory_rate_source: "measured", "stated" or "assumed".
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
    disk_rate_source: str
    memory_rate: float
    memory_rate_source: str
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
    source: str,
    *,
    experts_per_token: int | None = 4,
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
    if experts_per_token is not None and experts_per_token < 1:
        raise ArgumentError(
            f"experts_per_token must be None or at least 1; got {experts_per_token}"
        )
    checkpoint, disk, local = _open(source)
    summary = summarise(checkpoint, source, disk, experts_per_token)
    place = checkpoint.directory if local else _hub_cache()
    return Info(summary, _fit(checkpoint, summary, place, local, disk_rate, memory_rate))


def summarise(
    checkpoint: Checkpoint, source: str, disk: int, experts_per_token: int | None
) -> Summary:
    """The numbers of a checkpoint that takes `disk` bytes on disk."""
    c = checkpoint.config
    own = c.num_experts_per_tok
    k = own if experts_per_token is None else min(experts_per_token, own)
    kinds = _kinds(checkpoint)
    expert_parameters = sum(
        sum(f.rows * f.cols for f in (layer.gate, layer.up, layer.down))
        for layer in checkpoint.experts
    )
    parameters = sum(kind.parameters for kind in kinds)
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
        source=source,
        model_type=c.model_type,
        layers=len(c.layer_types),
        attention_layers=attention,
        hidden_size=c.hidden_size,
        vocab_size=c.vocab_size,
        num_experts=c.num_experts,
        own_experts_per_token=own,
        experts_per_token=k,
        context=c.max_position_embeddings,
        parameters=parameters,
        active_parameters=always + k * expert_parameters,
        disk=disk,
        resident=(
            sum(m.format.nbytes for m in checkpoint.matrices.values())
            + sum(4 * v.length for v in checkpoint.vectors.values())
        ),
        expert=max(per_layer),
        experts=c.num_experts * sum(per_layer),
        read_per_token=k * sum(per_layer),
        state_fixed=4 * delta * state_layer,
        state_per_token=2 * attention * 2 * c.num_key_value_heads * c.head_dim,
        kinds=kinds,
    )


def _kinds(checkpoint: Checkpoint) -> tuple[Kind, ...]:
    formats: dict[str, list[tuple[Format, int]]] = {name: [] for name in _KINDS}
    for name, matrix in checkpoint.matrices.items():
        kind = next(k for k, ends in _KINDS.items() if name.endswith(ends))
        formats[kind].append((matrix.format, 1))
    formats["routed experts"] = [
        (f, checkpoint.config.num_experts)
        for layer in checkpoint.experts
        for f in (layer.gate, layer.up, layer.down)
    ]
    kinds = [
        Kind(
            name,
            sum(f.rows * f.cols * count for f, count in found),
            sum(f.nbytes * count for f, count in found),
            _unique(_spell(f) for f, _ in found),
        )
        for name, found in formats.items()
        if found
    ]
    vectors = checkpoint.vectors.values()
    small = Kind(
        "norms, convolutions",
        sum(v.length for v in vectors),
        sum(int(v.extents[:, 2].sum()) for v in vectors),
        _unique(v.dtype.lower() for v in vectors),
    )
    return (*kinds, small)


def _spell(format: Format) -> str:
    if format.bits:
        return f"{format.bits}-bit, group {format.group}"
    return format.dtype.lower()


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


def _fit(
    checkpoint: Checkpoint,
    summary: Summary,
    place: Path,
    local: bool,
    disk_rate: float | None,
    memory_rate: float | None,
) -> Fit:
    available = probe.available_memory()
    free = shutil.disk_usage(place).free
    disk_source = "assumed" if disk_rate is None else "stated"
    if disk_rate is None and local:
        lengths = np.concatenate([layer.extents[:, 2] for layer in checkpoint.experts])
        disk_rate = probe.disk_rate(checkpoint.files, int(np.median(lengths)))
        disk_source = "assumed" if disk_rate is None else "measured"
    memory_source = "measured" if memory_rate is None else "stated"
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
        present=local,
        fits_memory=summary.resident <= available,
        fits_disk=local or summary.disk <= free,
        disk_rate=disk_rate,
        disk_rate_source=disk_source,
        memory_rate=memory_rate,
        memory_rate_source=memory_source,
        cached_share=cached,
        tokens_per_second=1 / seconds,
    )


def _open(source: str) -> tuple[Checkpoint, int, bool]:
    """A checkpoint, its bytes on disk, and whether it lies here."""
    directory = find_local(source)
    if directory is None:
        return _open_remote(source)
    checkpoint = Checkpoint.open(directory)
    disk = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return checkpoint, disk, True


def _open_remote(source: str) -> tuple[Checkpoint, int, bool]:
    """From config.json and the headers of the safetensors files, which are a few MB at most."""
    from huggingface_hub import HfApi, hf_hub_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        EntryNotFoundError,
        NotASafetensorsRepoError,
    )

    from flashmoe.hub import explained_errors  # noqa: PLC0415

    with explained_errors(source):
        config_path = Path(hf_hub_download(source, "config.json"))
        with contextlib.suppress(EntryNotFoundError):
            hf_hub_download(source, "generation_config.json", revision=config_path.parent.name)
    config = ModelConfig.load(config_path.parent)
    with explained_errors(source):
        try:
            found = HfApi().get_safetensors_metadata(source, revision=config_path.parent.name)
        except NotASafetensorsRepoError:
            found = None
    if found is None:
        raise CheckpointError(f"{source}: holds no safetensors files, which flashmoe reads")
    tensors = [
        Tensor(name, Path(file), start, end - start, tensor.dtype, tuple(tensor.shape))
        for file, metadata in found.files_metadata.items()
        for name, tensor in metadata.tensors.items()
        for start, end in (tensor.data_offsets,)
    ]
    disk = sum(tensor.nbytes for tensor in tensors)
    wanted = {tensor.name: tensor for tensor in tensors if not is_skipped(tensor.name)}
    return Checkpoint.of_tensors(config_path.parent, config, wanted, Path(source)), disk, False


def _hub_cache() -> Path:
    """The nearest existing directory of where a download would go."""
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415

    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    return place
