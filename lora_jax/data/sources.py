"""Where examples come from: files, `tensorflow_datasets`, Hugging Face's `datasets`, reasoning-gym's generated tasks.

A source is a sequence of records, each with a name that errors can point to; `formats.read` makes examples of them.
"""

import ast
import dataclasses
import hashlib
import importlib
import random
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lora_jax.data import files, formats, gsm8k
from lora_jax.data.files import Record
from lora_jax.data.kinds import Example, Kind
from lora_jax.tree import nearest

E = TypeVar("E", bound=Kind)


def load(
    source: str, columns: Mapping[str, str] | None = None, kind: type = Example, log: Callable[[str], None] = print
) -> list[Any]:
    """Reads every example of a source.

    Args:
      source: as for `records`.
      columns: the source's own names for `formats.COLUMNS`, where they are others.
      kind: what is wanted: `Example`, `Asked`, `Pair`, `Feedback`, `Task` or `Choice`.
      log: told what is left out.

    Returns:
      The examples in order.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file and line, or the task and parameter, and what is wrong.
    """
    examples = [example for _, example in distinct(Examples(records(source), columns or {}, kind), log)]
    if not examples:
        raise ValueError(f"{source}: no examples")
    return examples


def records(source: str) -> Sequence[Record]:
    """Opens a source, of which records can be read in any order.

    Args:
      source: the path of a file or a folder as `files.read` takes it; `tfds:NAME?split=train&data_dir=...`, a data
        set of tensorflow-datasets, with arguments of `tfds.data_source`; `hf:NAME?split=train&name=...`, one of
        Hugging Face's, with arguments of `datasets.load_dataset`; `reasoning_gym:TASK?key=value&key=value`, with the
        task's own parameters and `size` and `seed`; or `gsm8k_solutions:FILE`, as `gsm8k.solutions` takes it.

    Returns:
      The records.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: naming the file, data set or parameter, and what is wrong.
    """
    prefix, colon, rest = source.partition(":")
    if not colon or prefix not in GENERATED:
        return files.read(Path(source))
    name, _, query = rest.partition("?")
    return GENERATED[prefix](source, name, {key: _value(text) for key, text in urllib.parse.parse_qsl(query)})


class Examples(Sequence[Any]):
    """Examples that are made of records when they are asked for.

    Args:
      records: of a source.
      columns: as for `load`.
      kind: as for `load`.
    """

    def __init__(self, records: Sequence[Record], columns: Mapping[str, str], kind: type = Example):
        self.records, self.columns, self.kind = records, columns, kind

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: Any) -> Any:
        """Example i.

        Raises:
          ValueError: as `formats.read`.
        """
        return formats.read(self.records[i], self.kind, self.columns)


def distinct(examples: Examples, log: Callable[[str], None] = print) -> Iterator[tuple[int, Any]]:
    """The examples and their places, all but those that repeat an id and what it stands for.

    Args:
      examples: each of which is read once.
      log: told how many are left out.

    Yields:
      `(place in examples, example)`.

    Raises:
      ValueError: if two records have one id and different contents, if texts and chats are mixed, or as
        `formats.read`.
    """
    id_column = examples.columns.get("id", "id")
    seen: dict[str, tuple[str, bytes]] = {}
    repeated, texts = [], None
    for i, record in enumerate(examples.records):
        example = formats.read(record, examples.kind, examples.columns)
        if isinstance(example, Example):
            text = example.text is not None
            if texts not in (None, text):
                found = ", ".join(map(repr, record.values))
                raise ValueError(f"{record.name}: texts and chats do not mix in one source; it has {found}")
            texts = text
        id = record.values.get(id_column)
        if id is not None:
            content = hashlib.sha256(repr(record.values).encode()).digest()[:8]
            name, other = seen.setdefault(repr(id), (record.name, content))
            if other != content:
                raise ValueError(
                    f"{record.name}: its {id_column} {id!r} is also that of {name}, which is another record; give each "
                    'its own, or say that the column is no id with config.data.columns.id=""'
                )
            if name != record.name:
                repeated.append(record.name)
                continue
        yield i, example
    if repeated:
        log(f"{len(repeated):,} records are left out for they repeat another's {id_column}, such as {repeated[0]}")


