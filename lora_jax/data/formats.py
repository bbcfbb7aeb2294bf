"""What a record says: a chat, a text, a preference, a judgement or a task, whatever its columns are called.

Which columns a record has tells its format. `COLUMNS` are the names that are looked for; a source that calls them
otherwise is read with a mapping from these names to its own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax.data.files import Record
from lora_jax.data.kinds import Asked, Choice, Example, Feedback, Message, Pair, Task

COLUMNS = (
    *("messages", "tools", "conversations", "system", "prompt", "completion"),
    *("instruction", "input", "output", "text", "chosen", "rejected", "label", "choices", "answer", "id"),
)
SHAREGPT = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
ROLES = ("system", "developer", "user", "assistant", "tool")
JUDGEMENTS = {"true": True, "1": True, "false": False, "0": False}


def read(record: Record, kind: type = Example, names: Mapping[str, str] | None = None) -> Any:
    """Makes of a record what a trainer takes.

    Args:
      record: from a source.
      kind: `Example`, `Asked`, `Pair`, `Feedback`, `Task` or `Choice`.
      names: the source's own names for `COLUMNS`, where they are others; a column named "" is not looked at.

    Returns:
      One of `kind`.

    Raises:
      ValueError: naming the record, the columns it lacks and those it has, or what is wrong with one of them.
    """
    row = Row(record, names or {})
    for columns, make in FORMATS[kind]:
        if all(map(row.has, columns)):
            return make(row)
    for other, formats in FORMATS.items():
        if other not in (kind, Asked) and any(all(map(row.has, columns)) for columns, _ in formats):
            raise row.error(f"{_name(other)}, not {_name(kind)}; it has {row.columns}")
    missing = next(column for column in PLAINEST[kind] if not isinstance(row.get(column), str | list))
    instead = " (nor 'messages')" if kind is Example else ""
    raise row.error(f"no text {row.own(missing)!r}{instead}; it has {row.columns}")


class Row:
    """A record by the names in `COLUMNS`, and how to complain about it."""

    def __init__(self, record: Record, names: Mapping[str, str]):
        self.record, self.names = record, names

    def own(self, column: str) -> str:
        """The source's name for a column."""
        return self.names.get(column, column)

    def get(self, column: str) -> Any:
        """A value, None where there is none."""
        return self.record.values.get(self.own(column))

    def has(self, column: str) -> bool:
        """Whether there is a value."""
        return self.get(column) is not None

    @property
    def columns(self) -> str:
        """The columns it has, for an error."""
        return ", ".join(map(repr, self.record.values)) or "nothing"

    def error(self, what: str) -> ValueError:
        """What to raise."""
        return ValueError(f"{self.record.name}: {what}")

    def text(self, column: str) -> str:
        """A text."""
        value = self.get(column)
        if not isinstance(value, str):
            raise self.error(f"no text {self.own(column)!r} but {_kind(value)}; it has {self.columns}")
        return value

    def turns(self, column: str, role: str) -> list[Message]:
        """Messages, or a text that is one message of this role."""
        if isinstance(self.get(column), list):
            return self.messages(column)
        return [{"role": role, "content": self.text(column)}]

    def messages(self, column: str, role: str = "role", content: str = "content") -> list[Message]:
        """A list of messages, whose roles and contents may be called otherwise."""
        values = self.get(column)
        if not isinstance(values, list) or not values:
            raise self.error(f"{self.own(column)!r} must be a list of at least one message")
        return [self._message(i, value, role, content) for i, value in enumerate(values, 1)]

    def _message(self, i: int, value: Any, role: str, content: str) -> Message:
        if not isinstance(value, dict):
            raise self.error(f"message {i} has no text {role!r}")
        calls = bool(value.get("tool_calls")) and value.get(content) is None  # only that is said without words
        for name in (role, content):
            if not isinstance(value.get(name), str) and not (name == content and calls):
                raise self.error(f"message {i} has no text {name!r}")
        # In a Parquet file every message has every field.
        more = {name: part for name, part in value.items() if part is not None and name not in (role, content)}
        who = SHAREGPT.get(value[role], value[role]) if role == "from" else value[role]
        return {"role": who, "content": value.get(content), **more}

    def tools(self) -> Sequence[Any]:
        """JSON schemas, or a text that holds them."""
        value = self.get("tools") or ()
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise self.error(f"{self.own('tools')!r} is not JSON: {error.msg}") from None
        if not isinstance(value, list | tuple) or not all(isinstance(tool, dict) for tool in value):
            raise self.error(f"{self.own('tools')!r} must be a list of JSON schemas, not {_kind(value)}")
        return value


def _chat(row: Row) -> Example:
    return Example(row.record.name, row.messages("messages"), row.tools())


def _sharegpt(row: Row) -> Example:
    messages = row.messages("conversations", "from", "value")
    for i, message in enumerate(messages, 1):
        if message["role"] not in ROLES:
            raise row.error(f"message {i} is from {message['role']!r}, who is none of {', '.join((*SHAREGPT, *ROLES))}")
    return Example(row.record.name, _system(row) + messages, row.tools(), format="ShareGPT conversations")


