"""Schemas of functions against those that transformers makes of them."""

from typing import Optional, Union

import transformers.utils

from flashmoe.generate.tools import tools_of


def plan(
    city: str,
    days: int,
    budget: float,
    direct: bool,
    stops: list[str],
    prices: dict[str, int],
    nickname: Optional[str] = None,  # noqa: UP045
    number: Union[int, str] = 0,  # noqa: UP007
) -> str:
    """Plans a journey.

    Args:
        city: Where it goes.
        days: How long it takes,
            in days.
        budget: At most.
        direct: Whether without a change.
        stops: On the way.
        prices: By class.
        nickname: Of the traveller.
        number: Of travellers.

    Returns:
        The plan.
    """
    return city


def test_a_function_has_the_schema_that_transformers_gives_it() -> None:
    theirs = transformers.utils.get_json_schema(plan)["function"]
    (ours,) = tools_of([plan])
    assert (ours.name, ours.description) == (theirs["name"], theirs["description"])
    assert ours.parameters["required"] == theirs["parameters"]["required"]
    for name, said in theirs["parameters"]["properties"].items():
        found = ours.parameters["properties"][name]
        assert found["description"] == said["description"]
        if name == "nickname":  # "nullable" is OpenAPI's word, not JSON Schema's
            assert found["anyOf"] == [{"type": said["type"]}, {"type": "null"}]
        elif name == "number":
            assert [part["type"] for part in found["anyOf"]] == said["type"]
        else:
            assert found == said
