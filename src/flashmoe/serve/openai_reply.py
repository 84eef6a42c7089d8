"""Replies in the words of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from flashmoe.generate.answer import Answer, Delta, Token
from flashmoe.generate.text import piece_bytes
from flashmoe.serve.fields import RequestError
from flashmoe.serve.openai import error_body
from flashmoe.serve.reply import Event, Reply

if TYPE_CHECKING:
    from flashmoe.checkpoint.tokenizer import Tokenizer
    from flashmoe.generate.chat import Chat

_FINISH = {"cancelled": "stop"}


class OpenAIReply(Reply):
    """What replies of both endpoints have in common."""

    silence = b": still at work\n\n"
    end = b"data: [DONE]\n\n"
    kind: str
    """The object's name, and that of a chunk."""
    chunk_kind: str

    def begin(self, chats: Sequence[Chat]) -> Iterator[Event]:
        self.choices: list[dict[str, Any]] = []
        yield from ()

    def choice(self, index: int) -> Iterator[Event]:
        self._logprobs = Logprobs(self._tokenizer)
        self._listed: list[Token] = []
        yield from ()

    def finish(self) -> Iterator[Event]:
        if self.ask.usage:
            yield {**self._head(self.chunk_kind), "choices": [], "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        return {**self._head(self.kind), "choices": self.choices, "usage": self._usage()}

    def failed(self, error: RequestError) -> Event:
        return error_body(error)

    def _tokens(self, delta: Delta) -> list[Token]:
        """The tokens that are listed with a piece, if tokens are."""
        taken = self._logprobs.take(delta) if self.ask.logprobs else []
        self._listed += taken
        return taken

    def _head(self, kind: str) -> Event:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.ask.model,
            "system_fingerprint": self.fingerprint,
        }

    def _chunk(self, choice: dict[str, Any]) -> Event:
        chunk = {**self._head(self.chunk_kind), "choices": [choice]}
        return {**chunk, "usage": None} if self.ask.usage else chunk

    def _usage(self) -> dict[str, Any]:
        used = self.used
        return {
            "prompt_tokens": used.prompt,
            "completion_tokens": used.generated,
            "total_tokens": used.prompt + used.generated,
            "prompt_tokens_details": {"cached_tokens": used.cached},
            "completion_tokens_details": {"reasoning_tokens": used.reasoning},
        }


