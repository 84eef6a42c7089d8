"""A model that calls Python functions until it can answer.

python examples/agent.py [MODEL] [QUESTION]
"""

import datetime
import sys

import flashmoe

source = sys.argv[1] if len(sys.argv) > 1 else "demo"
question = sys.argv[2] if len(sys.argv) > 2 else "How many days are left of this year?"


def today() -> str:
    """The date of today, as 2026-01-31."""
    return datetime.date.today().isoformat()


def days_between(first: str, last: str) -> int:
    """The number of days from one date to another, both as 2026-01-31."""
    return (datetime.date.fromisoformat(last) - datetime.date.fromisoformat(first)).days


tools = {function.__name__: function for function in (today, days_between)}
messages = [{"role": "user", "content": question}]
with flashmoe.Model(source) as model:
    for _ in range(6):
        answer = model.chat(messages, tools=tools.values(), max_tokens=200, seed=1).answer
        messages.append(answer.message)
        for call in answer.tool_calls:
            try:
                result = tools[call.name](**call.arguments)
            except Exception as error:  # the model is told, and may try again
                result = f"error: {error}"
            print(f"{call.name}({call.raw}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
        if not answer.tool_calls:
            break
    print(answer.text)
