"""Model on an engine that is not there: arguments, the order of things, states, threads."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeEngine, hashed, install, make_directory, make_tokenizer, spelling

import flashmoe
from flashmoe import _native
from flashmoe.checkpoint.config import Quantization
from flashmoe.generate.engine import open_engine
from flashmoe.generate.in_force import in_force
from flashmoe.machine import probe
from flashmoe.machine.budget import parse_bytes


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return make_directory(tmp_path / "model")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    return install(monkeypatch)


@pytest.fixture
def model(engine: FakeEngine, directory: Path) -> flashmoe.Model:
    return flashmoe.Model(directory)


def _ids(tokens) -> list[int]:
    return [token.id for token in tokens]


def _says(monkeypatch: pytest.MonkeyPatch, directory: Path, text: str, **config) -> flashmoe.Model:
    install(monkeypatch, spelling(text, make_tokenizer()))
    make_directory(directory, **config)
    return flashmoe.Model(directory)


def test_an_answer_is_text_up_to_the_end_of_sequence_token(monkeypatch, directory) -> None:
    model = _says(monkeypatch, directory, "Hé 😀!")
    tokens = list(model.generate("the fox"))
    assert "".join(token.text for token in tokens) == "Hé 😀!"
    assert tokens[-1] == dataclasses.replace(tokens[-1], text="")
    assert tokens[-1].id == model.tokenizer.token_to_id("<|im_end|>")
    assert model.stats.finish_reason == "eos"
    assert all(token.logprob <= 0 for token in tokens)


def test_any_of_several_end_of_sequence_tokens_ends(monkeypatch, directory) -> None:
    end = make_tokenizer().token_to_id("<|endoftext|>")
    install(monkeypatch, spelling("a", make_tokenizer(), "<|endoftext|>"))
    make_directory(directory, eos_token_id=[511, end])
    tokens = list(flashmoe.Model(directory).generate("x"))
    assert [token.text for token in tokens] == ["a", ""]


def test_max_tokens_flushes_what_was_held_back(monkeypatch, directory) -> None:
    model = _says(monkeypatch, directory, "ab END")
    assert [t.text for t in model.generate("x", max_tokens=4, stop="END")] == ["a", "b", " ", "E"]
    assert model.stats.finish_reason == "length"


def test_a_stop_string_ends_the_answer_before_it(monkeypatch, directory) -> None:
    model = _says(monkeypatch, directory, "one\nUser: two")
    assert "".join(t.text for t in model.generate("x", stop=["\nUser:", "zzz"])) == "one"
    assert model.stats.finish_reason == "stop"


def test_zero_temperature_takes_the_same_tokens_each_time(model) -> None:
    first, second = (_ids(model.generate([1, 2], max_tokens=20, temperature=0)) for _ in range(2))
    assert first == second
    expected = [1, 2]
    for _ in range(20):
        expected.append(int(np.argmax(hashed(expected))))
    assert first == expected[2:]


def test_generation_defaults_of_the_checkpoint_are_used(engine, directory) -> None:
    (directory / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.5, "top_k": 3, "eos_token_id": 0})
    )
    model = flashmoe.Model(directory)
    assert (model.sampling.temperature, model.sampling.top_k) == (0.5, 3)
    own = json.loads((directory / "config.json").read_text())["eos_token_id"]
    assert model.config.eos_token_ids == (0, own)


def test_a_damaged_generation_config_is_named(engine, directory) -> None:
    path = directory / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "top_p": "most"}))
    with pytest.raises(flashmoe.CheckpointError, match=rf"{path}: top_p must be .* got 'most'"):
        flashmoe.Model(directory)


def test_a_long_prompt_goes_in_chunks_and_says_how_far_it_is(model, engine) -> None:
    seen = []
    chunk = 128
    model._scheduler.chunk = chunk
    prompt = [i % 500 for i in range(2 * chunk + 5)]
    list(
        model.generate(
            prompt, max_tokens=1, progress=lambda done, total: seen.append((done, total))
        )
    )
    assert engine.calls == [chunk, chunk, 5]
    n = len(prompt)
    assert seen == [(0, n), (chunk, n), (2 * chunk, n), (n, n)]


def test_closing_the_iterator_stops_the_work(model, engine) -> None:
    tokens = model.generate([1], temperature=0)
    next(tokens)
    calls = len(engine.calls)
    tokens.close()
    assert len(engine.calls) == calls
    assert list(tokens) == []


def test_the_last_token_costs_no_forward_pass(model, engine) -> None:
    list(model.generate([1, 2, 3], max_tokens=4, temperature=0))
    assert engine.calls == [3, 1, 1, 1]


def test_a_conversation_continued_from_a_state_is_the_conversation_computed_whole(model) -> None:
    state = model.new_state()
    first = _ids(model.generate([1, 2, 3], max_tokens=5, temperature=0, state=state))
    assert state.tokens == (1, 2, 3, *first)
    second = _ids(model.generate([7, 8], max_tokens=5, temperature=0, state=state))
    whole = [1, 2, 3, *first, 7, 8]
    assert second == _ids(model.generate(whole, max_tokens=5, temperature=0))
    assert state.position == len(whole) + 5


def test_an_answer_cut_short_goes_on_with_an_empty_prompt(model) -> None:
    whole = _ids(model.generate([5], max_tokens=10, temperature=0))
    state = model.new_state()
    for i, _ in enumerate(model.generate([5], temperature=0, state=state), 1):
        if i == 4:
            break
    rest = _ids(model.generate([], max_tokens=6, temperature=0, state=state))
    assert [*state.tokens][1:5] + rest == whole


def test_max_tokens_zero_fills_a_state_that_forks_share(model, engine) -> None:
    shared = model.new_state()
    assert list(model.generate([1, 2, 3], max_tokens=0, state=shared)) == []
    engine.calls.clear()
    one, two = shared.fork(), shared.fork()
    answers = [
        _ids(model.generate([i], max_tokens=4, temperature=0, state=s))
        for i, s in enumerate((one, two))
    ]
    assert engine.calls == [1] * 8
    assert answers == [
        _ids(model.generate([1, 2, 3, i], max_tokens=4, temperature=0)) for i in (0, 1)
    ]
    assert shared.tokens == (1, 2, 3)


def test_the_repetition_penalty_sees_the_states_tokens(model) -> None:
    options = {"max_tokens": 6, "temperature": 0, "repetition_penalty": 1.8}
    state = model.new_state()
    list(model.generate([1, 2], max_tokens=0, state=state))
    assert _ids(model.generate([3], state=state, **options)) == _ids(
        model.generate([1, 2, 3], **options)
    )


def test_a_full_context_ends_the_answer(engine, directory) -> None:
    model = flashmoe.Model(directory, context=8)
    assert len(list(model.generate([1, 2, 3], temperature=0))) == 5
    assert model.stats.finish_reason == "context"


def test_a_prompt_that_fills_the_context_gets_no_answer(engine, directory) -> None:
    model = flashmoe.Model(directory, context=8)
    tokens = model.generate([1] * 8, temperature=0)
    assert [token for token, _ in zip(tokens, range(9), strict=False)] == []
    assert model.stats.finish_reason == "context"
    assert model.stats.prompt_tokens == 8


def test_a_prompt_that_does_not_fit_is_refused_at_once(engine, directory) -> None:
    model = flashmoe.Model(directory, context=8)
    with pytest.raises(flashmoe.StateError, match="context holds 8"):
        model.generate([1] * 9)
    state = model.new_state()
    list(model.generate([1] * 6, max_tokens=0, state=state))
    with pytest.raises(flashmoe.StateError, match="6 before"):
        model.generate([1] * 3, state=state)


def test_a_read_error_leaves_a_state_that_goes_on(model, engine) -> None:
    whole = _ids(model.generate([5], max_tokens=6, temperature=0))
    state = model.new_state()
    tokens = model.generate([5], temperature=0, state=state)
    taken = [next(tokens).id for _ in range(3)]

    def fail() -> None:
        raise flashmoe.ReadError("experts.bin: short read at 123")

    engine.before_forward = fail
    with pytest.raises(flashmoe.ReadError, match="short read"):
        next(tokens)
    engine.before_forward = lambda: None
    taken += _ids(model.generate([], max_tokens=3, temperature=0, state=state))
    assert taken == whole


def test_ctrl_c_in_a_forward_pass_comes_through_and_frees_the_state(model, engine) -> None:
    state = model.new_state()
    tokens = model.generate([5], temperature=0, state=state)
    next(tokens)

    def interrupt() -> None:
        raise KeyboardInterrupt

    engine.before_forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        next(tokens)
    engine.before_forward = lambda: None
    assert len(list(model.generate([], max_tokens=2, state=state))) == 2


def test_a_state_in_use_is_refused(model) -> None:
    state = model.new_state()
    tokens = model.generate([1], state=state)
    next(tokens)
    for use in (lambda: next(model.generate([2], state=state)), state.fork):
        with pytest.raises(flashmoe.StateError, match="in use"):
            use()
    tokens.close()
    assert state.fork().position == 2


def test_two_calls_on_one_state_are_checked_again_when_the_second_begins(engine, directory) -> None:
    model = flashmoe.Model(directory, context=8)
    state = model.new_state()
    list(model.generate([1], max_tokens=1, state=state))
    first, second = (model.generate([], max_tokens=0, state=state) for _ in range(2))
    assert list(first) == list(second) == []  # what follows is known
    first, second = (model.generate([1] * 6, max_tokens=0, state=state) for _ in range(2))
    assert list(first) == []
    with pytest.raises(flashmoe.StateError, match="8 before and a prompt of 6"):
        next(second)
    assert state.position == 8


def test_logits_are_the_predictions_after_each_id(model) -> None:
    logits = model.logits([4, 5, 6])
    assert logits.shape == (3, 512)
    assert logits.dtype == np.float32
    assert np.array_equal(logits[1], hashed([4, 5]))


def test_a_closed_model_says_so(model, engine) -> None:
    tokens = model.generate([1])
    next(tokens)
    with model:
        pass
    assert engine.closed
    for use in (
        lambda: next(tokens),
        lambda: model.generate([1]),
        lambda: model.logits([1]),
        model.new_state,
    ):
        with pytest.raises(flashmoe.StateError, match="closed"):
            use()
    model.close()
    assert model.stats.generated_tokens == 1


def test_stats_are_those_of_the_latest_call(model) -> None:
    list(model.generate([1, 2, 3], max_tokens=5))
    stats = model.stats
    assert (stats.prompt_tokens, stats.generated_tokens) == (3, 5)
    assert stats.bytes_read == 5000
    assert stats.bytes_from_page_cache == 2500
    assert stats.hit_rate == pytest.approx((2 + 6 * 0.5) / 8)
    assert stats.prefill_rate > 0
    assert stats.decode_rate == pytest.approx(4 / stats.decode_seconds)  # one is the prompt's
    assert stats.first_token_seconds >= stats.prefill_seconds
    assert stats.peak_memory > 1e6
    assert (stats.experts_per_token, stats.precision) == (6, "int8")
    assert json.loads(json.dumps(stats.to_dict()))["hit_rate"] == stats.hit_rate


def test_unknown_page_cache_hits_are_none_and_not_zero(model, engine, monkeypatch) -> None:
    known = engine.stats
    monkeypatch.setattr(engine, "stats", lambda: known() | {"bytes_cached": -1})
    list(model.generate([1], max_tokens=2))
    assert model.stats.bytes_from_page_cache is None
    assert model.stats.hit_rate == pytest.approx(2 / 8)


def test_what_is_in_force_is_logged_at_load_and_in_the_repr(engine, directory, caplog) -> None:
    with caplog.at_level(logging.INFO, "flashmoe"):
        model = flashmoe.Model(directory, threads=3, cache="2GB", context=50)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    for part in (
        "6 of 8 experts per token (the model's own: 6), ",
        f"cpu on {probe.processor()}, 3 threads with {_native.cpu_kernels()} kernels, ",
        "float32 activations and bfloat16 keys and values, ",  # its weights are not quantized
        "a cache of 2.00 GB for experts, a context of 50 tokens",
    ):
        assert part in record.message
        assert part in repr(model)


def test_fewer_experts_than_the_models_own_are_warned_of_once(engine, directory, caplog) -> None:
    model = flashmoe.Model(directory, experts_per_token=4)
    list(model.generate([1], max_tokens=3))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for said in (record.message, repr(model)):
        assert "4 of 8 experts per token (the model's own: 6; fewer are faster but less ex" in said


def test_the_precision_in_force_is_that_of_the_backend_and_the_weights(engine, directory) -> None:
    model = flashmoe.Model(directory, precision="float32", cache=0)
    assert "float32 activations and float32 keys and values, no cache of its own" in repr(model)
    quantized = dataclasses.replace(model.config, quantization=Quantization(4, 64, {}))
    setting = dataclasses.replace(model.setting, precision="int8")
    assert "int8 activations" in in_force(quantized, setting, "cpu", 50)
    on_metal = in_force(quantized, setting, "metal", 50)
    assert "float32 activations and bfloat16 keys" in on_metal
    assert "metal on " in on_metal and "threads" not in on_metal


@pytest.mark.parametrize(("asked", "in_force"), [("auto", 6), (None, 6), (1, 1), (6, 6), (100, 6)])
def test_experts_per_token_is_at_most_the_models_own(engine, directory, asked, in_force) -> None:
    assert flashmoe.Model(directory, experts_per_token=asked).experts_per_token == in_force


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("experts_per_token", 0),
        ("experts_per_token", 2.0),
        ("experts_per_token", "all"),
        ("backend", "cuda"),
        ("precision", "int4"),
        ("threads", 0),
        ("threads", "2"),
        ("threads", 10**12),
        ("cache", -1),
        ("cache", "4 parsecs"),
        ("cache", 1.5),
        ("context", 0),
        ("context", 4096),
    ],
)
def test_a_bad_argument_of_the_model_is_named(engine, directory, argument, value) -> None:
    with pytest.raises(flashmoe.ArgumentError, match=argument if argument != "cache" else "size"):
        flashmoe.Model(directory, **{argument: value})


def test_memory_that_is_not_granted_is_an_error_about_the_cache(directory, monkeypatch) -> None:
    def refuse(*_args, **_options) -> None:
        raise MemoryError("std::bad_alloc")

    install(monkeypatch)
    monkeypatch.setattr("flashmoe.generate.model.open_engine", open_engine)
    monkeypatch.setattr(_native, "Engine", refuse)
    with pytest.raises(flashmoe.ArgumentError, match=r"a cache of 100.0 GB; .* a smaller cache"):
        flashmoe.Model(directory, cache="100GB")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "empty"),
        ("", {}, "empty"),
        ([512], {}, "512 is not in the vocabulary"),
        ([-1], {}, "vocabulary"),
        ([1.0], {}, "ids"),
        (7, {}, "ids"),
        ([True], {}, "ids"),
        (b"ab", {}, "ids"),
        ("ab\ud800", {}, r"character 2 is '\\ud800'"),
        ([1], {"max_tokens": -1}, "max_tokens"),
        ([1], {"temperature": -1}, "temperature"),
        ([1], {"seed": "x"}, "seed"),
        ([1], {"stop": [""]}, "stop"),
        ([1], {"stop": 5}, "stop"),
        ([1], {"state": "x"}, "state"),
    ],
)
def test_a_bad_argument_of_generate_is_named_before_the_first_token(
    model, prompt, options, message
) -> None:
    with pytest.raises(flashmoe.ArgumentError, match=message):
        model.generate(prompt, **options)


def test_numpy_ids_are_ids(model) -> None:
    ids = np.array([3, 4], np.int64)
    assert _ids(model.generate(ids, max_tokens=3, temperature=0)) == _ids(
        model.generate([3, 4], max_tokens=3, temperature=0)
    )


def test_a_checkpoint_without_a_tokenizer_runs_on_ids(engine, directory) -> None:
    (directory / "tokenizer.json").unlink()
    model = flashmoe.Model(directory)
    assert [t.text for t in model.generate([1], max_tokens=3)] == ["", "", ""]
    with pytest.raises(flashmoe.CheckpointError, match=r"tokenizer\.json"):
        model.generate("text")
    with pytest.raises(flashmoe.CheckpointError, match=r"tokenizer\.json"):
        model.generate([1], stop="x")


def test_chat_renders_the_template(monkeypatch, directory) -> None:
    model = _says(monkeypatch, directory, "Hi")
    messages = [{"role": "user", "content": "Hello"}]
    assert model.render(messages, enable_thinking=False).endswith("<|im_start|>assistant\n")
    tokens = list(model.chat(messages, variables={"enable_thinking": False}))
    assert "".join(token.text for token in tokens) == "Hi"


def _chat_ids(chat) -> list[int]:
    return [delta.token.id for delta in chat if delta.token is not None]


def test_chat_goes_on_from_a_state_and_leaves_the_conversation_in_it(engine, directory) -> None:
    model = flashmoe.Model(directory, conversations=0)
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>ok"},
        {"role": "user", "content": "Go"},
    ]
    ids = model.prompt_ids(messages)
    assert ids == model.tokenizer.encode(model.render(messages), add_special_tokens=False).ids
    fresh = _ids(model.generate(ids, max_tokens=4, temperature=0))

    state = model.new_state()
    list(model.generate(ids[:20], max_tokens=0, state=state))
    engine.calls.clear()
    chat = model.chat(messages, max_tokens=4, temperature=0, state=state)
    assert _chat_ids(chat) == fresh
    assert sum(engine.calls) == len(ids) - 20 + 3
    assert (chat.answer.prompt_tokens, chat.answer.cached_tokens) == (len(ids), 20)
    assert state.tokens == (*ids, *fresh)

    for held in ([9, 9], ids):  # another conversation; this one, without what follows it
        other = model.new_state()
        list(model.generate(held, max_tokens=0, state=other))
        chat = model.chat(messages, max_tokens=4, temperature=0, state=other)
        assert _chat_ids(chat) == fresh
        assert other.tokens == (*ids, *fresh)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"stop": ""}, {"max_tokens": -1}, {"nonsense": 1}]
)
def test_chat_that_is_refused_leaves_the_state_as_it_was(model, options) -> None:
    state = model.new_state()
    list(model.generate([9, 9], max_tokens=0, state=state))
    with pytest.raises((flashmoe.ArgumentError, TypeError)):
        model.chat([{"role": "user", "content": "Hello"}], state=state, **options)
    assert state.tokens == (9, 9)


def test_chat_leaves_another_models_state_as_it_was(model) -> None:
    other = flashmoe.Model(model.directory)
    state = other.new_state()
    list(other.generate([9, 9], max_tokens=0, state=state))
    with pytest.raises(flashmoe.StateError, match="another model's"):
        model.chat([{"role": "user", "content": "Hello"}], state=state)
    assert state.tokens == (9, 9)


def test_a_conversation_that_is_not_unicode_is_refused(model) -> None:
    with pytest.raises(flashmoe.ArgumentError, match="not valid Unicode"):
        model.chat([{"role": "user", "content": "\udcff"}])


def test_no_chat_template_is_an_error_that_says_so(engine, directory) -> None:
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(flashmoe.ArgumentError, match="no chat template"):
        flashmoe.Model(directory).chat([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (0, 0),
        (123, 123),
        ("0", 0),
        ("4GB", 4 * 10**9),
        ("1.5 gb", 15 * 10**8),
        ("512MiB", 512 << 20),
        ("2k", 2000),
    ],
)
def test_sizes_are_read(text, nbytes) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GB", "-1", "4 GBs", "iB", "1e9", None, True])
def test_what_is_no_size_is_refused(text) -> None:
    with pytest.raises(flashmoe.ArgumentError, match="size"):
        parse_bytes(text)