def _completion(row: Row) -> Example:
    messages = [*row.turns("prompt", "user"), *row.turns("completion", "assistant")]
    return Example(row.record.name, messages, row.tools(), format="prompts and completions")


def _alpaca(row: Row) -> Example:
    turns = [*_instruction(row), {"role": "assistant", "content": row.text("output")}]
    return Example(row.record.name, turns, format="Alpaca instructions")


def _instruction(row: Row) -> list[Message]:
    asked = "\n\n".join(filter(None, (row.text("instruction"), row.get("input") and row.text("input"))))
    return [*_system(row), {"role": "user", "content": asked}]


def _solved(row: Row) -> Example:
    task = _task(row)
    return Example(task.name, [*task.messages, {"role": "assistant", "content": task.answer}], format=task.format)


def _text(row: Row) -> Example:
    return Example(row.record.name, [], text=row.text("text"), format="texts")


def _asked(messages: Callable[[Row], list[Message]], answer: str = "") -> Callable[[Row], Asked]:
    """Makes what reads a prompt, without the assistant's answer where that is its last message or has a column."""

    def make(row: Row) -> Asked:
        found, said = messages(row), row.get(answer) if answer else ""
        if found[-1]["role"] == "assistant":
            found, said = found[:-1], found[-1]["content"]
        if not found:
            raise row.error("nothing is asked: its one message is the assistant's")
        return Asked(row.record.name, found, row.tools(), said if isinstance(said, str) else "")

    return make


def _pair(row: Row) -> Pair:
    chosen, rejected = row.turns("chosen", "assistant"), row.turns("rejected", "assistant")
    if row.has("prompt"):
        prompt = row.turns("prompt", "user")
        if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:  # said again in both
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    else:
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if chosen == rejected:
        raise row.error(f"{row.own('chosen')!r} and {row.own('rejected')!r} are the same")
    if not prompt or not chosen or not rejected:
        raise row.error(f"no prompt: neither {row.own('prompt')!r} nor messages that both answers begin with")
    for column, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise row.error(f"{row.own(column)!r} ends with {messages[-1]['role']!r}, not the assistant")
    return Pair(row.record.name, prompt, chosen, rejected, row.tools())


def _feedback(row: Row) -> Feedback:
    label = JUDGEMENTS.get(str(row.get("label")).lower())
    if label is None:
        raise row.error(f"{row.own('label')!r} is {row.get('label')!r}, neither true nor false")
    messages = row.messages("messages") if row.has("messages") else _completion(row).messages
    if messages[-1]["role"] != "assistant":
        raise row.error(f"the last message, which is judged, is from {messages[-1]['role']!r}, not the assistant")
    return Feedback(row.record.name, messages, label, row.tools())


def _task(row: Row) -> Task:
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise row.error(f"{row.own('answer')!r} is neither a text nor a number but {_kind(answer)}")
    return Task(row.record.name, row.turns("prompt", "user"), str(answer), row.record.values)


def _choice(row: Row) -> Choice:
    found, answer = row.get("choices"), row.get("answer")
    found = found if isinstance(found, dict) else {"text": found}  # or with the labels that the answer may be one of
    texts = found.get("text")
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise row.error(f"{row.own('choices')!r} must be a list of at least two texts, not {_kind(row.get('choices'))}")
    labels = found.get("label") or [chr(ord("A") + i) for i in range(len(texts))]
    for known in (range(len(texts)), labels, texts):
        if not isinstance(answer, bool) and answer in known:
            return Choice(row.record.name, row.turns("prompt", "user"), texts, list(known).index(answer))
    raise row.error(
        f"{row.own('answer')!r} is {answer!r}, which is none of the choices, nor the number of one from 0 on"
    )


FORMATS: dict[type, list[tuple[tuple[str, ...], Callable[[Row], Any]]]] = {
    Example: [
        (("messages",), _chat),
        (("prompt", "completion"), _completion),
        (("conversations",), _sharegpt),
        (("instruction", "output"), _alpaca),
        (("prompt", "answer"), _solved),
        (("text",), _text),
    ],
    Asked: [
        (("messages",), _asked(lambda row: row.messages("messages"))),
        (("prompt", "completion"), _asked(lambda row: row.turns("prompt", "user"), "completion")),
        (("conversations",), _asked(lambda row: _sharegpt(row).messages)),
        (("instruction",), _asked(_instruction, "output")),
        (("prompt",), _asked(lambda row: row.turns("prompt", "user"), "answer")),
    ],
    Pair: [(("chosen", "rejected"), _pair)],
    Feedback: [(("prompt", "completion", "label"), _feedback), (("messages", "label"), _feedback)],
    Choice: [(("prompt", "choices", "answer"), _choice)],
    Task: [(("prompt", "answer"), _task)],
}
# What to ask for where nothing is recognised.
PLAINEST = {
    Example: ("prompt", "completion"),
    Asked: ("prompt",),
    Pair: ("prompt", "chosen", "rejected"),
    Feedback: ("prompt", "completion", "label"),
    Choice: ("prompt", "choices", "answer"),
    Task: ("prompt", "answer"),
}


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": row.text("system")}] if row.get("system") else []


def _name(kind: type) -> str:
    return getattr(kind, "_field_defaults")["format"]  # noqa: B009


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
