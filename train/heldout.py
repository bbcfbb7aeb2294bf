"""How well a model does on examples it was not trained on: its loss, and its answers compared word for word."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.data import chat, packing, sources
from lora_jax.models import generate
from lora_jax.models.config import DecoderConfig
from train import hosts


class Answer(NamedTuple):
    """What a model said to a question, and what it should have."""

    question: str
    expected: str
    said: str

    @property
    def right(self) -> bool:
        """Whether they are the same, but for space around them."""
        return self.said.strip() == self.expected.strip()


def loss(nll: Callable, tree: Any, rows: Sequence[packing.Row], length: int, batch_size: int) -> float:
    """Mean loss per learned token, in nats.

    Args:
      nll: a compiled function from a tree and a batch to a sum of losses and a number of tokens.
      tree: what `nll` takes first.
      rows: held-out examples.
      length: places in a row.
      batch_size: rows at once.

    Returns:
      The mean over all tokens.
    """
    total, tokens = 0.0, 0.0
    for start in range(0, len(rows), batch_size):
        chosen = list(rows[start : start + batch_size])
        chosen += [[]] * (batch_size - len(chosen))  # one shape, so one compilation
        sums = nll(tree, packing.batch(chosen, length))
        total, tokens = total + float(sums[0]), tokens + float(sums[1])
    return total / tokens


def answers(
    apply: Callable,
    tree: Any,
    config: DecoderConfig,
    format: chat.Format,
    examples: Sequence[sources.Example],
    max_new: int,
    batch_size: int,
) -> list[Answer]:
    """The likeliest answer to every example's question.

    Args:
      apply: `decoder.forward_with_cache`, or a function that stands for it.
      tree: what `apply` takes first.
      config: the decoder's shape.
      format: how the model writes chats.
      examples: their last message is the answer.
      max_new: tokens in an answer.
      batch_size: questions at once.

    Returns:
      One answer for each example.
    """
    prompts = [chat.prompt(format, example.messages[:-1], example.tools) for example in examples]
    width = max((len(prompt) for prompt in prompts), default=0)
    said = []
    for start in range(0, len(prompts), batch_size):
        chosen = prompts[start : start + batch_size]
        chosen = chosen + [chosen[0]] * (batch_size - len(chosen))
        prompt_BT = np.stack([np.pad(prompt, (0, width - len(prompt))) for prompt in chosen])
        lengths_B = np.array([len(prompt) for prompt in chosen])
        tokens, counts = generate.generate(
            tree, config, jnp.asarray(prompt_BT), jnp.asarray(lengths_B), max_new, format.special.stop, apply=apply
        )
        tokens, counts = map(np.asarray, hosts.whole((tokens, counts)))
        said += [chat.answer(format, row[:n]) for row, n in zip(tokens, counts, strict=True)]
    return [
        Answer(example.messages[-2]["content"] if len(example.messages) > 1 else "", example.answer, text)
        for example, text in zip(examples, said, strict=False)
    ]
