"""Preference pairs and judged answers as rows of tokens: what a preference loss is trained and evaluated on.

A pair is two rows of a batch that follow each other, the better answer's and the worse's. Only the answer is learned
of each, not what the assistant has said before it.

Shapes: B rows, T places in a row.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.data import chat, checks, formats, kinds, packing, sources
from train.config import Config


class Item(NamedTuple):
    """A pair, or a judged answer.

    Args:
      name: where it comes from.
      rows: two, the better answer first; or one.
      good: for each, whether the answer is the better one of its pair, or judged good.
      reference: the log-probabilities of the answers before training, if they are known beforehand.
    """

    name: str
    rows: tuple[packing.Tokens, ...]
    good: tuple[bool, ...]
    reference: tuple[float, ...] = ()


class Data(NamedTuple):
    """What a run trains on and evaluates on.

    Args:
      items: to train on.
      heldout: to evaluate on.
      learned: the most tokens that an answer has.
      length: places in a row, T.
      digest: of all that is trained on, and its order.
    """

    items: list[Item]
    heldout: list[Item]
    learned: int
    length: int
    digest: str


def prepare(config: Config, format: chat.Format, context: int, unpaired: bool) -> Data:
    """Reads, splits and tokenizes pairs, and says how many there are and what is left out.

    Args:
      config: of the whole run.
      format: how the model writes chats.
      context: positions that the model knows.
      unpaired: take judged answers, or each pair as two of them.

    Returns:
      The data.

    Raises:
      FileNotFoundError, ValueError: naming the file, line or pair, and what is wrong.
    """
    settings = config.data
    if settings.length > context:
        raise ValueError(
            f"config.data.length={settings.length} is more than the {context} positions that the model knows"
        )
    names = {**settings.columns, **{name: settings[name] for name in ("prompt", "chosen", "rejected")}}
    found = _read(settings.source, names, unpaired)
    print(f"{settings.source}: {len(found):,} {found[0].format}")
    if settings.heldout_source:
        held = _read(settings.heldout_source, names, unpaired)[: settings.heldout]
        found = sources.without(found, held)
    else:
        found, held = sources.split(found, settings.heldout, config.seed)
    length = settings.length or context
    training, heldout = (_fitted([item(format, x) for x in part], length) for part in (found, held))
    if not training or not heldout:
        raise ValueError(
            f"{settings.source}: every answer with its prompt is longer than {length} tokens (config.data.length)"
        )
    for what, part in (("to train on", training), ("held out", heldout)):
        if len({good for item in part for good in item.good}) < 2:
            raise ValueError(
                f"{settings.source}: the answers {what} are all judged {'good' if part[0].good[0] else 'bad'}; both "
                "kinds are needed (config.data.heldout says how many are drawn)"
            )
    checks.refuse(format, [row for item in training for row in item.rows])
    length = settings.length or max(row.inputs for item in [*training, *heldout] for row in item.rows)
    what = "answers" if unpaired else "pairs"
    print(
        f"{len(training):,} {what} to train on, {len(heldout):,} held out (no question of these is trained on), up to "
        f"{length} tokens"
    )
    digest = hashlib.sha256(f"{config.seed} {config.batch_size} {length} {unpaired}".encode())
    for row in (row for item in training for row in item.rows):
        digest.update(row.ids.tobytes() + row.learn.tobytes())
    return Data(
        training,
        heldout,
        max(int(row.learn.sum()) for item in [*training, *heldout] for row in item.rows),
        length,
        digest.hexdigest()[:16],
    )


def _read(source: str, names: Mapping[str, str], unpaired: bool) -> list[Any]:
    records = sources.records(source)
    judged = unpaired and not all(formats.Row(records[0], names).has(name) for name in ("chosen", "rejected"))
    return sources.load(source, names, kinds.Feedback if judged else kinds.Pair)


def item(format: chat.Format, example: kinds.Pair | kinds.Feedback) -> Item:
    """Writes a pair or a judged answer as tokens.

    Raises:
      ValueError: naming it, if the chat template cannot write it, or nothing of an answer is left.
    """
    if isinstance(example, kinds.Pair):
        sides, prompt, good = example.sides, example.prompt, (True, False)
    else:
        sides = (kinds.Example(example.name, example.messages, example.tools),)
        prompt, good = example.messages[:-1], (example.good,)
    asked = chat.prompt(format, prompt, example.tools)
    return Item(example.name, tuple(answer(packing.tokens(format, side), asked) for side in sides), good)


def answer(tokens: packing.Tokens, asked: np.ndarray) -> packing.Tokens:
    """Learns the last answer alone, not the assistant's earlier turns.

    Args:
      tokens: of a chat.
      asked: ids of its prompt, up to where the assistant is to answer.

    Returns:
      The chat with nothing learned of what it shares with the prompt, and without what follows the answer.
    """
    n = min(len(asked), len(tokens.ids))
    same = tokens.ids[:n] == asked[:n]
    begin = n if same.all() else int(np.argmin(same))
    learn = tokens.learn & (np.arange(len(tokens.ids)) >= begin)
    return packing.fit([tokens._replace(learn=learn)], len(tokens.ids))[0][0]


def _fitted(items: list[Item], length: int) -> list[Item]:
    """Those that are no longer than a row, and whose answers differ; the others are counted."""
    long = [item for item in items if max(row.inputs for row in item.rows) > length]
    same = [item for item in items if len({row.ids.tobytes() for row in item.rows}) < len(item.rows)]
    out = {id(item) for item in (*long, *same)}
    for left, why in (
        (long, f"are longer than {length} tokens with their prompts (config.data.length decides)"),
        (same, "have a chosen and a rejected answer that the chat template writes alike"),
    ):
        if left:
            print(f"{len(left):,} {why}: left out, such as {left[0].name}")
    return [item for item in items if id(item) not in out]


def batch(items: Sequence[Item], length: int) -> packing.Batch:
    """The rows of items, one after the other, as `packing.batch`, with what is known of them.

    Args:
      items: of one kind.
      length: T.

    Returns:
      Arrays as those of `packing.batch`; `good` [B], 1 where an answer is good; and `reference` [B], if it is known.
    """
    rows = packing.batch([[row] for item in items for row in item.rows], length)
    rows["good"] = np.array([good for item in items for good in item.good], np.float32)
    if items[0].reference:
        rows["reference"] = np.array([x for item in items for x in item.reference], np.float32)
    return rows


def crossed(items: Sequence[Item], length: int) -> dict[str, Any]:
    """As `batch`, with `crossed`: each prompt with an answer to another item's, cut off where the row ends.

    Answers to other questions are what KTO estimates the divergence from the reference with.
    """
    rows, shift = [row for item in items for row in item.rows], len(items[0].rows)
    others = [_behind(row, rows[(i + shift) % len(rows)], length) for i, row in enumerate(rows)]
    return batch(items, length) | {"crossed": packing.batch([[other] for other in others], length)}


def _behind(asked: packing.Tokens, answered: packing.Tokens, length: int) -> packing.Tokens:
    prompt, answer = int(np.argmax(asked.learn)), int(np.argmax(answered.learn))
    ids = np.concatenate([asked.ids[:prompt], answered.ids[answer:]])[: length + 1]
    return packing.Tokens(asked.name, ids, np.arange(len(ids)) >= prompt)


def batches(data: Data, batch_size: int, seed: int, write: Callable = batch) -> Any:
    """Endless batches of items to train on, shuffled anew in every pass, as `packing.mix` gives them."""
    return packing.mix([(data.items, 1.0)], data.length, batch_size, seed, write=write)


def blocks(items: Sequence[Item], length: int, size: int, write: Callable = batch) -> Iterator[tuple[int, Any]]:
    """All items once, in batches of one size.

    Yields:
      How many items of a batch are not there to fill it up, and the batch.
    """
    for start in range(0, len(items), size):
        chosen = list(items[start : start + size])
        yield len(chosen), write(chosen + list(items[:1]) * (size - len(chosen)), length)
