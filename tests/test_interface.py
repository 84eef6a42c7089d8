"""The Python interface on the real engine: states, precision and caches change no token."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from engines import random_ids
from programs import environment

import flashmoe

PROMPT = random_ids(320, 40).tolist()


@pytest.fixture(params=["mlx-4", "next"])
def model(request, checkpoint):
    with flashmoe.Model(checkpoint(request.param), precision="float32", threads=2) as model:
        yield model


def _ids(model, prompt, count, **options) -> list[int]:
    # Random models end at random: here every answer runs to max_tokens.
    options |= {"temperature": 0, "ignore_eos": True}
    return [t.id for t in model.generate(prompt, max_tokens=count, **options)]


def test_greedy_tokens_are_the_largest_logits(model) -> None:
    answer = _ids(model, PROMPT, 12)
    logits = model.logits([*PROMPT, *answer[:-1]])
    assert logits[len(PROMPT) - 1 :].argmax(axis=1).tolist() == answer
    token = next(model.generate(PROMPT, temperature=0))
    row = logits[len(PROMPT) - 1].astype(np.float64)
    assert token.logprob == pytest.approx(row.max() - np.log(np.exp(row).sum()), abs=1e-3)


def test_a_state_saved_loaded_forked_and_continued_gives_the_whole_conversation(
    model, tmp_path
) -> None:
    state = model.new_state()
    first = _ids(model, PROMPT, 6, state=state)
    state.save(tmp_path / "state.safetensors")
    loaded = flashmoe.State.load(model, tmp_path / "state.safetensors")
    fork = state.fork()
    expected = _ids(model, [*PROMPT, *first, 7, 8, 9], 10)
    for continued in (state, loaded, fork):
        assert _ids(model, [7, 8, 9], 10, state=continued) == expected
        assert continued.position == len(PROMPT) + 6 + 3 + 10


def test_a_state_does_not_fit_another_model(model, checkpoint, tmp_path) -> None:
    model.new_state().save(tmp_path / "state.safetensors")
    with flashmoe.Model(checkpoint("ratio-4")) as other, pytest.raises(flashmoe.StateError):
        flashmoe.State.load(other, tmp_path / "state.safetensors")


def test_a_cache_of_any_size_is_taken(checkpoint) -> None:
    with flashmoe.Model(checkpoint("mlx-4"), cache="99999999TB") as model:
        assert len(_ids(model, PROMPT, 2)) == 2
        assert model.stats.cache_bytes < 1e9


_OPEN = """
import sys
import flashmoe
try:
    flashmoe.Model(sys.argv[1], threads=int(sys.argv[2]), cache=0)
except (flashmoe.ArgumentError, RuntimeError) as error:
    print(error)
else:
    sys.exit("it opened")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads' stacks are as large as glibc says")