class ChatReply(OpenAIReply):
    """A chat completion."""

    prefix = "chatcmpl-"
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def choice(self, index: int) -> Iterator[Event]:
        yield from super().choice(index)
        yield self._delta(index, {"role": "assistant", "content": ""})

    def _piece(self, index: int, delta: Delta) -> Iterator[Event]:
        tokens = self._tokens(delta)
        if delta.kind == "tool_call":
            if delta.id is not None:
                function = {"name": delta.name, "arguments": delta.text}
                call = {"id": delta.id, "type": "function", "function": function}
            elif delta.text:
                call = {"function": {"arguments": delta.text}}
            else:
                return
            yield self._delta(index, {"tool_calls": [{"index": delta.index, **call}]})
        elif delta.text and delta.kind == "reasoning":
            yield self._delta(index, {"reasoning_content": delta.text})
        elif delta.text:
            yield self._delta(index, {"content": delta.text}, tokens)

    def _ended(self, index: int, answer: Answer) -> Iterator[Event]:
        finish = _FINISH.get(answer.finish_reason, answer.finish_reason)
        yield self._delta(index, {}, finish=finish)
        # Of an answer that was cut short within a call, the stream has the beginning of it too.
        calls = [*answer.tool_calls, *answer.invalid_tool_calls]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not answer.text else answer.text,
            "refusal": None,
        }
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.raw},
                }
                for call in calls
            ]
        self.choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": self._content(self._listed),
                "finish_reason": finish,
            }
        )

    def _delta(
        self,
        index: int,
        delta: dict[str, Any],
        tokens: Sequence[Token] = (),
        finish: str | None = None,
    ) -> Event:
        logprobs = self._content(tokens) if tokens else None
        return self._chunk(
            {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        )

    def _content(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.ask.logprobs:
            return None
        return {"content": [self._entry(token) for token in tokens], "refusal": None}

    def _entry(self, token: Token) -> dict[str, Any]:
        spelled = self._logprobs.spelled
        others = [{**spelled(id), "logprob": logprob} for id, logprob in token.alternatives]
        return {**spelled(token.id), "logprob": token.logprob, "top_logprobs": others}


class CompletionReply(OpenAIReply):
    """A completion of a text."""

    prefix = "cmpl-"
    kind = chunk_kind = "text_completion"

    def choice(self, index: int) -> Iterator[Event]:
        yield from super().choice(index)
        self._offset = 0
        self._texts: list[str] = []
        if self.ask.echo:
            prompt = self.ask.prompts[index // self.ask.choices]
            text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
            yield self._text(index, text)

    def _piece(self, index: int, delta: Delta) -> Iterator[Event]:
        tokens = self._tokens(delta)
        if delta.text:
            yield self._text(index, delta.text, tokens)

    def _ended(self, index: int, answer: Answer) -> Iterator[Event]:
        finish = _FINISH.get(answer.finish_reason, answer.finish_reason)
        yield self._chunk({"index": index, "text": "", "logprobs": None, "finish_reason": finish})
        self._offset = 0
        self.choices.append(
            {
                "index": index,
                "text": "".join(self._texts),
                "logprobs": self._lists(self._listed) if self.ask.logprobs else None,
                "finish_reason": finish,
            }
        )

    def _text(self, index: int, text: str, tokens: Sequence[Token] = ()) -> Event:
        self._texts.append(text)
        logprobs = self._lists(tokens) if tokens else None
        return self._chunk(
            {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        )

    def _lists(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def text(id: int) -> str:
            return str(self._logprobs.spelled(id)["token"])

        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(text(token.id))
        return {
            "tokens": [text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text(i): logprob for i, logprob in t.alternatives} for t in tokens],
            "text_offset": offsets,
        }


class Logprobs:
    """The tokens that the text of an answer is made of, in step with the text.

    Not those that are layout or markup, or reasoning, or the end: the bytes of all that are listed
    are the text's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[Token] = []
        self._ahead = 0
        """Bytes of text that were given and whose tokens were not listed."""
        self._fresh = True
        """Whether no text was given since the beginning, or since something else was."""

    def take(self, delta: Delta) -> list[Token]:
        """The tokens that are complete with a piece of the answer."""
        if delta.kind != "text":
            self._pending, self._ahead, self._fresh = [], 0, True
            return []
        if delta.token is not None:
            self._pending.append(delta.token)
        text = delta.text.encode()
        if not text:
            return []
        if self._fresh:
            self._ahead += self._skip_layout(text)
            self._fresh = False
        self._ahead += len(text)
        taken = []
        while self._pending and (size := len(self._bytes(self._pending[0].id))) <= self._ahead:
            self._ahead -= size
            taken.append(self._pending.pop(0))
        return taken

    def spelled(self, id: int) -> dict[str, Any]:
        """A token's text, and its bytes: a token may be part of a character."""
        data = self._bytes(id)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data)}

    def _skip_layout(self, text: bytes) -> int:
        """Drops tokens before the one that text begins in; how far within it that is."""
        data = b"".join(self._bytes(token.id) for token in self._pending)
        while (at := data.find(text)) > 0:
            size = len(self._bytes(self._pending[0].id))
            if size > at:
                return at
            data = data[size:]
            self._pending.pop(0)
        return 0

    def _bytes(self, id: int) -> bytes:
        piece = self._tokenizer.piece(id)
        return piece_bytes(piece) if piece else self._tokenizer.token(id).encode()
