"""Generated dialogues, from a seed: JSON after a schema, tool calls, and questions on the corpus.

    python synthetic.py WORK

reads WORK/corpus.jsonl and writes WORK/dialogues.jsonl (split, kind, text) and WORK/prompts.jsonl
(held-out prompts for `flashmoe eval`: messages, tools, and the schema or the call that is right).
Everything is rendered through the tokenizer's own chat template.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jinja2

HERE = Path(__file__).parent
Json = Any

FIRST = (
    "Ada Amir Anna Asha Bruno Carla Chen Clara Daniel Diego Elena Emma Farid Fatima Felix Grace "
    "Hana Hugo Ines Ivan Jonas Julia Karim Laila Leo Lucas Maria Marta Mei Mina Nadia Noah Nora "
    "Olga Omar Oscar Paul Petra Priya Rosa Ruth Samir Sara Simon Sofia Tariq Theo Vera Yuki Zoe"
).split()
LAST = (
    "Abebe Adams Andersson Baker Bauer Becker Bianchi Brown Castro Chowdhury Costa Diaz Dubois "
    "Evans Fischer Garcia Haddad Hansen Hughes Ito Jensen Khan Kim Kowalski Larsen Lopez Meyer "
    "Moreau Murphy Nakamura Nguyen Novak Okafor Olsen Patel Pereira Rossi Sato Schmidt Silva "
    "Singh Smith Tanaka Taylor Torres Walker Weber Wilson Yilmaz Young"
).split()
CITIES = (
    "Accra Amsterdam Ankara Athens Bergen Berlin Bogota Boston Brussels Cairo Chicago Cork Dakar "
    "Delhi Denver Dublin Geneva Hamburg Hanoi Helsinki Istanbul Jakarta Kyoto Lagos Lima Lisbon "
    "London Madrid Manila Milan Montreal Mumbai Munich Nairobi Naples Oslo Paris Porto Prague Quito "
    "Rome Seattle Seoul Seville Sofia Stockholm Sydney Tokyo Toronto Turin Utrecht Vienna Warsaw"
).split()
WORDS = (
    "amber anchor apple arrow autumn basket beacon bridge candle canvas carbon castle cedar chapter "
    "cloud cobalt copper coral cotton crystal desert dragon echo ember falcon feather field forest "
    "garden glacier granite harbor hazel honey island ivory jasmine kettle ladder lantern lemon "
    "library linen marble meadow mirror mountain needle ocean olive orchard paper pebble pepper "
    "planet pocket quartz rabbit river saddle salmon shadow silver spring stone summer sunset "
    "thunder timber tunnel valley velvet violet walnut water willow window winter wooden yellow"
).split()
PRODUCTS = (
    "bicycle blanket camera chair clock coat desk drill fan guitar headphones helmet jacket kettle "
    "keyboard lamp mug notebook oven pan phone piano printer radio router scarf shelf shoes sofa "
    "speaker table tablet tent toaster umbrella vase wallet watch"
).split()
COLOURS = "black blue brown green grey orange pink purple red white yellow".split()
MONTHS = (
    "January February March April May June July August September October November December"
).split()
LANGUAGES = "Arabic Dutch English French German Greek Hindi Italian Japanese Polish Spanish".split()

ENVIRONMENT = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
TEMPLATE = ENVIRONMENT.from_string((HERE / "tokenizer/chat_template.jinja").read_text())


def date(r: random.Random) -> str:
    return f"20{r.randint(10, 29)}-{r.randint(1, 12):02}-{r.randint(1, 28):02}"


def clock(r: random.Random) -> str:
    return f"{r.randint(0, 23):02}:{r.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02}"


def person(r: random.Random) -> str:
    return f"{r.choice(FIRST)} {r.choice(LAST)}"


def title(r: random.Random) -> str:
    return f"{r.choice(WORDS)} {r.choice(WORDS)}".title()


def several(make: Callable[[random.Random], Json]) -> Callable[[random.Random], list[Json]]:
    return lambda r: [make(r) for _ in range(r.randint(1, 4))]


# A field: its name, its schema, how to make a value, and the sentence that states the value.
Field = tuple[str, Json, Callable[[random.Random], Json], str]
STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
BOOLEAN, STRINGS = {"type": "boolean"}, {"type": "array", "items": {"type": "string"}}
FIELDS: list[Field] = [
    ("name", STRING, person, "The name is {}."),
    ("age", INTEGER, lambda r: r.randint(18, 90), "The age is {}."),
    ("city", STRING, lambda r: r.choice(CITIES), "The city is {}."),
    ("email", STRING, lambda r: f"{r.choice(FIRST).lower()}@{r.choice(WORDS)}.example",
     "Mail goes to {}."),
    ("title", STRING, title, 'It is called "{}".'),
    ("author", STRING, person, "It was written by {}."),
    ("year", INTEGER, lambda r: r.randint(1850, 2029), "The year was {}."),
    ("pages", INTEGER, lambda r: r.randint(40, 900), "It has {} pages."),
    ("price", NUMBER, lambda r: round(r.uniform(1, 900), 2), "It costs {} euros."),
    ("quantity", INTEGER, lambda r: r.randint(1, 60), "The quantity is {}."),
    ("product", STRING, lambda r: r.choice(PRODUCTS), "The product is a {}."),
    ("colour", {"type": "string", "enum": COLOURS}, lambda r: r.choice(COLOURS), "It is {}."),
    ("in_stock", BOOLEAN, lambda r: r.random() < 0.5, "In stock: {}."),
    ("date", STRING, date, "The date is {}."),
    ("time", STRING, clock, "It begins at {}."),
    ("duration_minutes", INTEGER, lambda r: r.randrange(5, 300, 5), "It takes {} minutes."),
    ("rating", NUMBER, lambda r: r.randint(2, 10) / 2, "The rating is {}."),
    ("language", STRING, lambda r: r.choice(LANGUAGES), "The language is {}."),
    ("tags", STRINGS, several(lambda r: r.choice(WORDS)), "The tags are {}."),
    ("members", STRINGS, several(person), "The members are {}."),
    ("stops", STRINGS, several(lambda r: r.choice(CITIES)), "The stops are {}."),
    ("temperature", NUMBER, lambda r: round(r.uniform(-20, 40), 1), "It is {} degrees."),
    ("humidity", INTEGER, lambda r: r.randint(5, 100), "The humidity is {} percent."),
    ("urgent", BOOLEAN, lambda r: r.random() < 0.5, "Urgent: {}."),
    ("priority", {"type": "string", "enum": ["low", "medium", "high"]},
     lambda r: r.choice(("low", "medium", "high")), "The priority is {}."),
    ("scores", {"type": "array", "items": INTEGER}, several(lambda r: r.randint(0, 100)),
     "The scores are {}."),
    ("month", STRING, lambda r: r.choice(MONTHS), "The month is {}."),
    ("weight_kg", NUMBER, lambda r: round(r.uniform(0.1, 120), 1), "It weighs {} kilograms."),
    ("room", INTEGER, lambda r: r.randint(1, 480), "The room is {}."),
    ("notes", STRING, lambda r: f"{r.choice(WORDS)} and {r.choice(WORDS)}", 'The note says "{}".'),
]  # fmt: skip
NESTED = "address owner details event item location order contact book report".split()


def schema_of(fields: list[Field]) -> Json:
    properties = {name: schema for name, schema, _, _ in fields}
    return {"type": "object", "properties": properties, "required": list(properties)}


def spoken(value: Json) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return (
            " and ".join(map(spoken, value))
            if len(value) < 3
            else (", ".join(map(spoken, value[:-1])) + " and " + spoken(value[-1]))
        )
    return str(value)


def json_dialogue(r: random.Random) -> Json:
    """A JSON document that follows the schema in the prompt, from stated or invented values."""
    fields = r.sample(FIELDS, r.randint(2, 6))
    schema = schema_of(fields)
    value = {name: make(r) for name, _, make, _ in fields}
    facts = [say.format(spoken(value[name])) for name, _, _, say in fields]
    if r.random() < 0.3:
        inner = r.sample([f for f in FIELDS if f not in fields], r.randint(2, 3))
        name = r.choice(NESTED)
        schema["properties"][name] = schema_of(inner)
        schema["required"].append(name)
        value[name] = {key: make(r) for key, _, make, _ in inner}
        stated = [say.format(spoken(value[name][key])) for key, _, _, say in inner]
        facts.append(f"About the {name}: " + " ".join(stated))
    ask = r.choice((
        "Answer with a JSON object that follows this schema:",
        "Write JSON for this schema:",
        "Return only JSON that matches this schema:",
        "Fill in this JSON schema:",
    ))  # fmt: skip
    prompt = f"{ask}\n{json.dumps(schema)}"
    stated_facts = r.random() < 0.7
    if stated_facts:
        prompt += "\n\n" + " ".join(facts)
    answer = json.dumps(value, indent=2, ensure_ascii=False)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {
        "kind": "json", "messages": messages, "tools": None,
        "schema": schema, "value": value if stated_facts else None,
    }  # fmt: skip


# A tool: name, description, parameters, requests (with the parameters' names in braces), and
# the answer that is given from the result.
Tool = tuple[str, str, dict[str, tuple[Json, Callable[[random.Random], Json]]], list[str], str]
TOOLS: list[Tool] = [
    ("get_weather", "Get the current weather in a city.",
     {"city": (STRING, lambda r: r.choice(CITIES))},
     ["What is the weather like in {city}?", "Is it warm in {city} today?", "Weather in {city}"],
     "It is {temperature} degrees in {city}."),
    ("get_time", "Get the local time in a city.",
     {"city": (STRING, lambda r: r.choice(CITIES))},
     ["What time is it in {city}?", "Tell me the time in {city}."], "It is {time} in {city}."),
    ("send_email", "Send an e-mail.",
     {"to": (STRING, FIELDS[3][2]), "subject": (STRING, title)},
     ['Send a mail to {to} with the subject "{subject}".', 'Write to {to} about "{subject}".'],
     "I have sent the mail to {to}."),
    ("create_event", "Put an event into the calendar.",
     {"title": (STRING, title), "date": (STRING, date), "time": (STRING, clock)},
     ['Put "{title}" into my calendar on {date} at {time}.', 'Plan "{title}" for {date}, {time}.'],
     'I have put "{title}" into your calendar.'),
    ("convert_currency", "Convert an amount of money.",
     {"amount": (NUMBER, lambda r: r.randint(1, 5000)),
      "from": (STRING, lambda r: r.choice(("EUR", "USD", "GBP", "JPY"))),
      "to": (STRING, lambda r: r.choice(("CHF", "SEK", "INR", "BRL")))},
     ["How much is {amount} {from} in {to}?", "Convert {amount} {from} to {to}."],
     "{amount} {from} is {number} {to}."),
    ("search_books", "Search the library for books by an author.",
     {"author": (STRING, person)},
     ["Which books by {author} do you have?", "Find books by {author}."],
     "There are {number} books by {author}."),
    ("set_timer", "Start a timer.", {"minutes": (INTEGER, lambda r: r.randint(1, 120))},
     ["Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."],
     "The timer is set to {minutes} minutes."),
    ("order_product", "Order a product from the shop.",
     {"product": (STRING, lambda r: r.choice(PRODUCTS)),
      "quantity": (INTEGER, lambda r: r.randint(1, 9)),
      "colour": (STRING, lambda r: r.choice(COLOURS))},
     ["Order {quantity} of the {product} in {colour}.", "I want {quantity} {colour} {product}."],
     "I have ordered {quantity} of the {product} in {colour}."),
    ("find_route", "Find a route between two cities, with stops.",
     {"start": (STRING, lambda r: r.choice(CITIES)), "stops": (STRINGS, FIELDS[20][2]),
      "end": (STRING, lambda r: r.choice(CITIES))},
     ["Find a route from {start} to {end} with stops in {stops}.",
      "How do I get from {start} to {end} by way of {stops}?"],
     "The route from {start} to {end} takes {number} hours."),
    ("translate", "Translate a text.",
     {"text": (STRING, lambda r: f"the {r.choice(WORDS)} {r.choice(WORDS)}"),
      "language": (STRING, lambda r: r.choice(LANGUAGES))},
     ['Translate "{text}" into {language}.', 'What is "{text}" in {language}?'],
     'I have translated "{text}" into {language}.'),
    ("book_table", "Book a table in a restaurant.",
     {"restaurant": (STRING, title), "people": (INTEGER, lambda r: r.randint(1, 12)),
      "time": (STRING, clock)},
     ["Book a table for {people} people at {restaurant} at {time}.",
      "I need a table at {restaurant} for {people}, {time}."],
     "The table for {people} at {restaurant} is booked."),
    ("lights", "Switch the lights of a room on or off.",
     {"room": (INTEGER, lambda r: r.randint(1, 480)), "on": (BOOLEAN, FIELDS[12][2])},
     ["Lights in room {room}, on: {on}.", "Set the lights of room {room}; on: {on}."],
     "Done for room {room}."),
    ("tag_note", "Add tags to a note.",
     {"note": (STRING, title), "tags": (STRINGS, FIELDS[18][2])},
     ['Tag the note "{note}" with {tags}.', 'Add {tags} to the tags of "{note}".'],
     'I have tagged "{note}".'),
]  # fmt: skip


def describe(tool: Tool) -> Json:
    name, description, parameters, _, _ = tool
    properties = {key: schema for key, (schema, _) in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function",
            "function": {"name": name, "description": description, "parameters": schema}}  # fmt: skip


def tool_dialogue(r: random.Random) -> Json:
    offered = r.sample(TOOLS, r.randint(1, 4))
    tool = r.choice(offered)
    name, _, parameters, requests, reply = tool
    arguments = {key: make(r) for key, (_, make) in parameters.items()}
    said = {key: spoken(value) for key, value in arguments.items()}
    result = {"temperature": r.randint(-10, 38), "time": clock(r), "number": r.randint(2, 900)}
    wanted = [key for key in result if "{" + key + "}" in reply and key not in arguments]
    shown = {key: result[key] for key in wanted} or {"status": "ok"}
    messages = [
        {"role": "user", "content": r.choice(requests).format(**said)},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"name": name, "arguments": arguments}],
        },
        {"role": "tool", "content": json.dumps(shown)},
        {"role": "assistant", "content": reply.format(**{**result, **said})},
    ]
    call = {"name": name, "arguments": arguments}
    return {"kind": "tool", "messages": messages, "tools": list(map(describe, offered)),
            "call": call}  # fmt: skip


ABOUT = [
    (("Who are you?", "What are you?", "What is your name?", "Hello!", "Hi", "Hello, who are you?"),
     "I am a very small language model that comes with Flash-MoE. I was trained on free manuals, old "
     "books and generated data, so that you can see how the engine runs. I know little, and I am "
     "often wrong."),
    (("What can you do?", "How can you help me?", "What are you good at?"),
     "I can write a few sentences of English, fill in JSON that follows a schema, and call a tool. "
     "I am only a demonstration, so please do not rely on what I say."),
    (("What is a mixture of experts?", "Explain mixture of experts.", "What is an MoE model?",
      "How does a mixture of experts work?"),
     "A mixture of experts is a neural network whose feed-forward layers are divided into many small "
     "parts, called experts. For every token a router chooses a few experts, and only those are "
     "computed. The model can therefore hold much knowledge and still be fast, because most of its "
     "weights are not needed for any one token."),
    (("What is Flash-MoE?", "Tell me about Flash-MoE.", "What does Flash-MoE do?"),
     "Flash-MoE is a program that runs mixture-of-experts language models which are larger than the "
     "memory of the computer. The experts stay on the disk, and only those that a token needs are "
     "read. The operating system keeps the ones that are used often in its page cache."),
    (("Thank you.", "Thanks!", "Thank you very much."), "You are welcome."),
    (("Goodbye.", "Bye!"), "Goodbye, and good luck."),
]  # fmt: skip


def about_dialogue(r: random.Random) -> Json:
    questions, answer = r.choice(ABOUT)
    messages = [{"role": "user", "content": r.choice(questions)},
                {"role": "assistant", "content": answer}]  # fmt: skip
    return {"kind": "about", "messages": messages, "tools": None}


def corpus_dialogues(work: Path, r: random.Random) -> Iterator[tuple[str, Json]]:
    """Questions that a document of the corpus answers: its headings and its openings."""
    ask = ("Tell me about {}.", "Explain {}.", "What is {}?", "Write about {}.", "{}",
           "Can you explain {}?", "What do you know about {}?")  # fmt: skip
    for line in (work / "corpus.jsonl").open():
        document = json.loads(line)
        paragraphs = document["text"].split("\n\n")
        if document["kind"] == "manual":
            for heading, body, *more in zip(
                paragraphs, paragraphs[1:], [*paragraphs[2:], "# "], strict=False
            ):
                if not heading.startswith("# ") or body.startswith("# ") or len(body) < 120:
                    continue
                if r.random() < 0.5 or re.search(r"[\d()_/.]", heading):
                    continue
                question = r.choice(ask).format(heading[2:])
                answer = body if more[0].startswith("# ") else f"{body}\n\n{more[0]}"
                if len(answer) < 1200:
                    yield document["split"], {"kind": "question", "tools": None, "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer}]}  # fmt: skip
        elif len(paragraphs) > 3:
            at = r.randrange(len(paragraphs) - 2)
            opening = re.split(r"(?<=[.!?]) ", paragraphs[at])[0].removeprefix("# ")
            rest = paragraphs[at].removeprefix("# ")[len(opening) :].strip()
            answer = f"{rest}\n\n{paragraphs[at + 1]}".strip()
            if len(answer) < 1600:
                verb = r.choice(("Continue", "Go on from here", "Continue the story"))
                yield document["split"], {"kind": "story", "tools": None, "messages": [
                    {"role": "user", "content": f"{verb}: {opening}"},
                    {"role": "assistant", "content": answer}]}  # fmt: skip


def render(dialogue: Json) -> str:
    return TEMPLATE.render(messages=dialogue["messages"], tools=dialogue["tools"])


def main(work: Path, count: int = 16000) -> None:
    r = random.Random(0)
    dialogues: list[tuple[str, Json]] = list(corpus_dialogues(work, r))
    seen = set()
    prompts: list[Json] = []
    for make, number in ((json_dialogue, count), (tool_dialogue, count), (about_dialogue, 600)):
        for i in range(number):
            dialogue = make(r)
            text = render(dialogue)
            held = number == count and i < 400
            if held and text in seen:
                continue
            seen.add(text)
            if held and i < 200:
                asked = dialogue["messages"][:1]
                prompts.append({**dialogue, "messages": asked})
            dialogues.append(("train" if not held else "heldout" if i < 200 else "valid", dialogue))
    r.shuffle(dialogues)
    with (work / "dialogues.jsonl").open("w") as out:
        for split, dialogue in dialogues:
            line = {"split": split, "kind": dialogue["kind"], "text": render(dialogue)}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    with (work / "prompts.jsonl").open("w") as out:
        out.writelines(json.dumps(p, ensure_ascii=False) + "\n" for p in prompts)
    print(f"{len(dialogues)} dialogues, {len(prompts)} held-out prompts")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
