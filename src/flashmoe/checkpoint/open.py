"""A checkpoint: its configuration and where every weight lies, found without reading a weight."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.headers import Tensor
from flashmoe.checkpoint.index import read_tensors, weights_file
from flashmoe.checkpoint.table import Format, StoredExperts, StoredMatrix, StoredVector
from flashmoe.checkpoint.weights import WeightFinder
from flashmoe.errors import CheckpointError

if TYPE_CHECKING:
    from flashmoe import _native


JOB = "pack.json"
"""What `flashmoe pack` writes first, as config.json is what it writes last."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a directory holds, by the canonical names of docs/checkpoints.md."""

    directory: Path
    config: ModelConfig
    files: Sequence[Path]
    matrices: Mapping[str, StoredMatrix]
    vectors: Mapping[str, StoredVector]
    experts: Sequence[StoredExperts]

    @staticmethod
    def open(directory: str | Path) -> "Checkpoint":
        """Finds and checks every weight; only metadata and headers are read.

        Raises:
            CheckpointError: the directory holds no checkpoint, a damaged one, or one of a kind that
                flashmoe does not run; the message names the file and the tensor.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: no such directory")
        if (directory / JOB).exists() and not (directory / "config.json").exists():
            raise CheckpointError(
                f"{directory}: an unfinished pack: config.json is missing; run the same"
                " 'flashmoe pack' again to finish it"
            )
        with _collector_paused():
            config = ModelConfig.load(directory)
            tensors = read_tensors(directory)
            return Checkpoint.of_tensors(directory, config, tensors, weights_file(directory))

    @staticmethod
    def of_tensors(
        directory: Path, config: ModelConfig, tensors: Mapping[str, Tensor], source: Path
    ) -> "Checkpoint":
        """Likewise from tensors whose headers were read elsewhere, as `source` lists them."""
        weights = WeightFinder(source, config, tensors)
        weights.find()
        return Checkpoint(
            directory,
            config,
            list(weights.files),
            weights.matrices,
            weights.vectors,
            weights.experts,
        )

    def native(self) -> "_native.Checkpoint":
        """The same for the native core."""
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
