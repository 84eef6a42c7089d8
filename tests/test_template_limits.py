"""A chat template comes from whoever made the checkpoint: it computes a text, and not for ever."""

import json
import time
from pathlib import Path

import jinja2
import pytest

import flashmoe
from flashmoe.checkpoint.template import ChatTemplate
from flashmoe.machine.probe import peak_memory

TEMPLATES = Path(__file__).parents[2] / "shared/templates"


def render(text: str, **variables: object) -> str:
    template = ChatTemplate(text, Path("t.jinja"))
    return template.render([{"role": "user", "content": "x"}], **variables)


NAMESPACE = "{% set n = namespace(s='x' * 1000, l=[1]) %}"
TOO_MUCH = {
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a long text of 23 bytes": "{{ 'x' * 1700000000 }}",
    "a long text, turned round": "{{ 1700000000 * 'x' }}",
    "a long list": "{{ [0] * 100000000 }}",
    "a list in a list": "{{ ['x' * 1000] * 100000 }}",
    "a shift by powers": "{{ 2 ** 64 * 2 }}",
    "a factor": "{{ 4611686018427387904 * 4611686018427387904 }}",
    "a number of 70 bits": "{{ 999999999999999999999 }}",
    "a number from text": "{{ ('9' * 400)|int }}",
    "a number from a fraction": "{{ (10.0 ** 300)|int }}",
    "a text that doubles": NAMESPACE
    + "{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "a text that doubles by +": NAMESPACE
    + "{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a list that doubles": NAMESPACE
    + "{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l }}",
    "a tuple that doubles": NAMESPACE
    + "{% for i in range(60) %}{% set n.l = (n.l, n.l) %}{% endfor %}{{ n.l }}",
    "a dict that doubles": NAMESPACE
    + "{% for i in range(60) %}{% set n.l = {1: n.l, 2: n.l} %}{% endfor %}{{ n.l }}",
    "a dict of calls that doubles": NAMESPACE
    + "{% for i in range(60) %}{% set n.l = dict(a=n.l, b=n.l) %}{% endfor %}{{ n.l }}",
    "namespaces that double": NAMESPACE
    + "{% for i in range(60) %}{% set n.l = namespace(a=n.l, b=n.l) %}{% endfor %}{{ n.l }}",
    "loops in loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}"
    "{% endfor %}",
    "an endless iterator": "{% for i in endless %}{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(60) }}",
    "a recursive loop": "{% for i in [1, 1] recursive %}{{ loop([1, 1]) if loop.depth < 60 }}"
    "{% endfor %}",
    "filters in a loop": "{% for i in range(100000) %}{{ range(100000)|list|length }}{% endfor %}",
    "a map in a loop": "{% for i in range(100000) %}{{ range(100000)|map('string')|join|length }}"
    "{% endfor %}",
    "output in a loop": "{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}",
    "output in a block": "{% set s %}{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}"
    "{% endset %}",
    "texts in a block": "{% set s %}{% for i in range(100000) %}{{ 'x' * 16000000 }}{% endfor %}"
    "{% endset %}",
    "a centred text": "{{ 'x'|center(1700000000) }}",
    "a centred text by method": "{{ 'x'.center(1700000000) }}",
    "a method under another name": "{% set f = 'x'.ljust %}{{ f(1700000000) }}",
    "zeros": "{{ 'x'.zfill(1700000000) }}",
    "tabs": "{{ '\t'.expandtabs(1700000000) }}",
    "tabs of a long text": "{{ ('\t' * 1000000).expandtabs(9000) }}",
    "indentation": "{{ ('\n' * 1000000)|indent(9000) }}",
    "indentation by text": "{{ ('\n' * 1000000)|indent('x' * 9000) }}",
    "a replacement": "{{ ('x' * 100000)|replace('x', 'y' * 100000) }}",
    "a replacement of gaps": "{{ ('x' * 100000)|replace('', 'y' * 100000) }}",
    "a replacement by name": "{{ ('x' * 100000)|replace(new='y' * 100000, old='x') }}",
    "a replacement by method": "{{ ('x' * 100000).replace('x', 'y' * 100000) }}",
    "a join": "{{ range(100000)|join('x' * 100000) }}",
    "a join by name": "{{ range(100000)|join(d='x' * 100000) }}",
    "a join by method": "{{ ('x' * 100000).join('y' * 100000) }}",
    "a width in %": "{{ '%1700000000d' % 1 }}",
    "a width of % in its arguments": "{{ '%*d' % (1700000000, 1) }}",
    "a width in format": "{{ '{:>1700000000}'.format(1) }}",
    "a width of format in its arguments": "{{ '{:{}}'.format(1, 1700000000) }}",
    "a width in format_map": "{{ '{a:>1700000000}'.format_map({'a': 1}) }}",
    "a width in the filter": "{{ '%1700000000d'|format(1) }}",
    "a translation": "{{ ('x' * 100000).translate({120: 'y' * 100000}) }}",
    "bytes of a number": "{{ (1).to_bytes(1700000000, 'big') }}",
    "bytes that are centred": "{{ 'x'.encode().center(1700000000) }}",
    "a batch": "{{ [1]|batch(1700000000, 'x')|list }}",
    "slices": "{{ [1]|slice(1700000000)|list }}",
    "a precision": "{{ 1.5|round(1700000000, 'floor') }}",
    "an indented json": "{{ [[[[1]]]]|tojson(indent=1700000000) }}",
    "a longer template than any": "x" * 3_000_000,
}


