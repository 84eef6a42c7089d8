"""`langchain-openai`, as agents use it."""

from typing import Literal

import pydantic
import pytest
from conversing import call_text
from langchain_core.messages import AIMessageChunk, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from serving import Served


def _chat(server: Served, **options) -> ChatOpenAI:
    options = {"max_tokens": 100, "temperature": 0, **options}
    return ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="none", model="demo", max_retries=0, **options
    )


@tool
def weather(city: str, days: int) -> str:
    """The weather in a city."""
    return f"{days} days of rain in {city}"


class Reading(pydantic.BaseModel):
    """What an instrument says."""

    kind: Literal["rain", "sun"]
    degrees: int


def test_messages_are_answered_and_streamed(demo) -> None:
    demo.says("Hello there.")
    messages = [SystemMessage("Be brief."), HumanMessage("Hello")]
    answer = _chat(demo).invoke(messages)
    assert answer.content == "Hello there."
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] > 2
    pieces = list(_chat(demo, stream_usage=True).stream(messages))
    total = sum(pieces[1:], pieces[0])
    assert isinstance(total, AIMessageChunk)
    assert total.content == "Hello there."
    assert total.usage_metadata["input_tokens"] == answer.usage_metadata["input_tokens"]
    assert total.usage_metadata["input_token_details"]["cache_read"] > 0


def test_an_agents_loop_ends_with_an_answer(demo) -> None:
    demo.script = lambda messages: (
        "It rains." if messages[-1]["role"] == "tool" else call_text({"city": "Oslo", "days": 3})
    )
    chat = _chat(demo).bind_tools([weather])
    messages: list = [HumanMessage("How is the weather?")]
    answer = chat.invoke(messages)
    assert [(c["name"], c["args"]) for c in answer.tool_calls] == [
        ("weather", {"city": "Oslo", "days": 3})
    ]
    for call in answer.tool_calls:
        messages += [answer, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert chat.invoke(messages).content == "It rains."
    assert "3 days of rain in Oslo" in demo.prompts[-1]
    streamed = list(chat.stream(messages[:1]))
    total = sum(streamed[1:], streamed[0])
    assert total.tool_calls[0]["args"] == {"city": "Oslo", "days": 3}


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output_is_an_object(demo, method) -> None:
    if method == "json_mode":
        demo.says('{"kind": "sun", "degrees": 20}')
    chat = _chat(demo).with_structured_output(Reading, method=method)
    assert isinstance(chat.invoke("Read as JSON."), Reading)


def test_any_tool_can_be_required(demo) -> None:
    answer = _chat(demo).bind_tools([weather], tool_choice="any").invoke("Hello")
    assert answer.tool_calls[0]["name"] == "weather"


def test_texts_are_completed(demo) -> None:
    model = OpenAI(
        base_url=f"{demo.url}/v1", api_key="none", model="demo", max_tokens=10, temperature=0
    )
    text = model.invoke("It was a cold morning, and")
    assert text
    assert "".join(model.stream("It was a cold morning, and")) == text


def test_logprobs_are_in_the_metadata(demo) -> None:
    answer = _chat(demo, max_tokens=5).bind(logprobs=True).invoke("Hello")
    assert len(answer.response_metadata["logprobs"]["content"]) == 5
