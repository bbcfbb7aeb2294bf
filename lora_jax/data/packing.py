"""Token ids as batches of one fixed shape.

An example of n ids gives n - 1 inputs, each with the next id as its target. A row holds one example and
padding, or, packed, several: then `segments` numbers them from 1 (0 is padding), and `positions` starts again
in each.

Shapes: B rows, T inputs in a row.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from lora_jax.data import chat, sources

Batch = dict[str, np.ndarray]


class Tokens(NamedTuple):
    """An example as ids, and which of them the model is to learn."""

    name: str
    ids: np.ndarray
    learn: np.ndarray

    @property
    def inputs(self) -> int:
        """How many places of a row it takes."""
        return len(self.ids) - 1


Row = Sequence[Tokens]


def tokenize(format: chat.Format, examples: Iterable[sources.Example]) -> list[Tokens]:
    """Writes examples as ids.

    Args:
      format: of the model.
      examples: from a source.

    Returns:
      One `Tokens` for each.

    Raises:
      ValueError: naming the example that the chat template cannot write.
    """
    return [tokens(format, example) for example in examples]


def tokens(format: chat.Format, example: sources.Example) -> Tokens:
    """Writes one example, as `tokenize`."""
    try:
        if example.text is not None:
            return Tokens(example.name, *chat.plain(format, example.text))
        return Tokens(example.name, *chat.render(format, example.messages, example.tools))
    except ValueError as error:
        raise ValueError(f"{example.name}: {error}") from None


def pieces(examples: Iterable[Tokens], length: int) -> Iterator[Tokens]:
    """Cuts examples that are too long for a row into several, each beginning with the last id of the one before.

    So every id but the first of an example is a target once, and what is cut is text, where a beginning in its midst
    does no harm.

    Args:
      examples: tokenised texts.
      length: places in a row, T.

    Yields:
      Examples with at most `length` inputs.
    """
    for example in examples:
        for start in range(0, max(example.inputs, 1), length):
            cut = np.s_[start : start + length + 1]
            yield Tokens(example.name, example.ids[cut], example.learn[cut])


def fit(examples: Iterable[Tokens], length: int, truncate: bool = False) -> tuple[list[Tokens], list[Tokens]]:
    """Sorts out what fits into rows, and cuts off what follows the last id to learn: nothing depends on it.

    Args:
      examples: tokenised.
      length: places in a row, T.
      truncate: cut what is longer instead of leaving it out.

    Returns:
      `(kept, too long)`: with `truncate`, too long is only what has nothing to learn in its first T places.

    Raises:
      ValueError: naming an example with nothing to learn.
    """
    kept, long = [], []
    for example in examples:
        if last := _last(example):
            example = _cut(example, last)
        else:
            raise ValueError(
                f"{example.name}: nothing to learn from: no token of it is said by the assistant; remove it, "
                "or give it an assistant message"
            )
        if truncate and example.inputs > length:
            cut = _cut(example, length)
            (kept if cut.learn[1:].any() else long).append(cut)
        else:
            (long if example.inputs > length else kept).append(example)
    return kept, long


def _last(example: Tokens) -> int:
    """How many inputs there are up to the last id to learn."""
    return len(example.learn) - 1 - int(example.learn[::-1].argmax()) if example.learn.any() else 0


def _cut(example: Tokens, inputs: int) -> Tokens:
    return Tokens(example.name, example.ids[: inputs + 1], example.learn[: inputs + 1])


def rows(examples: Sequence[Tokens], length: int, pack: bool = False) -> list[Row]:
    """Gives every example a row of its own, or with `pack` the fullest row that has room, longest first.

    Args:
      examples: none with more than `length` inputs.
      length: places in a row, T.
      pack: put several into a row.

    Returns:
      Rows of examples.
    """
    if not pack:
        return [[example] for example in examples]
    packed: list[list[Tokens]] = []
    spaces: list[tuple[int, int]] = []  # (places left, row), sorted
    for example in sorted(examples, key=lambda e: -e.inputs):
        at = bisect.bisect_left(spaces, (example.inputs, 0))
        if at == len(spaces):
            packed.append([])
            space, row = length, len(packed) - 1
        else:
            space, row = spaces.pop(at)
        packed[row].append(example)
        bisect.insort(spaces, (space - example.inputs, row))
    return list(packed)


def batch(rows: Sequence[Row], length: int) -> Batch:
    """Writes rows as arrays [B, T].

    Args:
      rows: B of them.
      length: T.

    Returns:
      tokens, targets, segments and positions, int32, and weights, float32: 1 where a target is to be learned.
    """
    shape = (len(rows), length)
    tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row, 1):
            at = np.s_[b, start : start + example.inputs]
            tokens[at], targets[at], weights[at] = example.ids[:-1], example.ids[1:], example.learn[1:]
            segments[at], positions[at] = segment, np.arange(example.inputs)
            start += example.inputs
    return {
        "tokens": tokens,
        "targets": targets,
        "weights": weights,
        "segments": segments,
        "positions": positions,
    }


def longest(examples: Iterable[Tokens]) -> int:
    """The inputs of the longest example, up to its last id to learn."""
    return max(map(_last, examples), default=0)


def most_learned(rows: Iterable[Row]) -> int:
    """The largest number of targets in a row: what a loss that looks only at these needs to know."""
    return max(sum(int(example.learn[1:].sum()) for example in row) for row in rows)


def padding(rows: Sequence[Row], length: int) -> float:
    """The share of the places in rows that nothing stands in, from 0 to 1."""
    return 1 - sum(example.inputs for row in rows for example in row) / (len(rows) * length)


def iterate(rows: Sequence[Row], length: int, batch_size: int, seed: int, part: slice = slice(None)) -> Any:
    """Endless batches, shuffled anew in every pass over the rows.

    Args:
      rows: from `rows`.
      length: T.
      batch_size: B.
      seed: of the order.
      part: the rows of each batch to write. Hosts that each take one together take the batches that one alone would,
        and the place is the same for all, and for another number of them.

    Returns:
      A Grain iterator: its `get_state()` and `set_state(...)` remember and restore the place.
    """
    return mix([(rows, 1.0)], length, batch_size, seed, part)


def mix(
    parts: Sequence[tuple[Sequence[Any], float]],
    length: int,
    batch_size: int,
    seed: int,
    part: slice = slice(None),
    write: Callable[[Sequence[Any], int], Any] = batch,
) -> Any:
    """Endless batches of several sources' rows, each shuffled anew in every pass over it.

    Args:
      parts: rows, or whatever else `write` takes, and how often one of them comes, relative to those of the others.
      length: T.
      batch_size: B.
      seed: of the order.
      part: as for `iterate`.
      write: `batch`, or a function that stands for it.

    Returns:
      As `iterate`.
    """
    datasets = [grain.MapDataset.source(rows).seed(seed + i).shuffle().repeat() for i, (rows, _) in enumerate(parts)]
    dataset = datasets[0]
    if len(parts) > 1:
        dataset = grain.MapDataset.mix(datasets, [weight for _, weight in parts])
    dataset = dataset.batch(batch_size, batch_fn=lambda chosen: write(chosen[part], length))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))