@pytest.mark.parametrize("stack", [1 << 45, 1 << 47])  # few, or none, fit an address space
@pytest.mark.parametrize("threads", [1, 8])
def test_too_little_memory_for_threads_is_an_exception(checkpoint, stack, threads) -> None:
    import resource  # noqa: PLC0415  (no Windows has it)

    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    run = subprocess.run(
        [sys.executable, "-c", _OPEN, str(checkpoint("mlx-4")), str(threads)],
        env=environment(OPENBLAS_NUM_THREADS="1"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_STACK, (stack, most)),
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_unknown_kernels_are_an_error_that_lists_those_there_are(checkpoint, monkeypatch) -> None:
    monkeypatch.setenv("FLASHMOE_ISA", "mmx")
    with pytest.raises(flashmoe.ArgumentError, match=r'FLASHMOE_ISA is "mmx"; .*portable'):
        flashmoe.Model(checkpoint("mlx-4"))


@pytest.mark.parametrize("cache", [0, "10kB", "1GB", None])
def test_the_cache_changes_no_token_and_is_counted(checkpoint, cache) -> None:
    with flashmoe.Model(checkpoint("mlx-4"), cache=0) as model:
        expected = _ids(model, PROMPT, 8)
    with flashmoe.Model(checkpoint("mlx-4"), cache=cache, threads=1) as model:
        assert _ids(model, PROMPT, 8) == expected
        assert _ids(model, PROMPT, 8) == expected
        stats = model.stats
    assert stats.expert_hits + stats.expert_misses > 0
    assert (stats.bytes_read == 0) == (cache in ("1GB", None))
    assert 0 <= stats.hit_rate <= 1


def test_states_are_forked_saved_and_loaded_while_another_thread_computes(model, tmp_path) -> None:
    state = model.new_state()
    expected = _ids(model, PROMPT, 4, state=state)
    path = tmp_path / "state.safetensors"
    begun, stop = threading.Event(), threading.Event()

    def work() -> None:
        while not stop.is_set():
            begun.set()
            model.logits(PROMPT * 4)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        begun.wait()
        for _ in range(5):
            state.save(path)
            assert flashmoe.State.load(model, path).fork().tokens == (*PROMPT, *expected)
    finally:
        stop.set()
        thread.join()


def test_threads_on_one_model_get_the_tokens_they_would_get_alone(model) -> None:
    prompts = [random_ids(320, 30, seed).tolist() for seed in range(3)]
    expected = [_ids(model, prompt, 8) for prompt in prompts]
    answers: list[list[int]] = [[], [], []]

    def work(i: int) -> None:
        answers[i] = _ids(model, prompts[i], 8)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected


def test_no_signal_handler_is_installed(checkpoint) -> None:
    code = (
        "import signal\n"
        "def handlers(): return [signal.getsignal(s) for s in signal.valid_signals()]\n"
        "before = handlers()\n"
        "import flashmoe\n"
        f"with flashmoe.Model({str(checkpoint('mlx-4'))!r}) as model:\n"
        "    list(model.generate([1], max_tokens=3))\n"
        "assert handlers() == before\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_the_cache_grows_in_steps_while_memory_lasts(checkpoint, monkeypatch, caplog) -> None:
    """As where another program takes what was there when the model was opened."""
    from flashmoe.machine import probe  # noqa: PLC0415

    left = [10 << 30]
    monkeypatch.setattr(probe, "available_memory", lambda: left[0])
    with flashmoe.Model(checkpoint("mlx-4"), cache="1GB", threads=1) as model:
        expected = _ids(model, PROMPT, 6)
        whole = model.stats.cache_bytes
    with flashmoe.Model(checkpoint("mlx-4"), cache="1GB", threads=1) as model:
        least = model.stats.cache_bytes
        assert least < whole  # as much as there are experts, of which not all are used yet
        left[0] = 1 << 20
        assert _ids(model, PROMPT, 6) == expected
        assert _ids(model, PROMPT, 6) == expected
        assert model.stats.cache_bytes == least
    assert [r.message for r in caplog.records if "stays smaller than planned" in r.message]


def test_a_context_that_is_asked_for_has_its_place_in_the_plan(checkpoint, monkeypatch) -> None:
    from flashmoe.machine import probe  # noqa: PLC0415

    directory = checkpoint("mlx-4")
    with flashmoe.Model(directory, cache=0, threads=1) as model:
        resident = int(model._native.stats()["resident_bytes"])
    monkeypatch.setattr(probe, "available_memory", lambda: resident + 100_000)
    flashmoe.Model(directory, context=64, cache=0, threads=1).close()
    with pytest.raises(flashmoe.ArgumentError, match="the context that was asked for"):
        flashmoe.Model(directory, context=4096, cache=0, threads=1)


def test_where_another_model_is_open_it_is_named(checkpoint, monkeypatch) -> None:
    from flashmoe.machine import probe  # noqa: PLC0415

    with flashmoe.Model(checkpoint("mlx-4"), cache=0, threads=1) as first:
        monkeypatch.setattr(probe, "available_memory", lambda: 1000)
        with pytest.raises(flashmoe.ArgumentError) as raised:
            flashmoe.Model(checkpoint("mlx-4"), threads=1)
        assert f"this process has {first.source} open: close()" in str(raised.value)
    with pytest.raises(flashmoe.ArgumentError) as raised:
        flashmoe.Model(checkpoint("mlx-4"), threads=1)
    assert "this process has" not in str(raised.value)