def split(examples: Sequence[E], heldout: int, seed: int) -> tuple[list[E], list[E]]:
    """Draws examples to hold out, and takes every example that is the same exercise from the others.

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


def without(examples: Iterable[E], heldout: Iterable[Kind]) -> list[E]:
    """The examples that ask nothing that a held-out one asks, at the end or on the way."""
    questions = {question for example in heldout for question in example.questions}
    return [example for example in examples if not example.questions & questions]


def _tfds(source: str, name: str, parameters: dict[str, Any]) -> Sequence[Record]:
    tfds = _module(source, "tensorflow_datasets", "tensorflow-datasets")
    try:
        rows = tfds.data_source(name, **{"split": "train", **parameters})
    except Exception as error:  # whatever a builder does while it downloads
        known, asked = tfds.list_builders(with_community_datasets=False), name.partition("/")[0].partition(":")[0]
        if asked not in known:
            raise ValueError(f"{source}: no data set {asked!r}; did you mean {nearest(asked, known, 1)}?") from None
        raise ValueError(f"{source}: tensorflow-datasets cannot read it: {_first_line(error)}") from None
    return Rows(f"tfds:{name}", rows)


def _hf(source: str, name: str, parameters: dict[str, Any]) -> Sequence[Record]:
    datasets = _module(source, "datasets", "datasets")
    try:
        rows = datasets.load_dataset(name, **{"split": "train", **parameters})
    except Exception as error:  # whatever happens while it downloads
        raise ValueError(f"{source}: datasets cannot read it: {_first_line(error)}") from None
    if isinstance(rows, dict) or not hasattr(rows, "__len__"):
        raise ValueError(f"{source}: has no numbered rows; name one split, and leave streaming out")
    return Rows(f"hf:{name}", rows)


def _reasoning_gym(source: str, task: str, parameters: dict[str, Any]) -> Sequence[Record]:
    import reasoning_gym  # slow to import, and only some runs need it

    tasks = reasoning_gym.factory.DATASETS
    if task not in tasks:
        raise ValueError(f"{source}: no task {task!r}; did you mean {nearest(task, tasks, 1)}?")
    known = [field.name for field in dataclasses.fields(tasks[task][1])]
    parameters = {"seed": 0, **parameters}
    for key in parameters:
        if key not in known:
            raise ValueError(f"{source}: no parameter {key!r}; did you mean {nearest(key, known, 1)}?")
    try:
        entries = list(reasoning_gym.create_dataset(task, **parameters))
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"{source}: {task} does not accept these parameters: {error}") from None
    # The answer is text whatever a task makes of it; the entry as it is, is what the task's own check takes.
    return [
        Record(f"{task}[{i}]", {"prompt": entry["question"], "answer": str(entry["answer"]), "entry": entry})
        for i, entry in enumerate(entries)
    ]


GENERATED = {"tfds": _tfds, "hf": _hf, "reasoning_gym": _reasoning_gym, "gsm8k_solutions": gsm8k.solutions}


class Rows(files.Records):
    """A library's data set, which gives dicts of values by number."""

    def __init__(self, name: str, rows: Any):
        self.name, self.rows = name, rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int) -> Record:
        """Row i, with plain Python values."""
        name = f"{self.name}[{i}]"
        try:
            return Record(name, _plain(self.rows[i]))
        except UnicodeDecodeError:
            raise ValueError(f"{name}: holds bytes that are no UTF-8 text") from None


def _plain(value: Any) -> Any:
    """Text for bytes, numbers and lists for arrays."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _module(source: str, name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{source}: needs the package {package} ({error}); run: pip install {package}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
