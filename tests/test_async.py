"""Answers on asyncio: the same as without, and stopped with their task."""

import asyncio
import dataclasses
import threading
from pathlib import Path

import pytest
from fake_engine import FakeEngine, install, make_directory, make_tokenizer, spelling

import flashmoe

QUESTION = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    return install(monkeypatch, spelling("Hi there.", make_tokenizer()))


@pytest.fixture
def model(engine: FakeEngine, tmp_path: Path) -> flashmoe.Model:
    return flashmoe.Model(make_directory(tmp_path / "model"))


def test_tokens_and_pieces_are_those_of_the_synchronous_calls(model) -> None:
    async def main() -> None:
        tokens = [token async for token in model.agenerate("the fox", max_tokens=5)]
        assert tokens == list(model.generate("the fox", max_tokens=5))
        chat = model.achat(QUESTION)
        deltas = [delta async for delta in chat]
        expected = model.chat(QUESTION)
        assert deltas == list(expected)
        answer = await chat.answer()
        assert answer == dataclasses.replace(expected.answer, cached_tokens=0)
        assert answer.text == "Hi there."
        assert (await model.achat(QUESTION).answer()).text == "Hi there."

    asyncio.run(main())


def test_bad_arguments_are_refused_at_the_call(model) -> None:
    with pytest.raises(flashmoe.ArgumentError):
        model.achat(QUESTION, temperature=-1)
    with pytest.raises(flashmoe.ArgumentError):
        model.agenerate([])


def test_an_error_of_the_engine_is_raised_where_the_item_is_awaited(model, engine) -> None:
    def fail() -> None:
        raise flashmoe.ReadError("experts.bin: short read")

    async def main() -> None:
        tokens = model.agenerate("the fox")
        await anext(tokens)
        engine.before_forward = fail
        with pytest.raises(flashmoe.ReadError, match="short read"):
            await anext(tokens)

    asyncio.run(main())


def test_a_cancelled_task_stops_the_work_and_the_loop_runs_meanwhile(model, engine) -> None:
    before = set(threading.enumerate())  # of other tests
    entered, release = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert release.wait(60)

    async def main() -> None:
        chat = model.achat(QUESTION)
        await anext(chat)
        engine.before_forward = wait
        task = asyncio.create_task(anext(chat))
        while not entered.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, release.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        calls = len(engine.calls)
        with pytest.raises(StopAsyncIteration):
            await anext(chat)
        await asyncio.sleep(0.05)
        assert len(engine.calls) == calls
        assert (await chat.answer()).finish_reason == "cancelled"

    asyncio.run(main())
    begun = set(threading.enumerate()) - before
    assert not [t for t in begun if t.name.startswith("flashmoe")]


def test_closing_stops_a_pass_that_another_task_waits_for(model, engine) -> None:
    entered, release = threading.Event(), threading.Event()

    def wait() -> None:
        entered.set()
        assert release.wait(60)

    async def main() -> None:
        tokens = model.agenerate("the fox")
        await anext(tokens)
        engine.before_forward = wait

        async def read() -> list[flashmoe.Token]:
            return [token async for token in tokens]

        reading = asyncio.create_task(read())
        while not entered.is_set():
            await asyncio.sleep(0.001)
        await tokens.aclose()
        release.set()
        assert len(await reading) <= 1  # the pass that was running
        assert model.stats.finish_reason == "cancelled"

    asyncio.run(main())


def test_leaving_the_loop_stops_the_work(model, engine) -> None:
    async def main() -> None:
        chat = model.achat(QUESTION)
        async for _ in chat:
            break
        await chat.aclose()
        calls = len(engine.calls)
        await asyncio.sleep(0.05)
        assert len(engine.calls) == calls

    asyncio.run(main())
