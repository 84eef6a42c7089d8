"""The model inside the package: a language model, and the same one in every library."""

import re
from pathlib import Path

import numpy as np
import pytest
from engines import TestEngine, spread

import flashmoe
from flashmoe.measure.evaluate import log_softmax, mean, read_text, score_text

DEMO = Path(flashmoe.__file__).parent / "demo_model"
HELDOUT = Path(__file__).parent / "data" / "heldout.txt"
BOUND = 2e-3  # of the logits' standard deviation, as for random weights


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    """Held-out text that was never trained on: int32 [600]."""
    with flashmoe.Model("demo") as model:
        encoded = model.tokenizer.encode(read_text(HELDOUT, 4000)).ids
    return np.array(encoded[:600], np.int32)


def test_it_predicts_text_better_than_compressing_it_does() -> None:
    with flashmoe.Model("demo", experts_per_token=None) as model:
        score = score_text(model, read_text(HELDOUT, 20_000))
    # xz -9e with the training text before it needs 1.97 (tools/train_demo/bounds.py).
    assert score.bits_per_byte.high < 1.5


def test_it_answers_in_sentences() -> None:
    with flashmoe.Model("demo") as model:
        asked = [{"role": "user", "content": "What is a mixture of experts?"}]
        answer = "".join(t.text for t in model.chat(asked, temperature=0, max_tokens=100))
    assert answer.startswith("A mixture of experts is a neural network whose feed-forward layers")
    assert answer.endswith("are not needed for any one token.")


def test_what_the_readme_quotes_comes_out() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    start, seed = re.search(r'With `"(.*)"`, seed (\d+) and\s`precision', readme).groups()
    quoted = " ".join(re.findall(r"^> (.*)$", readme, re.MULTILINE))
    # With 8-bit activations processors of different instruction sets soon sample different texts.
    with flashmoe.Model("demo", precision="float32") as model:
        text = "".join(t.text for t in model.generate(start, max_tokens=60, seed=int(seed)))
    assert " ".join((start + text).split()).startswith(quoted)


@pytest.mark.reference
def test_8_bit_activations_change_little(capsys: pytest.CaptureFixture) -> None:
    model = flashmoe.Model("demo", experts_per_token=None)
    exact = flashmoe.Model("demo", experts_per_token=None, precision="float32")
    with model, exact:
        score = score_text(model, read_text(HELDOUT, 16_000), reference=exact)
    assert score.kl is not None and score.agreement is not None
    kl, agreement = mean(score.kl), score.agreement.mean()
    with capsys.disabled():
        print(
            f"\ndemo, int8, {len(score.nats)} tokens: KL {kl.value:.2e} ({kl.low:.2e} .. ", end=""
        )
        print(f"{kl.high:.2e}) nats a token, greedy agreement {agreement:.1%}")
    assert kl.value < 1e-3
    assert agreement >= 0.95


@pytest.mark.reference
def test_4_bit_perplexity_equals_that_of_mlx_lm(
    ids: np.ndarray, capsys: pytest.CaptureFixture
) -> None:
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    from mlx_lm import utils  # noqa: PLC0415

    model, _ = utils.load_model(DEMO)
    part = ids[:200]  # mlx has no fast kernels for the CPU
    theirs = np.array(model(mx.array(part[None, :-1])).astype(mx.float32))[0]
    ours = TestEngine(DEMO, precision="int8").logits(part[:-1])
    at = np.arange(len(part) - 1), part[1:]
    perplexity = [float(np.exp(-log_softmax(x.copy())[at].mean())) for x in (ours, theirs)]
    with capsys.disabled():
        print(f"\ndemo, 4 bits: perplexity {perplexity[0]:.3f}, mlx-lm {perplexity[1]:.3f}")
    assert perplexity[0] == pytest.approx(perplexity[1], rel=5e-3)


@pytest.mark.reference
def test_logits_and_routing_equal_transformers(ids: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    model = in_transformers(DEMO)
    routed = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: routed.append(out[2].numpy()))
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    assert spread(TestEngine(DEMO).logits(ids), theirs) <= BOUND
    with flashmoe.Model("demo", experts_per_token=None, precision="float32") as engine:
        ours = engine.routing(ids.tolist())
    # Where two experts are equally likely within rounding either may come first.
    agree = mean((ours == np.stack(routed, axis=1)).all(axis=2).ravel())
    assert agree.value > 0.999


def in_transformers(directory: Path):
    """transformers' model in float32 with an MLX checkpoint's weights, dequantised by mlx."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    import json  # noqa: PLC0415

    config = json.loads((directory / "config.json").read_text())
    stored = mx.load(str(directory / "model.safetensors"))
    weights: dict[str, torch.Tensor] = {}
    for name, array in stored.items():
        module, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        whole = array
        if module + ".scales" in stored:
            form = config["quantization"].get(module) or config["quantization"]
            scales, biases = (
                stored[f"{module}.{x}"].astype(mx.float32) for x in ("scales", "biases")
            )
            whole = mx.dequantize(array, scales, biases, form["group_size"], form["bits"])
        tensor = torch.from_numpy(np.array(whole.astype(mx.float32)))
        if module.endswith("conv1d"):
            tensor = tensor.transpose(1, 2)
        if module.endswith(("layernorm", "q_norm", "k_norm", "model.norm")):
            tensor -= 1  # MLX stores 1 + w
        weights[name.removeprefix("language_model.")] = tensor
    for i in range(config["text_config"]["num_hidden_layers"]):
        switch, experts = f"model.layers.{i}.mlp.switch_mlp.", f"model.layers.{i}.mlp.experts."
        halves = [weights.pop(f"{switch}{x}_proj.weight") for x in ("gate", "up")]
        weights[experts + "gate_up_proj"] = torch.cat(halves, dim=1)
        weights[experts + "down_proj"] = weights.pop(switch + "down_proj.weight")
    model = transformers.Qwen3_5MoeForCausalLM(
        transformers.Qwen3_5MoeTextConfig(**config["text_config"])
    )
    model.load_state_dict(weights)
    return model.float().eval()
