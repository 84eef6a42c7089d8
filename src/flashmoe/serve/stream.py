"""Answers sent as they come, and clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

from starlette.types import Receive, Scope, Send

from flashmoe.serve.fields import RequestError
from flashmoe.serve.reply import Event, Reply

PULSE = 1.0
"""Seconds of silence after which a stream says that it is alive."""
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # a proxy is not to collect them
]


async def until_gone(receive: Receive) -> None:
    """Returns when the client has left. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_to_end(events: AsyncGenerator[Event, None], receive: Receive) -> bool:
    """Takes all events; False, and the work is stopped, where the client leaves before."""

    async def run() -> None:
        async for _ in events:
            pass

    work, gone = asyncio.ensure_future(run()), asyncio.ensure_future(until_gone(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return False
        await work
        return True
    finally:
        await _ended(work, gone)


class EventStream:
    """A response of server-sent events: headers at once, then each event as it comes.

    Args:
        failure: says what becomes of an error; the status has been sent.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        reply: Reply,
        failure: Callable[[Exception], RequestError],
    ) -> None:
        self._events = events
        self._reply = reply
        self._failure = failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        gone = asyncio.ensure_future(until_gone(receive))
        pieces = self._pieces(gone)
        try:
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # it left while we wrote
            pass
        finally:
            await pieces.aclose()
            await _ended(gone)

    async def _pieces(self, gone: asyncio.Future[Any]) -> AsyncGenerator[bytes, None]:
        """What to send, until the client leaves."""
        encoded = self._encoded()
        piece: asyncio.Future[Any] | None = None
        try:
            while True:
                piece = asyncio.ensure_future(_next(encoded))
                while not piece.done():
                    await asyncio.wait(
                        {piece, gone}, timeout=PULSE, return_when=asyncio.FIRST_COMPLETED
                    )
                    if gone.done():
                        return
                    if not piece.done():
                        yield self._reply.silence
                data = piece.result()
                if data is None:
                    return
                yield data
        finally:
            if piece is not None:
                await _ended(piece)
            await encoded.aclose()

    async def _encoded(self) -> AsyncGenerator[bytes, None]:
        try:
            async for event in self._events:
                yield self._reply.encoded(event)
            if self._reply.end:
                yield self._reply.end
        except Exception as error:
            yield self._reply.encoded(self._reply.failed(self._failure(error)))
        finally:
            await self._events.aclose()


async def _next(pieces: AsyncIterator[bytes]) -> bytes | None:
    return await anext(pieces, None)


async def _ended(*tasks: asyncio.Future[Any]) -> None:
    """Cancels what still runs, and waits for it."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
