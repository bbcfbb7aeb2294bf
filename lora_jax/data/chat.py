"""Chats as token ids, and which of those ids the model is to learn.

A model's own Jinja template turns messages into text. Where it marks what the assistant says, that is learned. Few
templates do; then what the assistant says is found by rendering the chat up to its turn, and again with it: what was
added is the turn. And where a template writes earlier turns otherwise than later ones, by rendering the chat with
another content in that turn: what stays the same is what surrounds it.
"""

import bisect
import datetime
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers

from lora_jax.data import template

Message = dict[str, Any]
STAND_IN = "content-of-this-turn"  # no template has this word


class Special(Protocol):
    """Ids of the tokens with a role, None where the model has none, and all that end a turn."""

    @property
    def bos(self) -> int | None:
        """Begins a text."""

    @property
    def eos(self) -> int | None:
        """Ends a text."""

    @property
    def stop(self) -> tuple[int, ...]:
        """End what a model says."""
        ...


class Format(NamedTuple):
    """How a model writes a chat.

    Args:
      tokenizer: of the model.
      template: Jinja source; None for a model that has none, whose examples are a prompt and a completion.
      special: ids of the tokens that begin a text, end it, and end a turn.
      now: what a template that asks for the date is told. Keep it through a run, so that a resumed one sees
        the same text.
    """

    tokenizer: tokenizers.Tokenizer
    template: str | None
    special: Special
    now: datetime.datetime


