"""What can be measured of a model: its loss, choices by their likelihood, and answers that a reward scores.

A measure is a function of what the model runs with. It gives, for every example, a number and what that is a sum over.

Shapes: N examples, B rows, T places in a row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax.data import chat, kinds, packing, sources
from lora_jax.interop import hf
from lora_jax.models import decoder
from train import heldout, likelihood, methods, pairs, rewards

Tree = Any
BUCKET = 64  # rows are as long as a multiple of this: few lengths, so few programs


class Scores(NamedTuple):
    """What a model scored.

    Args:
      numbers: for every metric, `(values_N, weights_N)`: the metric is Σ values / Σ weights.
      said: the model's answers, where it gave any.
    """

    numbers: dict[str, tuple[np.ndarray, np.ndarray]]
    said: Sequence[str] = ()


class Measure(NamedTuple):
    """A measure, and the names of the examples it is taken on."""

    names: list[str]
    take: Callable[[Tree], Scores]


class Settings(NamedTuple):
    """Of an evaluation.

    Args:
      source: as `sources.records`.
      columns: the source's own names for columns.
      n: examples, the first ones; 0 takes all.
      max_new: tokens in an answer.
      batch_size: rows at once.
    """

    source: str
    columns: Mapping[str, str] = {}
    n: int = 0
    max_new: int = 256
    batch_size: int = 8


def make(task: str, settings: Settings, model: hf.Checkpoint, format: chat.Format) -> Measure:
    """Reads the examples and prepares a measure.

    Args:
      task: "loss", "choice", or the name of a reward, as `rewards.find`.
      settings: which examples, and how.
      model: the base.
      format: how it writes chats.

    Returns:
      The measure.

    Raises:
      FileNotFoundError, ValueError: naming the file, line or example, and what is wrong.
    """
    return {"loss": _loss, "choice": _choice}.get(task, _answers)(task, settings, model, format)


def _load(settings: Settings, kind: type, names: Mapping[str, str]) -> list[Any]:
    found = sources.load(settings.source, {**names, **settings.columns}, kind)
    return found[: settings.n or None]


def _loss(task: str, settings: Settings, model: hf.Checkpoint, format: chat.Format) -> Measure:
    examples = packing.tokenize(format, _load(settings, kinds.Example, {}))
    kept, long = packing.fit(examples, model.config.context)
    if long:
        print(f"{len(long):,} examples are longer than {model.config.context} tokens: left out, such as {long[0].name}")
    if not kept:
        raise ValueError(f"{settings.source}: every example is longer than {model.config.context} tokens")
    rows = _Rows(kept, model, settings.batch_size)

    def take(tree: Tree) -> Scores:
        total_N, tokens_N = rows.log_probs(tree)
        return Scores({"loss": (-total_N, tokens_N)})

    return Measure([example.name for example in kept], take)


def _choice(task: str, settings: Settings, model: hf.Checkpoint, format: chat.Format) -> Measure:
    examples: list[kinds.Choice] = _load(settings, kinds.Choice, {})
    tokens = [row for example in examples for row in _answered(format, example)]
    if long := [row for row in tokens if row.inputs > model.config.context]:
        raise ValueError(f"{long[0].name}: is longer than the {model.config.context} positions that the model knows")
    rows, sizes = _Rows(tokens, model, settings.batch_size), [len(example.choices) for example in examples]
    lengths = np.array([max(1, len(text.encode())) for example in examples for text in example.choices])
    right, ones = np.array([example.right for example in examples]), np.ones(len(examples))

    def chosen(values: np.ndarray) -> np.ndarray:
        return np.array([int(np.argmax(part)) for part in np.split(values, np.cumsum(sizes)[:-1])])

    def take(tree: Tree) -> Scores:
        total, _ = rows.log_probs(tree)
        found = {"accuracy": total, "accuracy_per_byte": total / lengths}
        return Scores({name: ((chosen(x) == right).astype(float), ones) for name, x in found.items()})

    return Measure([example.name for example in examples], take)


def _answered(format: chat.Format, example: kinds.Choice) -> Iterator[packing.Tokens]:
    asked = chat.prompt(format, example.messages)
    for text in example.choices:
        said = kinds.Example(example.name, [*example.messages, {"role": "assistant", "content": text}])
        yield pairs.answer(packing.tokens(format, said), asked)


def _answers(task: str, settings: Settings, model: hf.Checkpoint, format: chat.Format) -> Measure:
    reward = rewards.find(task)
    tasks: list[kinds.Task] = _load(settings, kinds.Task, {"prompt": "question"} if task == "gsm8k" else {})
    examples = [
        sources.Example(x.name, [*x.messages, {"role": "assistant", "content": x.answer}], format=x.format)
        for x in tasks
    ]
    widest = max(tasks, key=lambda x: len(chat.prompt(format, x.messages)))
    if len(chat.prompt(format, widest.messages)) + settings.max_new > model.config.context:
        raise ValueError(
            f"{widest.name}: with an answer of {settings.max_new} tokens it is longer than the {model.config.context} "
            "positions that the model knows; lower --max_new"
        )
    speak, sizes = methods.applied(decoder.forward_with_cache), (settings.max_new, settings.batch_size)

    def take(tree: Tree) -> Scores:
        said = [answer.said for answer in heldout.answers(speak, tree, model.config, format, examples, *sizes)]
        values = [reward(text, {**x.values, "answer": x.answer}) for text, x in zip(said, tasks, strict=True)]
        return Scores({task.rpartition(":")[2]: (np.array(values, float), np.ones(len(values)))}, said)

    return Measure([example.name for example in examples], take)


class _Rows:
    """Rows of tokens whose log-probabilities are asked for, shorter ones together with shorter ones."""

    def __init__(self, rows: Sequence[packing.Tokens], model: hf.Checkpoint, batch_size: int):
        self.rows, self.model, self.batch_size = rows, model, batch_size
        self.order = np.argsort([row.inputs for row in rows], kind="stable")
        learned = max(int(row.learn[1:].sum()) for row in rows)

        def log_probs(tree: Tree, batch: packing.Batch, prefix: Any = None) -> tuple[jax.Array, jax.Array]:
            most = min(learned, batch["tokens"].shape[1])
            return likelihood.log_probs(tree, batch, shape=model.config, learned=most, prefix=prefix)

        self._log_probs = jax.jit(methods.applied(log_probs))

    def log_probs(self, tree: Tree) -> tuple[np.ndarray, np.ndarray]:
        """Σ log p of what is learned of every row, and how many tokens that are, float64 [N]."""
        found = np.zeros((2, len(self.rows)))
        for start in range(0, len(self.rows), self.batch_size):
            at = self.order[start : start + self.batch_size]
            chosen = [[self.rows[i]] for i in at]
            width = -(-max(row.inputs for (row,) in chosen) // BUCKET) * BUCKET
            batch = packing.batch(chosen + [[]] * (self.batch_size - len(chosen)), width)
            found[:, at] = np.asarray(self._log_probs(tree, batch))[:, : len(at)]
        return found[0], found[1]
