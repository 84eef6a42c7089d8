"""Makes a random checkpoint of any size, laid out as mlx-community's quantized Qwen3.5-MoE are.

    python benchmarks/make_checkpoint.py DST --preset m1 --layers 8 --bits 4

Shapes, tensor names and formats are real and the weights are noise: for measuring speed, not text.
Quantized words are drawn as random bits, so that writing runs at the speed of the disk; the scales
give the weights that they stand for the standard deviation wanted.

Routing is diverse on purpose. On a residual stream that random layers feed, all tokens soon look
alike and routers pick the same few experts, which would then sit in the cache: a benchmark of
nothing. Here what the layers write to the stream is kept small, so that each token's own embedding
decides; `--measure` runs the result and prints how tokens spread over experts.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn
from rich.table import Table
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import flashmoe
from flashmoe.checkpoint.architecture import EMBEDDINGS, HEAD, Kind, Weight, weights_of
from flashmoe.checkpoint.architecture import ROUTER as ROUTER_ROLE
from flashmoe.checkpoint.config import ModelConfig
from flashmoe.checkpoint.metadata import Metadata

Floats = npt.NDArray[np.float32]

SHARD_BYTES = 5 << 30  # as mlx-lm cuts them
SPARE_BYTES = 1 << 30  # what must remain free on the disk
ROUTER = (8, 64)  # bits and group of mlp.gate and mlp.shared_expert_gate, whatever the rest has
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

STREAM_GAIN = 0.3
"""Root mean square of what all layers together add to a token's embedding, whose own is 1."""


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    experts: int
    experts_per_token: int
    intermediate: int
    shared_intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    key_heads: int
    value_heads: int
    linear_head_dim: int
    full_attention_interval: int = 4


PRESETS = {
    "tiny": Shape(128, 4, 32, 4, 64, 64, 1024, 4, 2, 64, 2, 4, 32),
    "m1": Shape(2048, 16, 256, 8, 512, 512, 32768, 16, 2, 256, 16, 32, 128),  # of the 35B-A3B
    "m2": Shape(4096, 4, 512, 10, 1024, 1024, 32768, 32, 2, 256, 16, 64, 128),  # of the 397B-A17B
}


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written; `chunks` gives its bytes in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[memoryview]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * {"U32": 4, "F32": 4, "BF16": 2}[self.dtype]


