"""Examples that are read and tokenised while the model trains, for data that memory does not hold.

A stream is read once before training: every record is checked, and a few bytes of each are kept, which tell what may
be trained on and what is held out.

Shapes: B rows, T inputs in a row.
"""

import array
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from lora_jax.data import chat, kinds, packing, sources

LOOK = 1000  # examples that are looked at before training
READ = 16  # examples that are read at once
WINDOW = 512  # pieces of examples that are packed together


class Index(NamedTuple):
    """What a pass over a source finds.

    Args:
      training: places of the examples to train on, int64.
      heldout: places of the held-out ones.
      texts: whether they are texts, not chats.
      digest: of all examples.
    """

    training: np.ndarray
    heldout: np.ndarray
    texts: bool
    digest: str


def index(
    parts: Sequence[sources.Examples],
    heldout: int,
    seed: int,
    elsewhere: Sequence[kinds.Kind] = (),
    log: Callable[[str], None] = print,
) -> list[Index]:
    """Reads every example once and draws those to hold out; no training example has an exercise of these in it.

    Args:
      parts: the examples of each source.
      heldout: how many to hold out of all together, with different questions.
      seed: of the draw.
      elsewhere: examples of another source that are held out too.
      log: told what is left out.

    Returns:
      The index of each source, from 18 bytes for an example and 16 for every question in it.

    Raises:
      ValueError: if a record is broken, or fewer than `heldout` + 1 questions are different.
    """
    numbers, places, questions = array.array("H"), array.array("q"), array.array("Q")
    owners, exercises = array.array("q"), array.array("Q")
    contents, texts = [hashlib.sha256() for _ in parts], [False] * len(parts)
    for number, examples in enumerate(parts):
        for place, example in sources.distinct(examples, log):
            numbers.append(number)
            places.append(place)
            questions.append(_hash(seed, example.question))
            for question in example.questions:
                owners.append(len(places) - 1)
                exercises.append(_hash(seed, question))
            contents[number].update(repr(example[1:]).encode())
            texts[number] = example.text is not None
    all_, drawn = np.unique(np.array(questions, np.uint64), return_index=True)  # in the order of the hashes: shuffled
    if len(all_) <= heldout:
        raise ValueError(f"{len(all_)} different questions are too few to hold out {heldout}")
    owner, exercise = np.array(owners, np.int64), np.array(exercises, np.uint64)
    held = np.zeros(len(places), bool)
    held[drawn[:heldout]] = True
    same = np.zeros(len(places), bool)
    others = np.array([_hash(seed, question) for e in elsewhere for question in e.questions], np.uint64)
    same[owner[np.isin(exercise, np.concatenate([exercise[held[owner]], others]))]] = True
    place, source = np.array(places, np.int64), np.array(numbers)
    return [
        Index(place[~same & own], place[held & own], texts[i], contents[i].hexdigest()[:16])
        for i, own in enumerate(source == number for number in range(len(parts)))
    ]


class Stream:
    """What a run trains on: examples by number, each as the pieces of rows that it gives.

    Args:
      examples: of a source.
      places: of those to take.
      format: how the model writes chats.
      length: T. A longer text is cut into pieces; a longer chat is left out, or cut off with `truncate`.
      truncate: cut chats.
    """

    def __init__(
        self, examples: sources.Examples, places: np.ndarray, format: chat.Format, length: int, truncate: bool
    ):
        self.examples, self.places, self.format = examples, places, format
        self.length, self.truncate = length, truncate
        self.long = 0  # examples left out so far

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> list[packing.Tokens]:
        """The pieces of an example, none if it is too long."""
        example = self.examples[int(self.places[index])]
        tokens = packing.tokens(self.format, example)
        if example.text is not None:
            return list(packing.pieces([tokens], self.length))
        kept, long = packing.fit([tokens], self.length, self.truncate)
        self.long += len(long)
        return kept


class _Each(grain.experimental.FlatMapTransform):
    """What is in lists, one after the other."""

    def flat_map(self, element: list) -> list:
        """As they are."""
        return element


def iterate(
    stream: Stream, batch_size: int, seed: int, pack: bool = False, part: slice = slice(None)
) -> Iterator[packing.Batch]:
    """Endless batches, shuffled anew in every pass over the examples; else as `mix`."""
    return mix([(stream, 1.0)], batch_size, seed, pack, part)


def mix(
    parts: Sequence[tuple[Stream, float]], batch_size: int, seed: int, pack: bool = False, part: slice = slice(None)
) -> Iterator[packing.Batch]:
    """Endless batches of several streams' rows, each shuffled anew in every pass over it.

    Args:
      parts: streams of rows of one length, and how often a row of one comes, relative to those of the others.
      batch_size: B.
      seed: of the order.
      pack: put several examples of a stream into a row, as `packing.rows`, `WINDOW` pieces of them at a time.
      part: the rows of each batch to write, as for `packing.iterate`. What is in a row depends on those before it, so
        that all examples are read to make any part of the batches.

    Returns:
      A Grain iterator: its `get_state()` and `set_state(...)` remember and restore the place.
    """
    length = parts[0][0].length
    datasets = [_rows(stream, seed + i, pack) for i, (stream, _) in enumerate(parts)]
    dataset = datasets[0]
    if len(parts) > 1:
        dataset = grain.IterDataset.mix(datasets, [weight for _, weight in parts])
    dataset = dataset.batch(batch_size, drop_remainder=True, batch_fn=lambda rows: packing.batch(rows[part], length))
    # One thread makes whole batches: handing over every example costs half as much again as making it.
    return iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=4))


def _rows(stream: Stream, seed: int, pack: bool) -> grain.IterDataset:
    examples = grain.MapDataset.source(stream).seed(seed).shuffle().repeat()
    read = examples.batch(READ, batch_fn=lambda lists: [*itertools.chain.from_iterable(lists)])
    pieces = _each(read.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)))
    if not pack:
        return pieces.map(lambda piece: [piece])

    def packed(window: list[packing.Tokens], rng: np.random.Generator) -> list[packing.Row]:
        rows = packing.rows(window, stream.length, pack=True)
        return [rows[i] for i in rng.permutation(len(rows))]  # not the longest first

    return _each(pieces.seed(seed).batch(WINDOW, batch_fn=list).random_map(packed))


def _each(dataset: grain.IterDataset) -> grain.IterDataset:
    return grain.experimental.FlatMapIterDataset(dataset, _Each())


def _hash(seed: int, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "little")
