"""A checkpoint, opened once: its configuration, where every weight lies, and how it reads text."""

import dataclasses
import gc
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe import hub
from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.find import find_local, split_revision
from flashmoe.checkpoint.fingerprint import fingerprint
from flashmoe.checkpoint.headers import Tensor
from flashmoe.checkpoint.index import INDEX, SINGLE, Index, is_skipped, weights_among
from flashmoe.checkpoint.metadata import Metadata
from flashmoe.checkpoint.table import Format, StoredExperts, StoredMatrix, StoredVector
from flashmoe.checkpoint.template import TEMPLATES, ChatTemplate
from flashmoe.checkpoint.tokenizer import Tokenizer
from flashmoe.checkpoint.weights import WeightFinder
from flashmoe.errors import CheckpointError
from flashmoe.machine.files import is_there, names_in, regular_file_size

if TYPE_CHECKING:
    from flashmoe import _native

log = logging.getLogger("flashmoe")

JOB = "pack.json"
"""What `flashmoe pack` writes first, as config.json is what it writes last."""

_METADATA_FILES = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    f"{TEMPLATES}/*.jinja",
    "hf_quant_config.json",
)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a directory holds, by the canonical names of docs/checkpoints.md.

    Attributes:
        source: what it was opened by: a path, "demo" or a hub id.
        disk_bytes: of its safetensors files.
        here: whether its weights are on this machine; not so for what `look` finds on the hub.
    """

    source: str
    metadata: Metadata
    config: ModelConfig
    files: Sequence[Path]
    matrices: Mapping[str, StoredMatrix]
    vectors: Mapping[str, StoredVector]
    experts: Sequence[StoredExperts]
    disk_bytes: int
    here: bool = True

    @staticmethod
    def open(source: str | os.PathLike[str]) -> "Checkpoint":
        """Finds and checks every weight; only metadata and headers are read.

        A model of the hub is downloaded first, with a progress bar on stderr: only the files that
        running it needs, its metadata before them, so that an unsupported model is refused before
        hundreds of gigabytes have come.

        Raises:
            CheckpointError: there is no such checkpoint, or a damaged one, or one of a kind that
                flashmoe does not run; the message names the file and the tensor.
        """
        directory = find_local(source)
        if directory is not None:
            return _open_directory(os.fspath(source), Metadata(directory))
        name = os.fspath(source)
        model, revision = split_revision(name)
        directory = hub.download(model, _METADATA_FILES, revision)
        metadata = Metadata(directory)
        if not is_there(directory / "config.json"):
            raise CheckpointError(
                f"{name}: has no config.json on the hub; if it holds GGUF files or an adapter, take"
                " the model's safetensors edition"
            )
        config = ModelConfig.of(metadata)
        files = Index(directory).files if is_there(directory / INDEX) else [SINGLE]
        # The weights must be of the commit that the metadata is of.
        commit = directory.name
        hub.download(model, files, commit)
        if not all(is_there(directory / file) for file in files):
            hub.download(model, ["model*.safetensors"], commit)
        if not weights_among(names_in(directory)):
            hub.download(model, ["*.safetensors"], commit)
        return _open_directory(name, metadata, config)

    @staticmethod
    def look(source: str | os.PathLike[str]) -> "Checkpoint":
        """Likewise, but of a model on the hub only config and headers are fetched, a few MB."""
        if find_local(source) is not None or hub.is_offline():
            return Checkpoint.open(source)
        name = os.fspath(source)
        model, revision = split_revision(name)
        optional = ["generation_config.json", "hf_quant_config.json", INDEX]
        metadata = Metadata(hub.fetch(model, "config.json", optional, revision))
        config = ModelConfig.of(metadata)
        commit = metadata.directory.name
        present = hub.list_files(model, commit)
        files = [SINGLE] if SINGLE in present else weights_among(present)
        if is_there(metadata.directory / INDEX):
            indexed = Index(metadata.directory).files
            if set(indexed) <= set(present):  # or else it is stale
                files = indexed
        tensors = [
            Tensor(t.name, Path(t.file), t.begin, t.end - t.begin, t.dtype, t.shape)
            for t in hub.read_headers(model, commit, files)
        ]
        wanted = {tensor.name: tensor for tensor in tensors if not is_skipped(tensor.name)}
        disk_bytes = sum(tensor.nbytes for tensor in tensors)
        return Checkpoint.of_tensors(
            name, metadata, config, wanted, Path(name), disk_bytes, here=False
        )

    @staticmethod
    def of_tensors(
        source: str,
        metadata: Metadata,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        listing: Path,
        disk_bytes: int,
        *,
        here: bool = True,
    ) -> "Checkpoint":
        """Likewise from tensors whose headers were read elsewhere, as `listing` lists them."""
        weights = WeightFinder(listing, config, tensors, here=here)
        weights.find()
        return Checkpoint(
            source,
            metadata,
            weights.config,
            list(weights.files),
            weights.matrices,
            weights.vectors,
            weights.experts,
            disk_bytes,
            here,
        )

    @property
    def directory(self) -> Path:
        """Where its metadata is, and its weights unless they are on the hub."""
        return self.metadata.directory

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer; a checkpoint without one runs on ids."""
        return is_there(self.directory / "tokenizer.json")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer; CheckpointError where there is none, or a damaged one."""
        return Tokenizer.load(self.directory)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids of a text, each of which the model has; `special` as `Tokenizer.encode`'s."""
        ids = self.tokenizer.encode(text, special=special)
        if ids and max(ids) >= self.config.vocab_size:
            raise CheckpointError(
                f"{self.directory / 'tokenizer.json'}: gives token id {max(ids)}, and the model's "
                f"vocabulary is {self.config.vocab_size}; the two are not of one model: download "
                "both again"
            )
        return ids

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a text: the configs' tokens, and the tokenizer's own."""
        own = self.metadata.token("eos_token") if self.has_tokenizer else None
        found = None if own is None else self.tokenizer.id_of(own)
        ids = self.config.eos_token_ids
        if found is None or found in ids or found >= self.config.vocab_size:
            return ids
        return (*ids, found)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """Its chat template, compiled when it is first used; None where it has none."""
        return ChatTemplate.load(self.metadata)

    @cached_property
    def tools_template(self) -> ChatTemplate | None:
        """That of conversations with tools: most checkpoints have one template for both."""
        return ChatTemplate.load(self.metadata, tools=True)

    @cached_property
    def fingerprint(self) -> str:
        """What tells its weights from another model's; see checkpoint/fingerprint.py."""
        return fingerprint(self.config, self.files, self.matrices, self.vectors, self.experts)

    def needs(
        self,
        experts_per_token: int,
        *,
        backend: str = "cpu",
        precision: str = "int8",
        threads: int = 1,
        cache_bytes: int = 0,
        chunk: int = 256,
        context: int = 0,
    ) -> "_native.Needs":
        """What a setting would take, in bytes; no weight is read, nor need there be any here."""
        return self.native.needs(
            self.native_config(experts_per_token),
            backend=backend,
            precision=precision,
            threads=threads,
            cache_bytes=cache_bytes,
            chunk=chunk,
            context=context,
        )

    def native_config(self, experts_per_token: int) -> dict[str, Any]:
        """The config for the native core, with the experts that run for a token."""
        return dataclasses.asdict(self.config) | {"experts_per_token": experts_per_token}

    @cached_property
    def native(self) -> "_native.Checkpoint":
        """The table of spans for the native core."""
        # Metadata can be read where the core is not built.
        from flashmoe import _native  # noqa: PLC0415

        def convert(format: Format) -> _native.Format:
            return _native.Format(format.rows, format.cols, format.dtype, format.bits, format.group)

        checkpoint = _native.Checkpoint([str(path) for path in self.files])
        for name, matrix in self.matrices.items():
            checkpoint.add_matrix(name, convert(matrix.format), matrix.parts)
        for name, vector in self.vectors.items():
            checkpoint.add_vector(
                name, vector.length, vector.dtype, vector.extents, vector.plus_one
            )
        for layer in self.experts:
            checkpoint.add_experts(
                convert(layer.gate), convert(layer.up), convert(layer.down), layer.extents
            )
        return checkpoint


