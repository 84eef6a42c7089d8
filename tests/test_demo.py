"""The model inside the package: a language model, and the same one in every library."""

import re
from pathlib import Path

import golden
import numpy as np
import pytest
from engines import DEMO, TestEngine, spread

import flashmoe
from flashmoe.measure.evaluate import log_softmax, mean, read_text, score_text

HELDOUT = Path(__file__).parent / "data" / "heldout.txt"
BOUND = 2e-3  # of the logits' standard deviation, as for random weights


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return heldout_ids()


def heldout_ids() -> np.ndarray:
    """Held-out text that was never trained on: int32 [600]."""
    with flashmoe.Model("demo") as model:
        encoded = model.tokenizer.encode(read_text(HELDOUT, 4000)).ids
    return np.array(encoded[:600], np.int32)


def perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    """Of ids[1:], which the logits predict."""
    at = np.arange(len(ids) - 1), ids[1:]
    return float(np.exp(-log_softmax(logits.copy())[at].mean()))


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


def test_4_bit_perplexity_equals_that_of_mlx_lm(ids: np.ndarray) -> None:
    part = ids[: golden.PERPLEXITY_TOKENS]
    ours = perplexity(TestEngine(DEMO, precision="int8").logits(part[:-1]), part)
    assert ours == pytest.approx(float(golden.arrays("demo")["perplexity"]), rel=5e-3)


def test_logits_and_routing_equal_transformers(ids: np.ndarray) -> None:
    theirs = golden.arrays("demo")
    assert spread(TestEngine(DEMO).logits(ids)[golden.DEMO_ROWS], theirs["logits"]) <= BOUND
    with flashmoe.Model("demo", experts_per_token=None, precision="float32") as engine:
        ours = engine.routing(ids.tolist())
    # Where two experts are equally likely within rounding either may come first.
    agree = mean((ours == theirs["routing"]).all(axis=2).ravel())
    assert agree.value > 0.999
