"""Where examples come from: JSONL files, and reasoning-gym's generated tasks.

An example is a chat with a name that errors can point to. A prompt and its completion are a chat of two
messages.
"""

import ast
import dataclasses
import json
import random
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.tree import nearest

REASONING_GYM = "reasoning_gym:"


class Example(NamedTuple):
    """A chat and where it comes from, such as `train.jsonl:17` or `chain_sum[17]`."""

    name: str
    messages: list[dict[str, Any]]

    @property
    def question(self) -> str:
        """Everything before the last message; two examples with one question are the same exercise."""
        return json.dumps([[m["role"], m["content"]] for m in self.messages[:-1]])

    @property
    def answer(self) -> str:
        """The last message."""
        return self.messages[-1]["content"]


def load(source: str, fields: Mapping[str, str] | None = None) -> list[Example]:
    """Reads every example of a source.

    Args:
      source: the path of a JSONL file with lines `{"messages": [{"role": ..., "content": ...}, ...]}` or
        `{"prompt": ..., "completion": ...}`; or `reasoning_gym:TASK?key=value&key=value`, with the task's own
        parameters and `size` and `seed`.
      fields: names of the prompt and of the completion in the file, if they are others.

    Returns:
      The examples in order.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file and line, or the task and parameter, and what is wrong.
    """
    if source.startswith(REASONING_GYM):
        return _reasoning_gym(source)
    names = {"prompt": "prompt", "completion": "completion", **(fields or {})}
    examples = list(_jsonl(Path(source), names["prompt"], names["completion"]))
    if not examples:
        raise ValueError(f"{source}: no examples")
    return examples


def split(examples: Sequence[Example], heldout: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Draws examples to hold out, and takes every example with the same question from the others.

    Args:
      examples: all of them.
      heldout: how many to hold out, all with different questions; a question that is common among the examples
        is drawn more often than a rare one.
      seed: of the draw.

    Returns:
      `(training, held out)`.

    Raises:
      ValueError: if fewer than `heldout` + 1 questions are different.
    """
    shuffled = random.Random(seed).sample(examples, len(examples))
    unique = list({example.question: example for example in shuffled}.values())
    if len(unique) <= heldout:
        raise ValueError(f"{len(unique)} different questions are too few to hold out {heldout}")
    return without(examples, unique[:heldout]), unique[:heldout]


def without(examples: Sequence[Example], heldout: Sequence[Example]) -> list[Example]:
    """The examples whose question is not among the held-out ones."""
    questions = {example.question for example in heldout}
    return [example for example in examples if example.question not in questions]


def _jsonl(path: Path, prompt: str, completion: str) -> Iterator[Example]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; data.source is a JSONL file or reasoning_gym:TASK")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                name = f"{path}:{number}"
                yield Example(name, _messages(name, _parsed(name, line), prompt, completion))


def _parsed(name: str, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode().rstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: not UTF-8: byte {error.start + 1} of the line") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: not an object with 'messages' or 'prompt' but a {type(value).__name__}")
    return value


def _messages(name: str, value: dict[str, Any], prompt: str, completion: str) -> list[dict[str, Any]]:
    if "messages" not in value:
        for key in (prompt, completion):
            if not isinstance(value.get(key), str):
                found = ", ".join(map(repr, value)) or "nothing"
                raise ValueError(f"{name}: no text {key!r} (nor 'messages'); it has {found}")
        return [
            {"role": "user", "content": value[prompt]},
            {"role": "assistant", "content": value[completion]},
        ]
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name}: 'messages' must be a list of at least one message")
    for i, message in enumerate(messages, 1):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise ValueError(f"{name}: message {i} has no text {key!r}")
    return messages


def _reasoning_gym(source: str) -> list[Example]:
    import reasoning_gym  # slow to import, and only some runs need it

    task, _, query = source.removeprefix(REASONING_GYM).partition("?")
    tasks = reasoning_gym.factory.DATASETS
    if task not in tasks:
        raise ValueError(f"{source}: no task {task!r}; did you mean {nearest(task, tasks, 1)}?")
    known = [field.name for field in dataclasses.fields(tasks[task][1])]
    parameters = {"seed": 0, **{key: _value(text) for key, text in urllib.parse.parse_qsl(query)}}
    for key in parameters:
        if key not in known:
            raise ValueError(f"{source}: no parameter {key!r}; did you mean {nearest(key, known, 1)}?")
    try:
        entries = list(reasoning_gym.create_dataset(task, **parameters))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: {task} does not accept these parameters: {error}") from None
    return [
        Example(
            f"{task}[{i}]",
            [
                {"role": "user", "content": entry["question"]},
                {"role": "assistant", "content": str(entry["answer"])},
            ],
        )
        for i, entry in enumerate(entries)
    ]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