def render(format: Format, messages: Sequence[Message], tools: Sequence[Any] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Writes a chat as token ids.

    Args:
      format: of the model.
      messages: dicts with a role and a content.
      tools: JSON schemas of what the assistant may call.

    Returns:
      `(ids_T, learn_T)`, int32 and bool: learn is true at what the assistant says and at the token that
      ends its turn; or, in a template that marks what it says, at what is marked.

    Raises:
      ValueError: if the template fails, or it cannot be told what of its text the assistant says.
    """
    if format.template is None:
        return _concatenated(format, messages)
    writer = _Writer(format, format.template, tools)
    text, marked = writer.marked(messages)
    spans = marked
    if spans is None:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [writer.turn(messages, text, i) for i in turns]
    encoding = _encode(format, text, add_special_tokens=False)
    ids, offsets = encoding.ids, encoding.offsets
    learn = np.zeros(len(ids), bool)
    for begin, end in spans:
        # A token that begins before the turn cannot be what the model says after the prompt: it is not learned.
        first, last = (bisect.bisect_left(offsets, (place,)) for place in (begin, end))
        stops = [i for i in range(first, last) if ids[i] in format.special.stop]
        if stops and marked is None:  # what the template writes after the end of a turn is not said by the model
            while len(stops) > 1 and not text[offsets[stops[-2]][1] : offsets[stops[-1]][0]].strip():
                stops.pop()  # nor is a second end
            last = stops[-1] + 1
        learn[first:last] = True
    return np.array(ids, np.int32), learn


def plain(format: Format, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Writes a text as token ids, from beginning to end token as far as the model has these.

    Returns:
      `(ids_T, learn_T)` as `render`; all is learned.
    """
    ids = [*_prompt_ids(format, text), *([] if format.special.eos is None else [format.special.eos])]
    return np.array(ids, np.int32), np.ones(len(ids), bool)


def prompt(format: Format, messages: Sequence[Message], tools: Sequence[Any] = ()) -> np.ndarray:
    """Writes a chat up to where the assistant is to answer, as ids_T int32.

    Raises:
      ValueError: as `render`.
    """
    if format.template is None:
        return _prompt_ids(format, "".join(message["content"] for message in messages))
    text = _Writer(format, format.template, tools).text(messages, add_generation_prompt=True)
    return np.array(_encode(format, text, add_special_tokens=False).ids, np.int32)


def answer(format: Format, ids: Sequence[int]) -> str:
    """What the generated ids say, up to the end of the turn."""
    ids = [int(i) for i in ids]
    end = next((n for n, i in enumerate(ids) if i in format.special.stop), len(ids))
    return format.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


class _Writer:
    """Renders chats with one template and set of tools."""

    def __init__(self, format: Format, source: str, tools: Sequence[Any]):
        self.format, self.source, self.tools = format, source, tools

    def marked(self, messages: Sequence[Message], **options: bool) -> tuple[str, template.Spans | None]:
        def token(i: int | None) -> str:
            return "" if i is None else self.format.tokenizer.id_to_token(i) or ""

        special = {"bos_token": token(self.format.special.bos), "eos_token": token(self.format.special.eos)}
        options = {"add_generation_prompt": False, **options}
        return template.render(self.source, messages, self.tools, self.format.now, **special, **options)

    def text(self, messages: Sequence[Message], **options: bool) -> str:
        return self.marked(messages, **options)[0]

    def turn(self, messages: Sequence[Message], text: str, i: int) -> tuple[int, int]:
        """Where in the text the assistant's turn, message i, begins and ends."""
        before = self.text(messages[:i], add_generation_prompt=True)
        after = self.text(messages[: i + 1]) if i + 1 < len(messages) else text
        if after.startswith(before) and text.startswith(after):
            return len(before), len(after)
        found = self._said(messages, text, i)
        if found:
            # What the prompt has behind the question is not said by the model. What follows it is, such as an empty
            # thought before the content; but where another prompt is written in this place, only the content is.
            asked = self._said(messages, text, i - 1) if i else (0, 0)
            answered = self._said(messages[:i], before, i - 1, add_generation_prompt=True) if i else (0, 0)
            header = before[answered[1] :] if answered else ""
            if asked and answered and text.startswith(header, asked[1]):
                found = asked[1] + len(header), found[1]
            elif not messages[i].get("content"):
                found = None
        if found:
            following = self._said(messages, text, i + 1) if i + 1 < len(messages) else None
            return found[0], self._stop(text, found[1], following[0] if following else len(text)) or found[1]
        raise ValueError(
            f"the chat template does not write message {i + 1} as an addition to the messages before it, "
            "or writes it differently when others follow, so what the assistant says cannot be told apart; "
            "give chats of a question and an answer"
        )

    def _said(self, messages: Sequence[Message], text: str, i: int, **options: bool) -> tuple[int, int] | None:
        """Where in the text the content of message i is, or the name of what it calls, as far as it can be told."""
        other = self.text([*messages[:i], _with_stand_in(messages[i]), *messages[i + 1 :]], **options)
        before, found, after = other.partition(STAND_IN)
        if not found or STAND_IN in after or not (text.startswith(before) and text.endswith(after)):
            return None
        return (len(before), len(text) - len(after)) if len(before) + len(after) <= len(text) else None

    def _stop(self, text: str, begin: int, end: int) -> int | None:
        """Where the first token that ends a turn ends."""
        names = (self.format.tokenizer.id_to_token(i) for i in self.format.special.stop)
        ends = [at + len(name) for name in names if name and (at := text.find(name, begin, end)) >= 0]
        return min(ends, default=None)


def _with_stand_in(message: Message) -> Message:
    calls = message.get("tool_calls")
    if message.get("content") or not calls:
        return {**message, "content": STAND_IN}
    function = {**calls[0].get("function", calls[0]), "name": STAND_IN}
    first = {**calls[0], "function": function} if "function" in calls[0] else function
    return {**message, "tool_calls": [first, *calls[1:]]}


def _concatenated(format: Format, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """Prompt, completion, end; tokenised apart, as they are when the model is asked."""
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise ValueError("the model has no chat template: give a prompt and a completion, not a chat")
    if format.special.eos is None:
        raise ValueError("the model has neither a chat template nor an end token: nothing can end a completion")
    before = _prompt_ids(format, messages[0]["content"])
    said = _encode(format, messages[1]["content"], add_special_tokens=False).ids
    ids = np.array([*before, *said, format.special.eos], np.int32)
    return ids, np.arange(len(ids)) >= len(before)


def _prompt_ids(format: Format, text: str) -> np.ndarray:
    ids = _encode(format, text).ids  # with the beginning token, if the tokenizer writes one
    return np.array(ids[:-1] if ids and ids[-1] == format.special.eos else ids, np.int32)


def _encode(format: Format, text: str, **options: bool) -> tokenizers.Encoding:
    try:
        return format.tokenizer.encode(text, **options)
    except TypeError:
        odd = next((c for c in text if "\ud800" <= c <= "\udfff"), "")
        raise ValueError(f"{odd!a} in it is half a character (a surrogate without its other half)") from None
