"""Writes tests/golden/ anew: what transformers and mlx-lm give for the inputs of the fast layer.

pip install '.[reference]' && python tests/reference/make_golden.py
"""

import json
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "reference")]

import checkpoints  # noqa: E402
import golden  # noqa: E402
import libraries  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import test_chat  # noqa: E402
import test_demo  # noqa: E402
import test_sampling  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from engines import DEMO, random_ids  # noqa: E402
from fake_engine import make_tokenizer  # noqa: E402
from mlx_lm import utils  # noqa: E402
from transformers.generation import logits_process as process  # noqa: E402

from flashmoe.generate.sampling import Sampling  # noqa: E402

GREEDY_TOKENS = 64
Arrays = dict[str, np.ndarray]


def logits() -> Arrays:
    """The golden rows of every variant, and the greedy tokens of those compared with them."""
    result = {}
    for name in sorted({checkpoints.twin(name) for name in checkpoints.VARIANTS}):
        long = name in checkpoints.PARITY or name == "heads-of-48"
        length = 300 if long else golden.SHORT
        ids = random_ids(checkpoints.text_config(name)["vocab_size"], length)
        rows = golden.ROWS[length > golden.ROWS]
        if name in checkpoints.MLX:
            with tempfile.TemporaryDirectory() as folder:
                directory = checkpoints.make(Path(folder) / name, name)
                result[name] = libraries.mlx_logits(directory, ids)[rows]
            continue
        model = libraries.transformers_model(name)
        result[name] = libraries.transformers_logits(model, ids)[rows]
        if name in checkpoints.PARITY:
            prompt = random_ids(model.config.vocab_size, 20, seed=2)
            result[f"{name} greedy"] = _greedy(model, prompt)
        if name == "base":
            for layer in model.model.layers:
                layer.mlp.gate.top_k = 2
            short = rows[rows < golden.SHORT]
            theirs = libraries.transformers_logits(model, ids[: golden.SHORT])
            result["base, 2 experts"] = theirs[short]
    return result


def _greedy(model: transformers.PreTrainedModel, prompt: np.ndarray) -> np.ndarray:
    model.generation_config.eos_token_id = None  # all of them, whatever comes
    ids = torch.from_numpy(prompt.astype(np.int64))[None]
    answer = model.generate(ids, max_new_tokens=GREEDY_TOKENS, do_sample=False)
    return answer[0, len(prompt) :].numpy().astype(np.int32)


def demo() -> Arrays:
    """Of the model in the package: logits and experts in transformers, perplexity in mlx-lm."""
    ids = test_demo.heldout_ids()
    model = libraries.demo_in_transformers(DEMO)
    routed: list[np.ndarray] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, out: routed.append(out[2].numpy()))
    rows = libraries.transformers_logits(model, ids)[golden.DEMO_ROWS]
    quantized, _ = utils.load_model(DEMO)
    part = ids[: golden.PERPLEXITY_TOKENS]
    theirs = np.array(quantized(mx.array(part[None, :-1])).astype(mx.float32))[0]
    return {
        "logits": rows,
        "routing": np.stack(routed, axis=1).astype(np.uint8),
        "perplexity": np.array(test_demo.perplexity(theirs, part)),
    }


def sampling() -> Arrays:
    """float32 [vocab], what transformers' processors leave of each case's distribution."""
    inputs, prompt = test_sampling.case_inputs()
    cases = {
        name: _probabilities(inputs, case, prompt) for name, case in test_sampling.CASES.items()
    }
    few = _probabilities(test_sampling.few_logits(), test_sampling.FEW, [0])
    return {name: array.astype(np.float32) for name, array in (cases | {"few": few}).items()}


def _probabilities(inputs: np.ndarray, sampling: Sampling, prompt: list[int]) -> np.ndarray:
    scores = torch.tensor(inputs, dtype=torch.float64)[None]
    ids = torch.tensor([prompt])
    if sampling.repetition_penalty != 1:
        penalty = process.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
        scores = penalty(ids, scores)
    scores = process.TemperatureLogitsWarper(float(sampling.temperature))(ids, scores)
    if sampling.top_k:
        scores = process.TopKLogitsWarper(sampling.top_k)(ids, scores)
    if sampling.top_p < 1:
        scores = process.TopPLogitsWarper(sampling.top_p)(ids, scores)
    if sampling.min_p:
        scores = process.MinPLogitsWarper(sampling.min_p)(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


def chat() -> dict[str, str]:
    """Every dialogue as transformers renders it."""

    def render(template, messages, tools, **variables) -> str:
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=make_tokenizer(), bos_token="<|endoftext|>", chat_template=template
        )
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **variables)

    return test_chat.rendered(render)


if __name__ == "__main__":
    golden.FOLDER.mkdir(exist_ok=True)
    for made in (logits, demo, sampling):
        np.savez_compressed(golden.FOLDER / f"{made.__name__}.npz", **made())
    text = json.dumps(chat(), indent=1, ensure_ascii=False)
    (golden.FOLDER / "chat.json").write_text(text + "\n", encoding="utf-8")
