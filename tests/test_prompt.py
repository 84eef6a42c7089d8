"""What of a conversation becomes the ids that a model reads."""

from pathlib import Path
from types import ModuleType

import pytest
from conversing import Scripted, as_message, model_with_template
from test_chat import TOOLS, TOOLS_TEMPLATE

import flashmoe
from flashmoe.generate.prompt import Prompt

PRESERVING = TOOLS_TEMPLATE.replace(
    "loop.index0 > ns.last", "(loop.index0 > ns.last or preserve_thinking is true)"
)
USER = {"role": "user", "content": "What is the weather in Oslo, Bern and Rome today?"}
START = 1  # <|im_start|>


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, maker: ModuleType) -> Path:
    return model_with_template(tmp_path_factory.mktemp("prompt") / "model", maker, PRESERVING)


@pytest.fixture
def model(directory: Path):
    with flashmoe.Model(directory, threads=1) as model:
        yield model


def _make(model: flashmoe.Model, messages, **options) -> Prompt:
    return model._prompts.make(messages, **options)


def _text(model: flashmoe.Model, ids) -> str:
    return model.checkpoint.tokenizer.decode(ids)


def test_a_prompt_is_what_the_template_renders(model) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    prompt = _make(model, messages)
    assert prompt.text == model.render(messages)
    assert prompt.ids == model.tokenizer.encode(prompt.text, add_special_tokens=False).ids
    assert model.prompt_ids(messages) == prompt.ids
    assert model.prompt_ids(messages, think=False) != prompt.ids
    assert model.prompt_ids(messages, tools=TOOLS)[: len(prompt.ids)] != prompt.ids


def test_marks_are_where_a_later_prompt_may_part(model) -> None:
    def parts(messages, places_only=False, **options) -> list[str]:
        prompt = _make(model, messages, **options)
        positions = sorted(prompt.places) if places_only else prompt.marks
        assert all(prompt.ids[position] == START for position in positions)
        return [_text(model, prompt.ids[position:])[:24] for position in positions]

    system = {"role": "system", "content": "Be brief."}
    assert parts([USER]) == ["<|im_start|>assistant\n<t"]
    first = ["<|im_start|>user\nWhat is", "<|im_start|>assistant\n<t"]
    assert parts([system, USER]) == first
    answer = {"role": "assistant", "content": "It rains in Oslo, and in Bern and Rome it does not."}
    assert parts([system, USER, answer, USER]) == [first[0], first[0], first[1]]
    assert parts([system, USER, answer, USER], places_only=True) == first
    # A template may write what follows the latest query in another way when there is a new one.
    call = {"role": "assistant", "tool_calls": [{"name": "now", "arguments": {}}]}
    result = {"role": "tool", "content": "It is noon, and one o'clock in the afternoon in Bern."}
    within = [system, USER, call, result, call, result]
    asked, results = "<|im_start|>assistant\n", "<|im_start|>user\n<tool_r"
    assert parts(within, places_only=True) == [first[0], asked + "\n<"]
    assert parts(within) == [first[0], asked + "\n<", results, asked + "<t"]


def test_what_claude_code_writes_in_front_is_left_out(model) -> None:
    def ids(header: str) -> list[int]:
        content = [{"type": "text", "text": header}, {"type": "text", "text": "Be brief."}]
        return model.prompt_ids([{"role": "system", "content": content}, USER])

    plain = ids("")
    for sign in ("3a1", "b2f"):
        assert ids(f"x-anthropic-billing-header: cc_version=2.1.8; cch={sign};\n") == plain
    assert ids("Mind the x-anthropic-billing-header: cch=1;\n") != plain
    only = [{"role": "system", "content": "x-anthropic-billing-header: cch=1;"}, USER]
    assert model.prompt_ids(only) == model.prompt_ids([USER])


def test_reasoning_of_earlier_turns_stays_unless_the_caller_says_otherwise(model) -> None:
    answer = {"role": "assistant", "content": "Rain.", "reasoning_content": "Oslo in May."}
    messages = [USER, answer, USER]
    assert "Oslo in May." in _make(model, messages).text
    for given in (False, None):
        prompt = _make(model, messages, variables={"preserve_thinking": given})
        assert "Oslo in May." not in prompt.text


