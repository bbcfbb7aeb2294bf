"""Chats as token ids, and which of those ids the model is to learn.

A model's own Jinja template turns messages into text. Few templates mark what the assistant says, so it is
found by rendering the chat up to the assistant's turn, and again with it: what was added is the turn.
"""

import datetime
import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
import tokenizers

Message = dict[str, Any]


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


def render(format: Format, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """Writes a chat as token ids.

    Args:
      format: of the model.
      messages: dicts with a role and a content.

    Returns:
      `(ids_T, learn_T)`, int32 and bool: learn is true at what the assistant says and at the token that
      ends its turn.

    Raises:
      ValueError: if the template fails, or does not write the beginning of a chat as it writes the whole.
    """
    if format.template is None:
        return _concatenated(format, messages)
    text = _text(format, messages)
    spans = [_turn(format, messages, text, i) for i, message in enumerate(messages) if message["role"] == "assistant"]
    encoding = format.tokenizer.encode(text, add_special_tokens=False)
    ids = np.array(encoding.ids, np.int32)
    # A token that begins before the turn cannot be what the model says after the prompt: it is not learned.
    starts = np.array([start for start, _ in encoding.offsets], np.int64)
    learn = np.zeros(len(ids), bool)
    for begin, end in spans:
        inside = (starts >= begin) & (starts < end)
        ended = np.flatnonzero(inside & np.isin(ids, format.special.stop))
        if ended.size:  # what the template writes after the end of a turn is not said by the model
            inside[ended[-1] + 1 :] = False
        learn |= inside
    return ids, learn


def prompt(format: Format, messages: Sequence[Message]) -> np.ndarray:
    """Writes a chat up to where the assistant is to answer, as ids_T int32.

    Raises:
      ValueError: as `render`.
    """
    if format.template is None:
        return _prompt_ids(format, "".join(message["content"] for message in messages))
    text = _text(format, messages, add_generation_prompt=True)
    return np.array(format.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def answer(format: Format, ids: Sequence[int]) -> str:
    """What the generated ids say, up to the end of the turn."""
    ids = [int(i) for i in ids]
    end = next((n for n, i in enumerate(ids) if i in format.special.stop), len(ids))
    return format.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def _turn(format: Format, messages: Sequence[Message], text: str, i: int) -> tuple[int, int]:
    """Where in the text the assistant's turn, message i, begins and ends."""
    before = _text(format, messages[:i], add_generation_prompt=True)
    after = _text(format, messages[: i + 1])
    if not (after.startswith(before) and text.startswith(after)):
        raise ValueError(
            f"the chat template does not write message {i + 1} as an addition to the messages before it, "
            "or writes it differently when others follow, so what the assistant says cannot be told apart; "
            "give chats of a question and an answer"
        )
    return len(before), len(after)


def _text(format: Format, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    def token(i: int | None) -> str:
        return "" if i is None else format.tokenizer.id_to_token(i) or ""

    try:
        return _compiled(format.template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            bos_token=token(format.special.bos),
            eos_token=token(format.special.eos),
            strftime_now=format.now.strftime,
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template fails on this chat: {error}") from None


@functools.cache
def _compiled(template: str) -> jinja2.Template:
    """Templates come with downloaded weights: they run in a sandbox, with the additions that they expect."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment.from_string(template)


class _Generation(jinja2.ext.Extension):
    """Accepts `{% generation %}` around what the assistant says, and writes what is inside it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The block's own nodes."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _concatenated(format: Format, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
    """Prompt, completion, end; tokenised apart, as they are when the model is asked."""
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise ValueError("the model has no chat template: give a prompt and a completion, not a chat")
    if format.special.eos is None:
        raise ValueError("the model has neither a chat template nor an end token: nothing can end a completion")
    before = _prompt_ids(format, messages[0]["content"])
    said = format.tokenizer.encode(messages[1]["content"], add_special_tokens=False).ids
    ids = np.array([*before, *said, format.special.eos], np.int32)
    return ids, np.arange(len(ids)) >= len(before)


def _prompt_ids(format: Format, text: str) -> np.ndarray:
    ids = format.tokenizer.encode(text).ids  # with the beginning token, if the tokenizer writes one
    return np.array(ids[:-1] if ids and ids[-1] == format.special.eos else ids, np.int32)
