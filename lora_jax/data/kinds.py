"""What scripts take: chats and texts, prompts, preferences, judged answers, tasks whose answer can be checked, choices.

Each knows which exercises are in it, so that none of these is both trained on and held out.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = dict[str, Any]


class Example(NamedTuple):
    """What supervised training takes: a chat, whose assistant is learned from, or a text, learned as a whole.

    Args:
      name: where it comes from, such as `train.jsonl:17` or `chain_sum[17]`.
      messages: of the chat; none for a text.
      tools: JSON schemas of the functions that the assistant may call.
      text: a plain text.
      format: the name of the format it was read from.
    """

    name: str
    messages: list[Message]
    tools: Sequence[Any] = ()
    text: str | None = None
    format: str = "chats"

    @property
    def question(self) -> str:
        """Everything before the last message; two examples with one question are the same exercise."""
        return _exercise(self.messages[:-1]) if self.text is None else json.dumps(self.text)

    @property
    def questions(self) -> set[str]:
        """Everything before the last message and before each of the assistant's: the exercises that are in it."""
        return {self.question, *_answered(self.messages)}

    @property
    def answer(self) -> str:
        """The last message."""
        return self.messages[-1]["content"]


class Asked(NamedTuple):
    """A prompt that the model itself is to answer.

    Args:
      name: where it comes from.
      messages: up to where the assistant is to speak.
      tools: JSON schemas of the functions that it may call.
      answer: what the data has for one; it is shown beside the model's.
    """

    name: str
    messages: list[Message]
    tools: Sequence[Any] = ()
    answer: str = ""
    format: str = "prompts"

    @property
    def question(self) -> str:
        """The prompt."""
        return _exercise(self.messages)

    @property
    def questions(self) -> set[str]:
        """The prompt, and everything in it that the assistant has answered."""
        return {self.question, *_answered(self.messages)}


class Pair(NamedTuple):
    """A prompt, and messages that answer it better and worse."""

    name: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: Sequence[Any] = ()
    format: str = "preference pairs"

    @property
    def question(self) -> str:
        """The prompt; so for `questions`."""
        return _exercise(self.prompt)

    @property
    def questions(self) -> set[str]:
        """The one exercise that is in it."""
        return {self.question}

    @property
    def sides(self) -> tuple[Example, Example]:
        """The chat with the better answer, and the one with the worse."""
        return (
            Example(f"{self.name} (chosen)", self.prompt + self.chosen, self.tools),
            Example(f"{self.name} (rejected)", self.prompt + self.rejected, self.tools),
        )


class Feedback(NamedTuple):
    """A chat, and whether its last message is a good one."""

    name: str
    messages: list[Message]
    good: bool
    tools: Sequence[Any] = ()
    format: str = "judged answers"

    @property
    def question(self) -> str:
        """Everything before the answer."""
        return _exercise(self.messages[:-1])

    @property
    def questions(self) -> set[str]:
        """The one exercise that is in it."""
        return {self.question}


class Task(NamedTuple):
    """A prompt whose answer can be checked, and the whole record, for checks that need more than the answer."""

    name: str
    messages: list[Message]
    answer: str
    values: Mapping[str, Any]
    format: str = "tasks"

    @property
    def question(self) -> str:
        """The prompt."""
        return _exercise(self.messages)

    @property
    def questions(self) -> set[str]:
        """The one exercise that is in it."""
        return {self.question}


class Choice(NamedTuple):
    """A prompt, several answers, and which of them is right."""

    name: str
    messages: list[Message]
    choices: Sequence[str]
    right: int
    format: str = "multiple choices"

    @property
    def question(self) -> str:
        """The prompt."""
        return _exercise(self.messages)

    @property
    def questions(self) -> set[str]:
        """The one exercise that is in it."""
        return {self.question}


Kind = Example | Asked | Pair | Feedback | Task | Choice


def _answered(messages: Sequence[Message]) -> set[str]:
    return {_exercise(messages[:i]) for i, message in enumerate(messages) if message["role"] == "assistant"}


def _exercise(messages: Sequence[Message]) -> str:
    return json.dumps([[message["role"], message.get("content", "")] for message in messages])
