"""Whose pass comes next and how long it is, and how requests end."""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import random_ids

import flashmoe
from flashmoe.generate import scheduler as module
from flashmoe.generate.scheduler import PassTimes, Request, Scheduler

DEMO = Path(flashmoe.__file__).parent / "demo_model"
PROMPT = random_ids(6000, 300).tolist()


def test_a_chunk_is_as_long_as_the_time_a_row_allows() -> None:
    times = PassTimes()
    assert times.rows_within(1.0) == 1  # nothing is known yet
    times.add(1, 0.25)
    assert times.rows_within(1.0) == 4
    times.add(4, 0.5)  # a longer pass takes less time a row
    assert times.rows_within(1.0) == 8
    times.add(64, 4.0)  # too long, so that no pass is to be longer
    times.add(32, 0.25)
    assert times.rows_within(1.0) == 64
    assert times.rows_within(0.001) == 1
    times.add(60, 1.0)
    times.add(33, 0.5)  # of passes of 32 to 63 rows the latest counts
    assert times.rows_within(1.0) == 64


@pytest.fixture
def scheduler() -> Scheduler:
    native: Any = None
    made = Scheduler(native, 2048)
    made.measured(1, 0.1)
    made.measured(100, 0.8)
    return made


def _joined(scheduler: Scheduler, *, decoding: bool, passing: bool = True) -> Request:
    request = scheduler.request()
    request.decoding, request.passing = decoding, passing
    scheduler.join(request)
    return request


def test_a_prompt_is_cut_only_while_others_decode(scheduler) -> None:
    prompt = _joined(scheduler, decoding=False)
    assert scheduler.rows(prompt, 5000) == 2048
    assert scheduler.rows(prompt, 7) == 7
    other = _joined(scheduler, decoding=False)
    assert scheduler.rows(prompt, 5000) == 2048
    other.decoding = True
    assert scheduler.rows(prompt, 5000) == 200  # 1.6 s
    assert scheduler.rows(prompt, 7) == 7
    scheduler.leave(other)
    assert scheduler.rows(prompt, 5000) == 2048


def test_one_who_leaves_its_answer_alone_holds_nobody_up(scheduler) -> None:
    prompt = _joined(scheduler, decoding=False)
    idle = _joined(scheduler, decoding=True, passing=False)
    idle.ended = time.monotonic() - 1
    assert scheduler.rows(prompt, 5000) == 200
    idle.ended = time.monotonic() - module.WAIT
    assert scheduler.rows(prompt, 5000) == 2048


def test_prompts_share_what_the_tokens_of_others_leave(scheduler) -> None:
    prompt = _joined(scheduler, decoding=False)
    for _ in range(6):
        _joined(scheduler, decoding=True)
    assert scheduler.rows(prompt, 5000) == 150  # 80 % of 2 s less five tokens
    _joined(scheduler, decoding=False)
    assert scheduler.rows(prompt, 5000) == 6  # 0.6 s is less than 100 rows took
    for _ in range(20):
        _joined(scheduler, decoding=True)
    assert scheduler.rows(prompt, 5000) == 1


class Passes:
    """A native engine that notes the rows of each pass."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.rows: list[int] = []

    def forward(self, state: Any, ids: np.ndarray, *rest: Any, **options: Any) -> Any:
        self.rows.append(len(ids))
        return self._native.forward(state, ids, *rest, **options)


def test_a_prompt_is_cut_while_another_thread_decodes_and_no_token_changes(monkeypatch) -> None:
    with flashmoe.Model(DEMO, threads=2, cache=0) as model:
        alone = [t.id for t in model.generate(PROMPT, max_tokens=5, temperature=0)]
        decoded = [t.id for t in model.generate([7], max_tokens=40, temperature=0, ignore_eos=True)]
        native = model._scheduler.native
        passes = Passes(native)
        model._scheduler.native = passes  # type: ignore[assignment]
        monkeypatch.setattr(module, "WAIT", 60.0)  # the other counts, however slow the machine is
        monkeypatch.setattr(module, "_AIM", 1e-9)
        other = model.generate([7], max_tokens=40, temperature=0, ignore_eos=True)
        got = [next(other).id for _ in range(2)]
        together = [t.id for t in model.generate(PROMPT, max_tokens=5, temperature=0)]
        assert passes.rows[2 : 2 + len(PROMPT)] == [1] * len(PROMPT)
        assert [*got, *(t.id for t in other)] == decoded
        passes.rows.clear()
        assert [t.id for t in model.generate(PROMPT, max_tokens=5, temperature=0)] == alone
        assert passes.rows == [len(PROMPT), 1, 1, 1, 1]
        assert together == alone


def test_a_cancelled_answer_ends_and_what_was_computed_stays(monkeypatch) -> None:
    messages = [{"role": "user", "content": "the fox and the dog " * 400}]
    with flashmoe.Model(DEMO, threads=1, cache=0) as model:
        model._scheduler.chunk = 256
        chat = model.chat(messages, temperature=0)
        seen = []

        def cancel(done: int, total: int) -> None:
            seen.append(done)
            if done:
                chat.cancel()

        chat = model.chat(messages, temperature=0, progress=cancel)
        assert list(chat) == []
        assert chat.answer.finish_reason == "cancelled"
        assert model.stats.finish_reason == "cancelled"
        again = model.chat(messages, max_tokens=3, temperature=0)
        assert again.answer.cached_tokens == seen[-1] < again.answer.prompt_tokens
        fresh = [t.id for t in model.generate(chat.prompt_ids, max_tokens=3, temperature=0)]
        state = model.new_state()
        list(model.chat(messages, max_tokens=3, temperature=0, state=state))
        assert list(state.tokens[len(chat.prompt_ids) :]) == fresh


def test_a_pass_is_cancelled_in_the_middle_from_another_thread() -> None:
    with flashmoe.Model(DEMO, threads=1, cache=0) as model:
        tokens = model.generate(random_ids(6000, 3000).tolist(), temperature=0)
        began = time.monotonic()
        timer = threading.Timer(0.1, tokens.cancel)
        timer.start()
        assert list(tokens) == []
        timer.join()
        assert model.stats.finish_reason == "cancelled"
        assert model.stats.prompt_tokens == 0, "the pass came to its end"
        assert time.monotonic() - began < 30


def test_closing_in_the_middle_keeps_what_was_computed() -> None:
    messages = [{"role": "user", "content": "Tell me of the sea."}]
    with flashmoe.Model(DEMO, threads=1, cache=0) as model:
        with model.chat(messages, temperature=0) as chat:
            first = [next(chat) for _ in range(3)]
        assert chat.answer.finish_reason == "cancelled"
        assert [delta.token is not None for delta in first] == [True] * 3
        assert model.chat(messages, max_tokens=0).answer.cached_tokens == len(chat.prompt_ids)
