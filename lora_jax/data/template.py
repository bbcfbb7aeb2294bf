"""A model's chat template: a Jinja program that came with downloaded weights, run in a sandbox and within limits.

It is given what Hugging Face's transformers gives it, so that it writes the same text.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

STEPS = 200_000  # turns of loops and calls of macros in one text: a second or so
BEGIN, END = "\ufdd0", "\ufdd1"  # two code points that are no characters: they stand in no text
REASONING = ("reasoning_content", "thinking", "reasoning")
Spans = list[tuple[int, int]]


def render(
    template: str, messages: Sequence[dict[str, Any]], tools: Sequence[Any], now: datetime.datetime, **values: Any
) -> tuple[str, Spans | None]:
    """Writes a chat.

    Args:
      template: Jinja source.
      messages: dicts with a role and a content.
      tools: JSON schemas.
      now: the time it is told.
      values: what else it may ask for, such as `bos_token` and `add_generation_prompt`.

    Returns:
      The text, and where in it is what the template marks as said by the assistant; None if it has no such marks.

    Raises:
      ValueError: if the template is broken, raises, or does not come to an end.
    """
    steps = iter(range(STEPS))

    def step() -> str:
        if next(steps, None) is None:
            raise jinja2.TemplateError(f"it does not end: {STEPS:,} turns of its loops")
        return ""

    try:
        compiled, marks = _compiled(template)
        text = compiled.render(
            messages=[_reasoned(message) for message in messages],
            tools=list(tools) or None,
            documents=None,
            strftime_now=now.strftime,
            _step=step,
            **values,
        )
    except Exception as error:  # a program of somebody else's may raise anything
        what = str(error) or type(error).__name__
        raise ValueError(f"the chat template fails on this chat: {what}") from None
    return _unmarked(text) if marks else (text, None)


def _unmarked(text: str) -> tuple[str, Spans]:
    plain, spans = "", []
    for piece in re.split(f"({BEGIN}[^{END}]*{END})", text):
        said = piece.strip(BEGIN + END)
        if piece != said:
            spans.append((len(plain), len(plain) + len(said)))
        plain += said
    return plain, spans


def _reasoned(message: dict[str, Any]) -> dict[str, Any]:
    """The reasoning in a message under the names that templates know it by."""
    thought = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


@functools.cache
def _compiled(template: str) -> tuple[jinja2.Template, bool]:
    """A template and whether it marks what the assistant says."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    tree = environment.parse(template)
    for node in list(tree.find_all((jinja2.nodes.For, jinja2.nodes.Macro))):
        node.body.insert(0, jinja2.nodes.Output([_step()]).set_lineno(node.lineno))
        if isinstance(node, jinja2.nodes.For) and node.test:
            node.test = jinja2.nodes.Or(_step(), node.test)
    marks = tree.find(jinja2.nodes.ExtensionAttribute) is not None  # only ours is an extension with a function
    tree.set_environment(environment)
    return environment.from_string(tree), marks


def _step() -> jinja2.nodes.Call:
    """A call that counts, and writes nothing and is false."""
    return jinja2.nodes.Call(jinja2.nodes.Name("_step", "load"), [], [], None, None)


class _Generation(jinja2.ext.Extension):
    """Marks what is inside `{% generation %}`: what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """A call with the block as its caller."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