@pytest.mark.parametrize("text", TOO_MUCH.values(), ids=TOO_MUCH)
def test_a_template_that_does_too_much_is_stopped(text) -> None:
    began, before = time.process_time(), peak_memory()
    with pytest.raises(flashmoe.CheckpointError, match=r"t\.jinja: the chat template does too mu"):
        render(text, endless=iter(int, 1))
    assert time.process_time() - began < 15
    assert peak_memory() - before < 300e6


LAWFUL = {
    "{{ 2 ** 62 }}": str(2**62),
    "{{ 'ab' * 3 }}": "ababab",
    "{{ 7 // 2 }} {{ -7 % 3 }} {{ 7 / 2 }}": "3 2 3.5",
    "{{ '%s is %d' % ('a', 3) }}": "a is 3",
    "{{ '{} and {:>4}'.format('a', 3) }}": "a and    3",
    "{{ [1, 'a', {'b': (1, 2)}]|tojson }}": '[1, "a", {"b": [1, 2]}]',
    "{{ {'b': 1}|tojson(indent=2) }}": '{\n  "b": 1\n}',
    "{% for i in range(3) %}{{ loop.index }}{{ loop.last }} {% endfor %}": "1False 2False 3True ",
    "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}": "a1",
    "{% for i in nothing %}x{% else %}none{% endfor %}": "none",
    "{{ 'a,b'.split(',')|join('-') }}": "a-b",
    "{{ 'a-b'.replace('-', '+')|upper }}": "A+B",
    "{{ ' a '|trim ~ 1 ~ none }}": "a1None",
    "{{ [3, 1, 2]|sort|map('string')|join(' ') }}": "1 2 3",
    "{{ ['a', 'b']|join(d=', ') }}": "a, b",
    "{% set n = namespace(x=1) %}{% for i in range(4) %}{% set n.x = n.x + i %}{% endfor %}"
    "{{ n.x }}": "7",
    "{% macro m(a) %}<{{ a }}>{% endmacro %}{{ m(1) }}{{ m('b') }}": "<1><b>",
    "{{ messages[::-1][0].role }} {{ messages|length }}": "user 1",
    "{% set s %}a{{ 1 }}{% endset %}{{ s }}": "a1",
    "{{ 'a\nb'|indent }}": "a\n    b",
    "{{ undefined is defined }} {{ undefined }}": "False ",
    "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}": "01",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}": "1",
    "{{ 'x'.center(5) }}|{{ 'x'|center(5) }}": "  x  |  x  ",
}


@pytest.mark.parametrize(("text", "expected"), LAWFUL.items())
def test_what_templates_do_is_what_jinja_does(text, expected) -> None:
    assert render(text) == expected


@pytest.mark.skipif(not TEMPLATES.is_dir(), reason="published templates are not beside this")
@pytest.mark.parametrize("name", ["qwen3.5", "qwen3.6", "qwen3.8"])
def test_a_published_template_gives_what_plain_jinja_gives(name) -> None:
    text = (TEMPLATES / f"{name}.jinja").read_text()
    call = {"function": {"name": "f", "arguments": {"a": [1, {"b": "x"}]}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "<think>hm</think>so", "tool_calls": [call]},
        {"role": "tool", "content": "sunny"},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    template = ChatTemplate(text, Path("t.jinja"))
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    plain = environment.from_string(text)
    given = {"messages": messages, "tools": tools, "add_generation_prompt": True}
    assert template.render(messages, tools=tools) == plain.render(given)


DAMAGED = {
    "break outside of a loop": "{% break %}",
    "21 nested loops": "{% for i in [1] %}" * 21 + "{% endfor %}" * 21,
    "100 nested conditions": "{% if 1 %}" * 100 + "{% endif %}" * 100,
    "deep parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "a long chain": "{{ a" + ".b" * 50_000 + " }}",
    "a long sum": "{{ 1" + " + 1" * 50_000 + " }}",
    "5000 digits": "{{ " + "9" * 5000 + " }}",
    "not Jinja": "{% if %}",
    "an unknown filter": "{{ 1|nonsense }}",
    "another file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_template_is_an_error_that_names_it(text) -> None:
    with pytest.raises(flashmoe.FlashMoeError, match=r"t\.jinja"):
        render(text)


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ('{0.__init__.__globals__[os].environ}'|attr('format'))(cycler) }}",
    "{{ '{0.__init__.__globals__}'.format(cycler) }}",
    "{% set f = '{0.__init__.__globals__}'.format %}{{ f(cycler) }}",
    "{{ range.__self__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
]


@pytest.mark.parametrize("text", ESCAPES)
def test_a_template_does_not_reach_python(text) -> None:
    try:
        out = render(text)
    except flashmoe.FlashMoeError:
        return
    assert "environ" not in out and "__builtins__" not in out and "object" not in out


def test_jinja_is_required_from_the_release_that_closed_its_sandbox() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '"jinja2>=3.1.6"' in text
