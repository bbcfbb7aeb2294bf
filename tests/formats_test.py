"""Formats: what every one is read as, under its own and under other names, and what wrong ones are told."""

import json

import pytest

from lora_jax.data import formats
from lora_jax.data.files import Record
from lora_jax.data.kinds import Example, Feedback, Pair, Task

USER, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM, WORSE = {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]
# what a record says: as what, its format's name, its columns, and what is to be read
CASES = {
    "chat": (Example, "chats", {"messages": [SYSTEM, USER, SAID]}, {"messages": [SYSTEM, USER, SAID]}),
    "tools": (
        Example,
        "chats",
        {"messages": [USER, CALL, {"role": "tool", "content": "3", "name": "f"}, SAID], "tools": TOOLS},
        {"messages": [USER, CALL, {"role": "tool", "content": "3", "name": "f"}, SAID], "tools": TOOLS},
    ),
    "tools as text": (
        Example,
        "chats",
        {"messages": [USER, SAID], "tools": json.dumps(TOOLS)},
        {"messages": [USER, SAID], "tools": TOOLS},
    ),
    "prompt": (Example, "prompts and completions", {"prompt": "q", "completion": "a"}, {"messages": [USER, SAID]}),
    "turns": (
        Example,
        "prompts and completions",
        {"prompt": [SYSTEM, USER], "completion": [SAID]},
        {"messages": [SYSTEM, USER, SAID]},
    ),
    "alpaca": (
        Example,
        "Alpaca instructions",
        {"instruction": "add", "input": "1 2", "output": "a"},
        {"messages": [{"role": "user", "content": "add\n\n1 2"}, SAID]},
    ),
    "alpaca alone": (
        Example,
        "Alpaca instructions",
        {"instruction": "q", "input": "", "output": "a", "system": "s"},
        {"messages": [SYSTEM, USER, SAID]},
    ),
    "sharegpt": (
        Example,
        "ShareGPT conversations",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
        {"messages": [SYSTEM, USER, SAID]},
    ),
    "text": (Example, "texts", {"text": "t"}, {"messages": [], "text": "t"}),
    "task, to imitate": (Example, "tasks", {"prompt": "q", "answer": "a"}, {"messages": [USER, SAID]}),
    "task": (Task, "tasks", {"prompt": "q", "answer": 3}, {"messages": [USER], "answer": "3"}),
    "pair": (
        Pair,
        "preference pairs",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [SAID], "rejected": [WORSE]},
    ),
    "pair that shares its prompt": (
        Pair,
        "preference pairs",
        {"chosen": [SYSTEM, USER, SAID], "rejected": [SYSTEM, USER, WORSE]},
        {"prompt": [SYSTEM, USER], "chosen": [SAID], "rejected": [WORSE]},
    ),
    "pair that says its prompt again": (
        Pair,
        "preference pairs",
        {"prompt": [USER], "chosen": [USER, SAID], "rejected": [USER, WORSE]},
        {"prompt": [USER], "chosen": [SAID], "rejected": [WORSE]},
    ),
    "feedback": (
        Feedback,
        "judged answers",
        {"prompt": "q", "completion": "a", "label": True},
        {"messages": [USER, SAID], "good": True},
    ),
    "feedback from CSV": (
        Feedback,
        "judged answers",
        {"prompt": "q", "completion": "a", "label": "False"},
        {"messages": [USER, SAID], "good": False},
    ),
    "feedback on a chat": (
        Feedback,
        "judged answers",
        {"messages": [USER, SAID], "label": 0},
        {"messages": [USER, SAID], "good": False},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_format_is_recognised_by_its_columns(case):
    kind, format, values, expected = CASES[case]
    read = formats.read(Record("x:1", values), kind)
    assert type(read) is kind and read.format == format and read.name == "x:1"
    assert {name: getattr(read, name) for name in expected} == expected


@pytest.mark.parametrize("case", CASES)
def test_columns_of_other_names(case):
    kind, _, values, expected = CASES[case]
    renamed = Record("x:1", {f"my {column}": value for column, value in values.items()})
    read = formats.read(renamed, kind, {column: f"my {column}" for column in values})
    assert {name: getattr(read, name) for name in expected} == expected
    with pytest.raises(ValueError, match=r"x:1: no text '\w+'.*; it has 'my "):
        formats.read(renamed, kind)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            Example,
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "preference pairs, not chats; it has 'prompt', ",
        ),
        (Pair, {"prompt": "q", "completion": "a"}, "chats, not preference pairs"),
        (Example, {}, "no text 'prompt' .*; it has nothing"),
        (Example, {"prompt": 1, "completion": "a"}, "no text 'prompt' but a int"),
        (Example, {"text": ["a"]}, "no text 'text' but a list"),
        (Example, {"instruction": "a", "output": "b", "input": 3}, "no text 'input' but a int"),
        (Example, {"messages": "hi"}, "'messages' must be a list"),
        (Example, {"messages": [USER], "tools": "{"}, "'tools' is not JSON"),
        (Example, {"messages": [USER], "tools": ["f"]}, "'tools' must be a list of JSON schemas"),
        (Example, {"messages": [{"role": "assistant", "content": None}]}, "message 1 has no text 'content'"),
        (Example, {"conversations": [{"from": "alien", "value": "x"}]}, "message 1 is from 'alien'"),
        (Pair, {"prompt": "q", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are the same"),
        (Pair, {"chosen": "a", "rejected": "b"}, "no prompt: neither 'prompt' nor messages"),
        (Pair, {"chosen": [USER], "rejected": [USER, SAID]}, "no prompt"),
        (Pair, {"prompt": [USER], "chosen": [SAID], "rejected": [USER]}, "'rejected' ends with 'user'"),
        (Feedback, {"prompt": "q", "completion": "a", "label": "good"}, "'label' is 'good', neither true nor false"),
        (Feedback, {"messages": [USER], "label": True}, "the last message, which is judged, is from 'user'"),
        (Task, {"prompt": "q", "answer": ["a"]}, "'answer' is neither a text nor a number but a list"),
    ],
)
def test_wrong_records_are_named(kind, values, message):
    with pytest.raises(ValueError, match=f"^x:7: .*{message}"):
        formats.read(Record("x:7", values), kind)


def test_the_fields_that_parquet_adds_to_a_message_are_dropped():
    message = {"role": "user", "content": "q", "tool_calls": None, "name": None}
    assert formats.read(Record("x", {"messages": [message, SAID], "tools": None})).messages == [USER, SAID]


def test_both_sides_of_a_pair_are_chats():
    pair = formats.read(Record("x:1", {"prompt": "q", "chosen": "a", "rejected": "b"}), Pair)
    chosen, rejected = pair.sides
    assert (chosen.messages, rejected.messages) == ([USER, SAID], [USER, WORSE])
    assert chosen.question == rejected.question == pair.question


def test_the_exercises_in_a_chat_are_all_its_turns():
    again = {"role": "user", "content": "and then?"}
    short = Example("x", [USER, SAID])
    long = Example("x", [USER, SAID, again, WORSE])
    assert short.questions == {short.question} < long.questions
    assert len(long.questions) == 2 and long.question not in short.questions
