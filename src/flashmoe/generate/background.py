"""Answers for programs that run on asyncio: each is computed in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from flashmoe.generate.answer import Answer, Delta
from flashmoe.generate.chat import Chat

_T = TypeVar("_T")
_END = object()


class Background(AsyncIterator[_T], Generic[_T]):
    """An iterator whose items are computed in a thread, each when it is asked for.

    Where its task is cancelled the work stops within a layer.
    """

    def __init__(
        self, items: Iterator[_T], cancel: Callable[[], None], close: Callable[[], None]
    ) -> None:
        self._items = items
        self._cancel = cancel
        self._close = close
        self._stream = self._run()

    def __aiter__(self) -> Background[_T]:
        return self

    async def __anext__(self) -> _T:
        return await anext(self._stream)

    def cancel(self) -> None:
        """Ends the iteration within a layer of the pass that runs. May be called by any thread."""
        self._cancel()

    async def aclose(self) -> None:
        """Stops the work: an item that another task waits for ends within a layer."""
        if self._stream.ag_running:  # type: ignore[attr-defined]
            self._cancel()
        else:
            await self._stream.aclose()

    async def _run(self) -> AsyncGenerator[_T, None]:
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, "flashmoe")
        try:
            while (item := await loop.run_in_executor(thread, next, self._items, _END)) is not _END:
                yield item  # type: ignore[misc]
        except BaseException:
            self._cancel()
            raise
        finally:
            closing = loop.run_in_executor(thread, self._close)  # behind the item being computed
            thread.shutdown(wait=False)
            await asyncio.shield(closing)


class AsyncChat(Background[Delta]):
    """A `Chat` whose pieces are awaited."""

    def __init__(self, chat: Chat) -> None:
        super().__init__(chat, chat.cancel, chat.close)
        self._chat = chat

    async def answer(self) -> Answer:
        """The complete answer; what is missing is computed first."""
        async for _ in self:
            pass
        return self._chat.answer