def _open_directory(
    source: str,
    metadata: Metadata,
    config: ModelConfig | None = None,
) -> Checkpoint:
    directory = metadata.directory
    if is_there(directory / JOB) and not is_there(directory / "config.json"):
        raise CheckpointError(
            f"{directory}: an unfinished pack: config.json is missing; run the same"
            " 'flashmoe pack' again to finish it"
        )
    with _collector_paused():
        config = config or ModelConfig.of(metadata)
        index = Index(directory)
        disk_bytes = sum(
            regular_file_size(directory / name)
            for name in names_in(directory)
            # Not what macOS leaves beside files, nor links to what was deleted to save room.
            if name.endswith(".safetensors") and name[0] != "." and is_there(directory / name)
        )

        def found(tensors: Mapping[str, Tensor], listing: Path) -> Checkpoint:
            return Checkpoint.of_tensors(source, metadata, config, tensors, listing, disk_bytes)

        try:
            return found(index.tensors(), index.path)
        except CheckpointError:
            # An index is carried over from the model that this one was made of, at times.
            if index.names is not None:
                for tensors in index.without_index():
                    with suppress(CheckpointError):
                        checkpoint = found(tensors, directory)
                        log.warning(
                            "%s: does not say what the files beside it hold, which are complete:"
                            " it is left aside",
                            index.path,
                        )
                        return checkpoint
            raise


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A pack of the 397B has 300,000 tensors; walking them again and again doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
