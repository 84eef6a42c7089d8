"""Conversations: each turn computes what is new in it, and what it computes is right."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from conversing import (
    WEATHER,
    Scripted,
    as_message,
    call_text,
    model_with_template,
    published_template,
)
from test_chat import TOOLS_TEMPLATE

import flashmoe

SYSTEM = {"role": "system", "content": "You are a patient assistant who answers in few words."}


def steps_of(turn: int) -> Iterator[str]:
    """What the model says in a turn, without its reasoning: calls of tools, then an answer."""
    if turn % 3 == 1:
        yield call_text({"city": f"Paris {turn}", "days": turn})
    if turn % 5 == 2:
        yield "I look it up.\n\n" + call_text(
            {"city": "Rome", "days": 1}, {"city": "Oslo", "days": 2}
        )
        yield call_text({"city": "Bern", "days": turn})
    yield f"It is {turn} degrees there, I would say."


class Client:
    """Holds a conversation, and checks what each request computed.

    Args:
        name: in the system prompt, so that conversations differ from their beginning.
        echo: whether it sends reasoning back.
    """

    def __init__(
        self, model: flashmoe.Model, name: str = "Ada", *, think: bool = False, echo: bool = False
    ) -> None:
        self.model = model
        self.think, self.echo = think, echo
        self.messages = [SYSTEM | {"content": f"You are {name}. {SYSTEM['content']}"}]
        self.sequence: list[int] = []
        self.query = 0  # where the answer to the latest query begins
        self.turn = 0  # where the latest answer begins
        self.requests = self.whole = 0  # the latter computed nothing twice

    def ask(self, number: int, *, cached: bool = True) -> None:
        """A user's turn with all its calls of tools.

        Args:
            cached: whether at most one turn may be computed again.
        """
        self.messages.append({"role": "user", "content": f"What about place number {number}?"})
        fresh, self.first_cached = True, -1
        for said in steps_of(number):
            thought = f"They ask for {number}, so I think.\n</think>\n\n" if self.think else ""
            # Every fourth answer is drawn letter by letter, as no tokenizer encodes it.
            script = Scripted(self.model, thought + said, spelled=number % 4 == 1)
            chat = self.model.chat(
                self.messages,
                tools=[WEATHER],
                think=self.think,
                processors=[script],
                temperature=0,
            )
            answer, ids = chat.answer, chat.prompt_ids
            rows = len(ids) - answer.cached_tokens + answer.generated_tokens - 1
            assert answer.generated_tokens == len(script.ids)
            assert bool(answer.reasoning) == self.think
            if self.sequence and cached:
                assert answer.cached_tokens >= (self.query if fresh else self.turn)
                self.whole += answer.cached_tokens == len(self.sequence) - 1
            self.requests += 1
            self.first_cached = answer.cached_tokens if fresh else self.first_cached
            self.rows, self.script = rows, script
            self.turn = len(ids) - 1 - ids[::-1].index(1)  # <|im_start|>
            self.query = self.turn if fresh else self.query
            self.sequence = [*ids, *script.ids]
            self.messages.append(as_message(answer, reasoning=self.echo))
            for call in answer.tool_calls:
                result = f"{call.arguments['days']} degrees"
                self.messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
            fresh = False

    def compare(self) -> None:
        """The latest answer's logits are those of its sequence computed from scratch."""
        logits = self.model.logits(self.sequence)
        assert self.script.logits
        for length, seen in self.script.logits.items():
            assert np.array_equal(seen, logits[length - 1])


def as_reported(template: str) -> str:
    """What 3.8 is reported to do besides: reasoning is not looked for in content, and other
    efforts than three raise."""
    inline = re.search(
        r"\{%- else %\}\s*\{%- if '</think>' in content %\}.*?\{%- endif %\}", template, re.DOTALL
    )
    assert inline is not None
    efforts = (
        "{%- if reasoning_effort is defined and reasoning_effort not in"
        " ['xhigh', 'medium', 'low'] %}"
        "{{- raise_exception('no such effort: ' ~ reasoning_effort) }}{%- endif %}"
    )
    return efforts + template.replace(inline[0], "")


def template_of(name: str) -> str:
    if name == "own":
        return TOOLS_TEMPLATE
    published = published_template(name.removesuffix("-reported"))
    if published is None:
        pytest.skip("../shared/templates is not here")
    return as_reported(published) if name.endswith("-reported") else published


@pytest.mark.parametrize("echo", [True, False], ids=["reasoning-echoed", "reasoning-omitted"])
@pytest.mark.parametrize("think", [True, False], ids=["think", "no-think"])
@pytest.mark.parametrize("name", ["own", "qwen3.5", "qwen3.6", "qwen3.8", "qwen3.8-reported"])
def test_a_turn_computes_what_is_new_and_at_most_one_turn_more(
    tmp_path: Path, maker: ModuleType, name: str, think: bool, echo: bool
) -> None:
    directory = model_with_template(tmp_path / "model", maker, template_of(name))
    with flashmoe.Model(directory, threads=2) as model:
        client = Client(model, think=think, echo=echo)
        for number in range(20):
            client.ask(number)
            assert model.stats.forward_rows == client.rows  # as the engine counts them
            if number in (3, 19):
                client.compare()
        if name.startswith(("qwen3.6", "qwen3.8")):  # they keep the reasoning of earlier turns
            assert client.whole == client.requests - 1


def test_an_effort_that_a_template_refuses_is_an_argument_error(tmp_path, maker) -> None:
    directory = model_with_template(tmp_path / "model", maker, template_of("qwen3.8-reported"))
    with flashmoe.Model(directory) as model:
        question = [{"role": "user", "content": "Hello"}]
        with pytest.raises(flashmoe.ArgumentError, match="no such effort: high"):
            model.chat(question, variables={"reasoning_effort": "high"})
        assert model.chat(question, variables={"reasoning_effort": "low"}, max_tokens=1).answer


@pytest.fixture
def directory(tmp_path: Path, maker: ModuleType) -> Path:
    return model_with_template(tmp_path / "model", maker, TOOLS_TEMPLATE)


def test_conversations_that_the_budget_holds_are_not_computed_again(directory: Path) -> None:
    with flashmoe.Model(directory, threads=2) as model:
        client = Client(model)
        for number in range(3):
            client.ask(number)
        one = model._conversations.nbytes
    with flashmoe.Model(directory, threads=2, conversations=5 * one) as model:
        clients = [Client(model, name) for name in "ABCDEFGH"]

        def ask(who: list[Client], number: int, *, cached: bool) -> None:
            for client in who:
                client.ask(number, cached=cached)
                assert 0 < model._conversations.nbytes <= 5 * one
                client.compare()

        ask(clients, 0, cached=False)
        ask(clients, 1, cached=False)  # each has been let go when it comes again
        ask(clients[3:], 2, cached=True)  # but the latest five have not
        ask(clients[3:], 3, cached=True)
        ask(clients[:1], 2, cached=False)
        assert clients[0].first_cached == 0


def test_conversations_in_threads_get_what_they_would_get_alone(directory: Path) -> None:
    with flashmoe.Model(directory, threads=2) as model, ThreadPoolExecutor(8) as pool:
        clients = [Client(model, name) for name in "ABCDEFGH"]
        for number in range(3):
            list(pool.map(lambda client, number=number: client.ask(number), clients))
        for client in clients:
            client.compare()
