"""flashmoe eval: the numbers are what their definitions say, and bad files are named."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_engine import hashed, install, make_directory
from typer.testing import CliRunner

import flashmoe
from flashmoe.cli.main import app
from flashmoe.measure import evaluate
from flashmoe.measure.evaluate import Prompt, follows, judge, parse_call, proportion

TEXT = "The quick brown fox jumps over the lazy dog, and it is not even late. " * 4
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}},
    },
    "required": ["name"],
}
CALL = {"name": "set_timer", "arguments": {"minutes": 5, "label": "tea"}}


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    install(monkeypatch, hashed)
    return make_directory(tmp_path / "model")


def test_bits_per_byte_and_perplexity_are_those_of_the_logits(model: Path) -> None:
    with flashmoe.Model(model) as opened:
        ids = opened.tokenizer.encode(TEXT).ids
        score = evaluate.score_text(opened, TEXT, window=40)
        nats = 0.0
        for start in range(0, len(ids) - 1, 40):
            part = ids[start : start + 41]
            rows = opened.logits(part[:-1]).astype(np.float64)
            for row, target in zip(rows, part[1:], strict=True):
                nats += math.log(np.exp(row).sum()) - row[target]
    first = len(opened.tokenizer.decode(ids[:1]).encode())
    assert score.nbytes == len(TEXT) - first
    assert score.bits_per_byte.value == pytest.approx(nats / math.log(2) / score.nbytes, rel=1e-5)
    assert score.perplexity.value == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-5)


def test_divergence_is_zero_from_itself_and_known_from_another(model: Path) -> None:
    class Uniform:
        def logits(self, ids):
            return np.zeros((len(ids), 512), np.float32)

    with flashmoe.Model(model) as opened:
        same = evaluate.score_text(opened, TEXT, reference=opened)
        other = evaluate.score_text(opened, TEXT, reference=Uniform())
        rows = opened.logits(opened.tokenizer.encode(TEXT).ids[:-1]).astype(np.float64)
    assert np.abs(same.kl).max() < 1e-5
    assert same.agreement.all()
    ours = rows - np.log(np.exp(rows).sum(1, keepdims=True))
    assert other.kl.mean() == pytest.approx((-math.log(512) - ours).mean(), rel=1e-4)


def test_intervals_are_those_of_the_books() -> None:
    # Wilson (1927): 95 of 100 is 0.8882 to 0.9785, 0 of 10 is 0 to 0.2775.
    found = proportion(95, 100)
    assert (found.low, found.high) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert (proportion(0, 10).low, proportion(0, 10).high) == pytest.approx((0, 0.2775), abs=1e-4)
    values = np.random.default_rng(1).normal(3, 1, 40_000)
    found = evaluate.mean(values)
    half = 1.96 / math.sqrt(len(values))
    assert found.high - found.low == pytest.approx(2 * half, rel=0.2)
    assert found.low < found.value < found.high


@pytest.mark.parametrize(
    ("answer", "rights"),
    [
        ('{"name": "Ada"}', (True, True, True)),
        ('<think>\nhm\n</think>\n\n```json\n{"name": "Ada"}\n```', (True, True, True)),
        ('{"name": "Eve", "age": 3, "tags": ["a"]}', (True, True, False)),
        ('{"name": "Ada", "age": 3.5}', (True, False, False)),
        ('{"name": "Ada", "age": true}', (True, False, False)),
        ('{"name": "Ada", "tags": ["c"]}', (True, False, False)),
        ('{"name": "Ada", "more": 1}', (True, False, False)),
        ("{}", (True, False, False)),
        ('{"name": "Ada"', (False, False, False)),
        ("[" * 100_000, (False, False, False)),
        ('{"name": ' + "[" * 50_000 + "]" * 50_000 + "}", (False, False, False)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_json_is_judged_by_its_schema(answer: str, rights: tuple[bool, ...]) -> None:
    prompt = Prompt([], None, SCHEMA, {"name": "Ada"}, None)
    assert tuple(judge(prompt, answer).values()) == rights


FIVE = "<parameter=minutes>\n5\n</parameter>\n<parameter=label>\ntea\n</parameter>\n"


@pytest.mark.parametrize(
    ("answer", "rights"),
    [
        (f"<tool_call>\n<function=set_timer>\n{FIVE}</function>\n</tool_call>", (True, True, True)),
        (f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", (True, True, True)),
        (
            f"<tool_call>\n<function=set_timer>\n{FIVE.replace('5', '6')}</function>\n</tool_call>",
            (True, True, False),
        ),
        (
            f"<tool_call>\n<function=other>\n{FIVE}</function>\n</tool_call>",
            (True, False, False),
        ),
        (f"<tool_call>\n<function=set_timer>\n{FIVE}</tool_call>", (False, False, False)),
        (
            f"<tool_call>\n<function=set_timer>\n{FIVE}?</function>\n</tool_call>",
            (False, False, False),
        ),
        ("The timer is set.", (False, False, False)),
        (f"<tool_call>{'[' * 100_000}</tool_call>", (False, False, False)),
        (
            "<tool_call>\n<function=set_timer>\n"
            f"{FIVE.replace('5', '[' * 100_000)}</function>\n</tool_call>",
            (True, True, False),
        ),
    ],
    ids=lambda value: str(value)[:20],
)
def test_calls_are_judged_in_both_forms(answer: str, rights: tuple[bool, ...]) -> None:
    prompt = Prompt([], [{}], None, None, CALL)
    assert tuple(judge(prompt, answer).values()) == rights


def test_a_call_without_parameters_is_well_formed() -> None:
    answer = "<tool_call>\n<function=stop>\n</function>\n</tool_call>"
    assert parse_call(answer) == ("stop", {})


def test_numbers_are_no_booleans() -> None:
    assert follows(1, {"type": "number"})
    assert not follows(True, {"type": "number"})
    assert follows(None, {"type": "null"})


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "line 2"),
        ('{"messages": []}', "either a schema or a call"),
        ('{"messages": [], "schema": {"type": "string", "pattern": "a"}}', "pattern"),
        ('{"messages": [], "schema": {"type": "dragon"}}', "dragon"),
        ('{"messages": [], "call": {"name": "f"}}', "arguments"),
        ('{"messages": [], "call": ["name", "arguments"]}', "arguments"),
        ('{"messages": [], "call": {"name": "f", "arguments": 1}}', "arguments"),
        ('{"messages": [], "schema": {"type": ["string"]}}', "not known"),
        ('{"messages": [], "schema": {"type": "object", "required": 5}}', "a list of names"),
        ('{"messages": [], "schema": {"type": "object", "required": [[]]}}', "a list of names"),
        ('{"messages": [], "schema": {"type": "string", "enum": 5}}', "enum .* not a list"),
        ('{"messages": [], "schema": {"type": "object", "properties": {"a": 1}}}', "line 2"),
        ('{"messages": [], "schema": ' + '{"type": "array", "items": ' * 400 + "1", "line 2"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_prompt_is_named_before_a_model_is_opened(tmp_path, line: str, what: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [], "schema": {"type": "string"}}\n' + line + "\n")
    with pytest.raises(flashmoe.ArgumentError, match=what):
        evaluate.read_prompts(path)


def test_a_bad_conversation_is_named_before_the_first_is_answered(model: Path, tmp_path) -> None:
    good = {"messages": [{"role": "user", "content": "Hi"}], "schema": {"type": "string"}}
    for messages, what in (
        ("Hi", "prompt 2: messages must be"),
        ([{"role": "user", "content": "a " * 5000}], "prompt 2: has"),
    ):
        asked = [
            Prompt(**(good | {"messages": m}), tools=None, value=None, call=None)
            for m in (good["messages"], messages)
        ]
        done: list[int] = []
        with flashmoe.Model(model) as opened, pytest.raises(flashmoe.ArgumentError, match=what):
            evaluate.answer_prompts(
                opened, asked, max_tokens=2, progress=lambda n, _, done=done: done.append(n)
            )
        assert not done


def test_a_line_of_a_prompts_file_ends_where_json_says(tmp_path) -> None:
    path = tmp_path / "prompts.jsonl"
    prompt = {"messages": [{"role": "user", "content": "a\u2028b"}], "schema": {"type": "string"}}
    path.write_text(json.dumps(prompt, ensure_ascii=False) + "\n", encoding="utf-8")
    (read,) = evaluate.read_prompts(path)
    assert read.messages == prompt["messages"]


def test_the_command_prints_numbers_and_json(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    prompt = {"messages": [{"role": "user", "content": "Hi"}], "schema": {"type": "string"}}
    (tmp_path / "p.jsonl").write_text(json.dumps(prompt) + "\n")
    arguments = ["eval", str(model), "--text", str(tmp_path / "a.txt"), "--reference-experts", "0"]
    arguments += ["--prompts", str(tmp_path / "p.jsonl"), "-n", "5"]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0
    for words in ("bits per byte", "KL from reference", "same likeliest", "JSON valid"):
        assert words in told.stdout
    result = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert result["reference"]["experts_per_token"] == 6
    assert result["model"]["experts_per_token"] == 6
    assert result["text"]["agreement"]["value"] == 1
    assert result["prompts"]["count"] == 1


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ([], "nothing to measure"),
        (["--prompts", "none.jsonl", "--reference-experts", "0"], "compared on a text"),
        (["--text", "none.txt"], "none.txt"),
        (["--prompts", "none.jsonl"], "none.jsonl"),
    ],
)
def test_wrong_use_says_what_to_do(model: Path, arguments: list[str], what: str) -> None:
    result = CliRunner().invoke(app, ["eval", str(model), *arguments])
    assert result.exit_code == 2
    assert what in result.stderr


def test_a_limit_in_bytes_may_cut_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("né")
    assert evaluate.read_text(tmp_path / "a.txt", 2) == "n"
    (tmp_path / "b.txt").write_bytes(b"a\xff")
    with pytest.raises(flashmoe.ArgumentError, match=r"b\.txt"):
        evaluate.read_text(tmp_path / "b.txt")