def _said(model: flashmoe.Model, messages, text: str, *, spelled: bool = False, **options):
    script = Scripted(model, text, spelled=spelled)
    chat = model.chat(messages, processors=[script], temperature=0, **options)
    return chat.answer, [*chat.prompt_ids, *script.ids]


def test_an_answer_is_read_as_it_was_drawn_and_with_its_reasoning(model) -> None:
    answer, ids = _said(model, [USER], "Oslo in May.\n</think>\n\nRain.  ", spelled=True)
    assert (answer.reasoning, answer.text.strip()) == ("Oslo in May.", "Rain.")
    for echo in (True, False):
        later = [USER, as_message(answer, reasoning=echo), USER]
        assert model.prompt_ids(later)[: len(ids)] == ids
    # Another answer is not ours.
    other = [USER, {"role": "assistant", "content": "Sun."}, USER]
    text = _text(model, model.prompt_ids(other))
    assert "Oslo in May." not in text and "Sun." in text
    # Nor is this one where something else was said before.
    later = [{"role": "system", "content": "Lie."}, *later]
    assert "Oslo in May." not in _text(model, model.prompt_ids(later))


def test_reasoning_that_the_template_drops_is_not_read(model) -> None:
    answer, _ = _said(model, [USER], "Oslo in May.\n</think>\n\nRain.")
    later = [USER, as_message(answer, reasoning=False), USER]
    dropped = model.prompt_ids(later, variables={"preserve_thinking": False})
    assert "Oslo in May." not in _text(model, dropped)


def test_calls_are_read_as_they_were_drawn(model) -> None:
    call = "<tool_call>\n<function=now>\n</function>\n</tool_call>"
    said = f"Hm.\n</think>\n\n{call}"
    answer, ids = _said(model, [USER], said, spelled=True, tools=TOOLS)
    assert [call.name for call in answer.tool_calls] == ["now"]
    later = [USER, as_message(answer, reasoning=False), {"role": "tool", "content": "noon"}]
    assert model.prompt_ids(later, tools=TOOLS)[: len(ids)] == ids


def test_an_answer_that_a_stop_string_cut_is_encoded_anew(model) -> None:
    answer, _ = _said(model, [USER], "</think>\n\nRain. END and more", stop="END")
    assert answer.text == "Rain. "
    later = model.prompt_ids([USER, as_message(answer, reasoning=False), USER])
    assert "END" not in _text(model, later)


def test_the_last_message_is_continued(model) -> None:
    begun = {"role": "assistant", "content": "It rains in "}
    prompt = model.prompt_ids([USER, begun], continue_final=True)
    assert _text(model, prompt).endswith("<|im_start|>assistant\nIt rains in")
    answer, ids = _said(model, [USER, begun], " Oslo.", continue_final=True)
    assert answer.text == " Oslo."
    whole = [USER, {"role": "assistant", "content": "It rains in Oslo."}, USER]
    assert model.prompt_ids(whole)[: len(ids)] == ids
    for last in (USER, {"role": "assistant", "content": " "}):
        with pytest.raises(flashmoe.ArgumentError, match="to continue a message"):
            model.prompt_ids([USER, last], continue_final=True)


def test_a_saved_state_goes_on_in_another_process(model, directory, tmp_path) -> None:
    state = model.new_state()
    script = Scripted(model, "Oslo in May.\n</think>\n\nRain.", spelled=True)
    chat = model.chat([USER], processors=[script], temperature=0, state=state)
    messages = [USER, as_message(chat.answer, reasoning=True), USER]
    state.save(tmp_path / "talk.state")
    with flashmoe.Model(directory, threads=1) as other:  # remembers nothing
        loaded = flashmoe.State.load(other, tmp_path / "talk.state")
        chat = other.chat(messages, max_tokens=2, temperature=0, state=loaded)
        answer = chat.answer
        assert answer.cached_tokens == state.position - 1
        assert chat.prompt_ids[: state.position] == list(state.tokens)
        assert loaded.tokens[:-2] == tuple(chat.prompt_ids)
