"""Write an MLX 4-bit checkpoint as GGUF for llama.cpp, so that both run the same weights.

    python benchmarks/gguf_export.py CHECKPOINT OUT.gguf

Matrices of 4 bits become Q4_0: exactly, where bias = -8 * scale (as in the checkpoints of
make_checkpoint.py) and the scale fits float16; else they are quantized again. Others become F32.
llama.cpp keeps V heads tiled by K head ([r, Hk] where the checkpoint has [Hk, r]), so rows
and columns of
the GatedDeltaNet projections are moved accordingly (llama.cpp's conversion/qwen.py does the
same).
Needs `gguf` from PyPI.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.open import Checkpoint
from flashmoe.checkpoint.table import Extents, Format

Array = npt.NDArray[np.generic]
BLOCK = 32  # weights of a Q4_0 block


def stored(files: Sequence[Path], extents: Extents) -> npt.NDArray[np.uint8]:
    """The bytes of consecutive extents."""
    parts = [
        np.memmap(files[file], np.uint8, "r", int(offset), (int(length),))
        for file, offset, length in extents
    ]
    return np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])


def to_float(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return data.view({"F16": np.float16, "F32": np.float32}[dtype]).astype(np.float32)


def nibbles(words: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """4-bit values in order, [.., 2 * bytes]."""
    result = np.empty((*words.shape, 2), np.uint8)
    result[..., 0] = words & 15
    result[..., 1] = words >> 4
    return result.reshape(*words.shape[:-1], -1)


def q4_0(parts: list[npt.NDArray[np.uint8]], format: Format) -> Array:
    """Q4_0 rows [rows, cols / 32 * 18] of an affine 4-bit matrix."""
    rows, cols = format.rows, format.cols
    scales = to_float(parts[1], format.dtype).reshape(rows, -1)
    biases = to_float(parts[2], format.dtype).reshape(rows, -1)
    q = nibbles(parts[0].reshape(rows, cols // 2))
    if not np.array_equal(biases, -8 * scales):
        weights = q.reshape(rows, -1, format.group) * scales[..., None] + biases[..., None]
        return gguf.quants.quantize(weights.reshape(rows, cols), gguf.GGMLQuantizationType.Q4_0)
    q = q.reshape(rows, cols // BLOCK, BLOCK)
    out = np.empty((rows, cols // BLOCK, 18), np.uint8)
    d = np.repeat(scales, format.group // BLOCK, axis=1).astype(np.float16)
    out[..., :2] = d[..., None].view(np.uint8)
    out[..., 2:] = q[..., :16] | (q[..., 16:] << 4)
    return out.reshape(rows, -1)


def dense(parts: list[npt.NDArray[np.uint8]], format: Format) -> npt.NDArray[np.float32]:
    """A matrix of any format as float32 [rows, cols]."""
    rows, cols, bits = format.rows, format.cols, format.bits
    if not bits:
        return to_float(parts[0], format.dtype).reshape(rows, cols)
    words = parts[0].reshape(rows, -1)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    q = ((words[..., None] >> shifts) & (2**bits - 1)).reshape(rows, -1, format.group)
    scales, biases = (to_float(part, format.dtype).reshape(rows, -1, 1) for part in parts[1:])
    return (q * scales + biases).reshape(rows, cols)


class Exporter:
    """Collects what llama.cpp wants to know of each tensor; data is made when it is written."""

    def __init__(self, checkpoint: Checkpoint, out: Path) -> None:
        self.checkpoint = checkpoint
        self.writer = gguf.GGUFWriter(out, "qwen35moe")
        self.pending: list[Callable[[], Array]] = []

    def add(self, name: str, shape: tuple[int, ...], q4: bool, make: Callable[[], Array]) -> None:
        if q4:
            kind = gguf.GGMLQuantizationType.Q4_0
            raw = (*shape[:-1], shape[-1] // BLOCK * 18)
            size, dtype = int(np.prod(raw)), np.dtype(np.uint8)
            self.writer.add_tensor_info(name, raw, dtype, size, raw_dtype=kind)
        else:
            size = 4 * int(np.prod(shape))
            self.writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
        self.pending.append(make)

    def matrix(
        self,
        name: str,
        source: str,
        rows: Array | None = None,
        cols: Array | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> None:
        """rows and cols: where each output row, and each block of 32 columns, comes from."""
        matrix = self.checkpoint.matrices[source]
        format = matrix.format
        q4 = format.bits == 4

        def make() -> Array:
            parts = [stored(self.checkpoint.files, part) for part in matrix.parts]
            data = q4_0(parts, format) if q4 else dense(parts, format)
            blocks = data.reshape(format.rows, -1, 18 if q4 else BLOCK)
            blocks = blocks if rows is None else blocks[rows]
            blocks = blocks if cols is None else blocks[:, cols]
            return np.ascontiguousarray(blocks).reshape(format.rows, -1)

        self.add(name, shape or (format.rows, format.cols), q4, make)

    def vector(
        self,
        name: str,
        source: str,
        order: Array | None = None,
        shape: tuple[int, ...] | None = None,
        change: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]] | None = None,
    ) -> None:
        vector = self.checkpoint.vectors[source]

        def make() -> Array:
            data = to_float(stored(self.checkpoint.files, vector.extents), vector.dtype) + float(
                vector.plus_one
            )
            data = data.reshape(shape) if shape else data
            data = data if order is None else data[order]
            return np.ascontiguousarray(change(data) if change else data, np.float32)

        self.add(name, shape or (vector.length,), False, make)

    def experts(self, layer: int) -> None:
        experts = self.checkpoint.experts[layer]
        table = experts.extents.reshape(self.checkpoint.config.num_experts, 3, -1, 1, 3)
        formats = (experts.gate, experts.up, experts.down)
        for index, (kind, format) in enumerate(zip(("gate", "up", "down"), formats, strict=True)):

            def make(index: int = index, format: Format = format) -> Array:
                files = self.checkpoint.files
                return np.stack(
                    [
                        q4_0([stored(files, part) for part in parts[index]], format)
                        for parts in table
                    ]
                )

            shape = (len(table), format.rows, format.cols)
            self.add(f"blk.{layer}.ffn_{kind}_exps.weight", shape, True, make)

    def write(self) -> Iterator[str]:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        for make in self.pending:
            self.writer.write_tensor_data(make())
            yield ""
        self.writer.close()


def tiled(config: ModelConfig, heads: int, width: int) -> npt.NDArray[np.int64]:
    """Where each of Hv * width rows comes from when V heads [Hk, r] become [r, Hk]."""
    key_heads = config.linear_num_key_heads
    order = np.arange(heads * width).reshape(key_heads, heads // key_heads, width)
    return order.transpose(1, 0, 2).reshape(-1)


def export(source: Path, out: Path, experts_per_token: int | None = None) -> None:
    checkpoint = Checkpoint.open(source)
    c = checkpoint.config
    to = Exporter(checkpoint, out)
    w = to.writer
    w.add_block_count(len(c.layer_types))
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_key_length(c.head_dim)
    w.add_value_length(c.head_dim)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(c.rope_theta)
    w.add_rope_dimension_count(c.rotary_dim)
    w.add_rope_dimension_sections([11, 11, 10, 0])
    w.add_expert_count(c.num_experts)
    w.add_expert_used_count(experts_per_token or c.num_experts_per_tok)
    w.add_expert_feed_forward_length(c.moe_intermediate_size)
    w.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    w.add_ssm_conv_kernel(c.linear_conv_kernel_dim)
    w.add_ssm_state_size(c.linear_key_head_dim)
    w.add_ssm_group_count(c.linear_num_key_heads)
    w.add_ssm_time_step_rank(c.linear_num_value_heads)
    w.add_ssm_inner_size(c.linear_num_value_heads * c.linear_value_head_dim)
    w.add_full_attention_interval(4)
    w.add_tokenizer_model("none")
    w.add_vocab_size(c.vocab_size)

    heads, dim = c.linear_num_value_heads, c.linear_value_head_dim
    keys = 2 * c.linear_num_key_heads * c.linear_key_head_dim
    by_head, by_row = tiled(c, heads, 1), tiled(c, heads, dim)
    by_block = tiled(c, heads, dim // BLOCK)
    qkv = np.concatenate([np.arange(keys), keys + by_row])

    to.matrix("token_embd.weight", "embed_tokens")
    to.vector("output_norm.weight", "norm")
    if "lm_head" in checkpoint.matrices:
        to.matrix("output.weight", "lm_head")
    for layer, kind in enumerate(c.layer_types):
        here, blk = f"layers.{layer}.", f"blk.{layer}."
        to.vector(blk + "attn_norm.weight", here + "input_layernorm")
        to.vector(blk + "post_attention_norm.weight", here + "post_attention_layernorm")
        if kind == "full_attention":
            for ours, theirs in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"),
                                 ("o", "attn_output")):  # fmt: skip
                to.matrix(f"{blk}{theirs}.weight", f"{here}self_attn.{ours}_proj")
            to.vector(blk + "attn_q_norm.weight", here + "self_attn.q_norm")
            to.vector(blk + "attn_k_norm.weight", here + "self_attn.k_norm")
        else:
            delta = here + "linear_attn."
            to.matrix(blk + "attn_qkv.weight", delta + "in_proj_qkv", rows=qkv)
            to.matrix(blk + "attn_gate.weight", delta + "in_proj_z", rows=by_row)
            to.matrix(blk + "ssm_beta.weight", delta + "in_proj_b", rows=by_head)
            to.matrix(blk + "ssm_alpha.weight", delta + "in_proj_a", rows=by_head)
            to.matrix(blk + "ssm_out.weight", delta + "out_proj", cols=by_block)
            to.vector(blk + "ssm_conv1d.weight", delta + "conv1d", order=qkv,
                      shape=(keys + heads * dim, c.linear_conv_kernel_dim))  # fmt: skip
            to.vector(blk + "ssm_dt.bias", delta + "dt_bias", order=by_head)
            to.vector(blk + "ssm_a", delta + "A_log", order=by_head, change=lambda a: -np.exp(a))
            to.vector(blk + "ssm_norm.weight", delta + "norm")
        to.matrix(blk + "ffn_gate_inp.weight", here + "mlp.gate")
        to.matrix(blk + "ffn_gate_inp_shexp.weight", here + "mlp.shared_expert_gate",
                  shape=(c.hidden_size,))  # fmt: skip
        for part in ("gate", "up", "down"):
            to.matrix(f"{blk}ffn_{part}_shexp.weight", f"{here}mlp.shared_expert.{part}_proj")
        to.experts(layer)
    for done, _ in enumerate(to.write(), 1):
        print(f"\r{done}/{len(to.pending)} tensors", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