class Weights:
    """The tensors of a random model. Large ones are windows at random places into shared noise."""

    def __init__(self, config: ModelConfig, bits: int, group: int, seed: int) -> None:
        self.layers = len(config.layer_types)
        self.bits = bits
        self.group = group
        self.rng = np.random.default_rng(seed)
        self.tensors: list[Tensor] = []
        self.exceptions: dict[str, dict[str, int]] = {}
        self._words = self.rng.integers(0, 1 << 64, 8 << 20, np.uint64).view(np.uint8)
        signs = self.rng.choice(np.array([-1, 1], np.float32), 4 << 20)
        self._jitter = signs * self.rng.uniform(0.75, 1.25, 4 << 20).astype(np.float32)
        self._scaled: dict[float, npt.NDArray[np.uint16]] = {}
        self._build(config)

    def _build(self, config: ModelConfig) -> None:
        for weight in weights_of(config):
            name = weight.name.replace("mlp.experts.", "mlp.switch_mlp.")
            name = "language_model." + (name if name == "lm_head" else "model." + name)
            match weight.kind:
                case Kind.MATRIX:
                    self._matrix_of(weight, name, weight.shape)
                case Kind.EXPERTS:
                    self._matrix_of(weight, name, (config.num_experts, *weight.shape))
                case Kind.NORM | Kind.VECTOR:
                    self._bf16(name + ".weight", self.rng.normal(1, 0.1, weight.shape))
                case Kind.CONVOLUTION:
                    self._bf16(name + ".weight", self.rng.normal(0, 0.5, (*weight.shape, 1)))
                # As Mamba begins: decay rates and log-uniform steps that remember tens of tokens.
                case Kind.PARAMETER if name.endswith("A_log"):
                    rate = self.rng.uniform(0.01, 16, weight.shape).astype(np.float32)
                    self._dense(name, "F32", np.log(rate))
                case Kind.PARAMETER:
                    step = self.rng.uniform(math.log(0.001), math.log(0.1), weight.shape)
                    self._bf16(name, np.log(np.expm1(np.exp(step))))

    def _matrix_of(self, weight: Weight, name: str, shape: tuple[int, ...]) -> None:
        if weight.role == EMBEDDINGS:
            self._matrix(name, shape, 1.0)
        elif name.endswith(("out_proj", "o_proj", "down_proj")):  # writes to the residual stream
            self._output(name, shape)
        elif name.endswith("mlp.gate"):
            self._linear(name, shape, 2.0, ROUTER)
        elif weight.role == ROUTER_ROLE:
            self._linear(name, shape, 1.0, ROUTER)
        else:
            self._linear(name, shape, 3.0 if weight.role == HEAD else 1.0)

    def _output(self, name: str, shape: tuple[int, ...]) -> None:
        """A projection that writes to the residual stream."""
        # Its inputs are of about 0.5: gated, or weighted over experts.
        self._linear(name, shape, 2 * STREAM_GAIN / math.sqrt(3 * self.layers))

    def _linear(
        self,
        name: str,
        shape: tuple[int, ...],
        gain: float = 1.0,
        format: tuple[int, int] | None = None,
    ) -> None:
        """A matrix that turns inputs of root mean square 1 into outputs of `gain`."""
        self._matrix(name, shape, gain / math.sqrt(shape[-1]), format)

    def _matrix(
        self,
        name: str,
        shape: tuple[int, ...],
        deviation: float,
        format: tuple[int, int] | None = None,
    ) -> None:
        bits, group = format or (self.bits, self.group)
        if format:
            self.exceptions[name] = {"group_size": group, "bits": bits}
        *lead, columns = shape
        if columns % group:
            raise SystemExit(f"{name}: {columns} columns do not divide by the group of {group}")
        # A uniform integer below n has the variance (n² - 1) / 12.
        levels = 1 << bits
        scale = deviation / math.sqrt((levels**2 - 1) / 12)
        place = int(self.rng.integers(self._jitter.size // 2))
        words, scales = (*lead, columns * bits // 32), (*lead, columns // group)
        self._add(name + ".weight", "U32", words, lambda: self._random_words(words))
        # Of random sign, the mean of -scale / 2 is nothing that all outputs share; and a bias of
        # exactly -8 scales at 4 bits is what llama.cpp's Q4_0 has.
        for part, factor in ((".scales", scale), (".biases", -scale * levels / 2)):
            self._add(name + part, "BF16", scales, self._jittered(scales, factor, place))

    def _random_words(self, shape: tuple[int, ...]) -> Iterator[memoryview]:
        left = 4 * math.prod(shape)
        while left:
            size = min(left, self._words.size // 8)
            at = int(self.rng.integers(self._words.size - size))
            yield memoryview(self._words[at : at + size])
            left -= size

    def _jittered(
        self, shape: tuple[int, ...], factor: float, place: int
    ) -> Callable[[], Iterator[memoryview]]:
        def chunks() -> Iterator[memoryview]:
            if factor not in self._scaled:
                self._scaled[factor] = to_bf16(self._jitter * np.float32(factor))
            pool = self._scaled[factor]
            left = math.prod(shape)
            while left:
                size = min(left, pool.size // 2)
                yield memoryview(pool[place : place + size]).cast("B")
                left -= size

        return chunks

    def _bf16(self, name: str, values: npt.NDArray[np.float64]) -> None:
        self._dense(name, "BF16", to_bf16(values.astype(np.float32)))

    def _dense(self, name: str, dtype: str, values: npt.NDArray[Any]) -> None:
        data = memoryview(values.tobytes())
        self._add(name, dtype, values.shape, lambda: iter((data,)))

    def _add(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        chunks: Callable[[], Iterator[memoryview]],
    ) -> None:
        self.tensors.append(Tensor(name, dtype, shape, chunks))


def to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make_checkpoint(
    directory: Path,
    shape: Shape,
    *,
    bits: int = 4,
    group: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Writes a checkpoint to a new or empty directory; returns its bytes of weights.

    The same arguments give the same bytes. `progress` is called with the bytes written so far and
    in all. config.json is written last, so that half a checkpoint does not open. Raises SystemExit
    with a message where the directory holds something, the disk is too small or a width does not
    divide by the group.
    """
    if directory.exists() and any(directory.iterdir()):
        raise SystemExit(f"{directory} is not empty: name a new directory")
    metadata = Metadata(directory)
    metadata.config = _config(shape)
    weights = Weights(ModelConfig.of(metadata), bits, group, seed)
    total = sum(tensor.nbytes for tensor in weights.tensors)
    parent = next(p for p in directory.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if total + SPARE_BYTES > free:
        raise SystemExit(
            f"{directory}: {total / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free (of which"
            f" {SPARE_BYTES / 1e9:.2f} stay free): name another disk or fewer --layers"
        )
    directory.mkdir(parents=True, exist_ok=True)
    _write_shards(directory, weights.tensors, progress)
    _write_tokenizer(directory, shape.vocab)
    quantization = {"group_size": group, "bits": bits, "mode": "affine", **weights.exceptions}
    both = dict.fromkeys(("quantization", "quantization_config"), quantization)
    _write_json(directory / "config.json", metadata.config | both)
    return total


def _write_shards(
    directory: Path, tensors: list[Tensor], progress: Callable[[int, int], None]
) -> None:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    weight_map = {}
    done, total = 0, sum(tensor.nbytes for tensor in tensors)
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
        end = 0
        for tensor in shard:
            begin, end = end, end + tensor.nbytes
            offsets = {"shape": tensor.shape, "data_offsets": (begin, end)}
            header[tensor.name] = {"dtype": tensor.dtype, **offsets}
            weight_map[tensor.name] = file
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (directory / file).open("wb", buffering=0) as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for tensor in shard:
                for chunk in tensor.chunks():
                    out.write(chunk)
                    done += chunk.nbytes
                    progress(done, total)
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(directory / "model.safetensors.index.json", index)


def _config(shape: Shape) -> dict[str, Any]:
    end, _, turn_end = _special_ids(shape.vocab)
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "tie_word_embeddings": False,
        "eos_token_id": [turn_end, end],
        "text_config": {
            "model_type": "qwen3_5_moe_text",
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "vocab_size": shape.vocab,
            "full_attention_interval": shape.full_attention_interval,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "linear_num_key_heads": shape.key_heads,
            "linear_num_value_heads": shape.value_heads,
            "linear_key_head_dim": shape.linear_head_dim,
            "linear_value_head_dim": shape.linear_head_dim,
            "linear_conv_kernel_dim": 4,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.intermediate,
            "shared_expert_intermediate_size": shape.shared_intermediate,
            "hidden_act": "silu",
            "attn_output_gate": True,
            "attention_bias": False,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000_000,
                "partial_rotary_factor": 0.25,
            },
        },
    }


def _special_ids(vocab: int) -> tuple[int, int, int]:
    return vocab - 3, vocab - 2, vocab - 1


def _write_tokenizer(directory: Path, vocab: int) -> None:
    """Bytes, then made-up words so that every id decodes to something, then ChatML's tokens.

    Text is encoded byte by byte: there are no merges.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = vocab - len(letters) - len(SPECIAL_TOKENS)
    if words < 0:
        raise SystemExit(f"a vocabulary of {vocab} has no room for 256 bytes and ChatML")
    syllables = [c + v for c in "bdfghjklmnprstvz" for v in "aeiou"]
    tokens = letters + ["Ġ" + _spell(n, syllables) for n in range(words)] + list(SPECIAL_TOKENS)
    ids = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    end, _, turn_end = _special_ids(vocab)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": SPECIAL_TOKENS[2],
            "pad_token": SPECIAL_TOKENS[0],
            "model_max_length": 262144,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    _write_json(
        directory / "generation_config.json",
        {
            "eos_token_id": [turn_end, end],
            "pad_token_id": end,
            "do_sample": True,
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
    )


def _spell(number: int, syllables: list[str]) -> str:
    """Its digits to the base of the number of syllables, at least two of them."""
    word = ""
    while number or len(word) < 4:
        number, digit = divmod(number, len(syllables))
        word += syllables[digit]
    return word


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Routing:
    """How tokens spread over one layer's experts: `effective` is the exponential of the entropy of
    the experts' shares, `busiest` the part of all tokens that the most chosen expert serves."""

    tokens: int
    effective: float
    busiest: float


def measure(directory: Path, tokens: int = 512, generated: int = 64) -> list[Routing]:
    """Per layer: random tokens as a prompt, then tokens sampled from the model."""
    with flashmoe.Model(directory, experts_per_token=None) as model:
        prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens).tolist()
        sampled = model.generate(prompt, max_tokens=generated, temperature=1, seed=0)
        routes = model.routing([*prompt, *(token.id for token in sampled)])
    result = []
    for layer in range(routes.shape[1]):
        counts = np.bincount(routes[:, layer].reshape(-1))
        shares = counts[counts > 0] / counts.sum()
        effective = float(np.exp(-(shares * np.log(shares)).sum()))
        result.append(Routing(len(routes), effective, counts.max() / len(routes)))
    return result


def _shape(preset: str, changes: list[str]) -> Shape:
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is not one of {', '.join(PRESETS)}")
    names = [field.name for field in fields(Shape)]
    values = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in names or not value.isdecimal() or int(value) < 1:
            raise typer.BadParameter(f"{change!r} is not NAME=NUMBER with a name of {names}")
        values[name] = int(value)
    return replace(PRESETS[preset], **values)


def main(
    destination: Annotated[Path, typer.Argument(help="A new directory.")],
    preset: Annotated[str, typer.Option(help=f"Shape to begin with: {', '.join(PRESETS)}.")] = "m1",
    layers: Annotated[int | None, typer.Option(min=1, help="How many layers.")] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another value of the shape, such as experts=128. Repeatable."),
    ] = None,
    bits: Annotated[int, typer.Option(help="2, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="32, 64 or 128.")] = 64,
    seed: int = 0,
    show_routing: Annotated[
        bool, typer.Option("--measure", help="Run it and measure the routing.")
    ] = False,
) -> None:
    """Make a random checkpoint of real shapes, to measure speed with."""
    if bits not in (2, 4, 8) or group_size not in (32, 64, 128):
        raise typer.BadParameter("--bits is 2, 4 or 8 and --group-size 32, 64 or 128")
    shape = _shape(preset, [*(change or []), *([f"layers={layers}"] if layers else [])])
    with Progress(*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn()) as bar:
        task = bar.add_task("Writing", total=None)
        total = make_checkpoint(
            destination,
            shape,
            bits=bits,
            group=group_size,
            seed=seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print(f"{destination}: {total / 1e9:.2f} GB, {shape}")
    if show_routing:
        table = Table("layer", "effective experts", "of", "busiest expert serves")
        for layer, routing in enumerate(measure(destination)):
            busiest = f"{routing.busiest:.1%} of {routing.tokens} tokens"
            table.add_row(str(layer), f"{routing.effective:.0f}", str(shape.experts), busiest)
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
