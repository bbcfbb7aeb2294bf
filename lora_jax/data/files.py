"""Files of records, read one by one: JSONL, JSON, CSV, Parquet, plain text, or a folder of these.

A reader is a sequence that keeps only where its records begin, so that a file may be larger than memory and Grain
can ask for its records in any order. A `.json` file alone is held whole.
"""

import abc
import bisect
import csv
import functools
import io
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

BOM = b"\xef\xbb\xbf"
GROUPS = 4  # of a Parquet file that are kept decoded


class Record(NamedTuple):
    """Columns and their values, and where they come from, such as `train.jsonl:17`."""

    name: str
    values: dict[str, Any]


class Records(Sequence[Record], abc.ABC):
    """Records that are read when they are asked for."""

    @overload
    def __getitem__(self, i: int) -> Record: ...
    @overload
    def __getitem__(self, i: slice) -> list[Record]: ...
    def __getitem__(self, i: int | slice) -> Record | list[Record]:
        """Record i, or some of them."""
        if isinstance(i, slice):
            return [self.read(j) for j in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        return self.read(i % len(self))

    @abc.abstractmethod
    def read(self, i: int) -> Record:
        """Record i, from 0."""


def read(path: Path) -> Records:
    """Opens a file or a folder.

    Args:
      path: of a file ending in .jsonl, .json, .csv, .parquet or .txt, or of a folder with such files, which are read in
        the order of their names.

    Returns:
      The records. Reading one raises ValueError, naming the file and line, if it is broken.

    Raises:
      FileNotFoundError: if there is nothing there.
      ValueError: if it is no such file, or cannot be taken apart into records.
    """
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in READERS and not p.name.startswith("."))
        if not found:
            raise FileNotFoundError(f"{path}: no file in this folder ends in {', '.join(READERS)}")
        return Joined([read(p) for p in found])
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; data.source is a file or folder, tfds:NAME, hf:NAME or reasoning_gym:TASK"
        )
    if path.suffix not in READERS:
        raise ValueError(f"{path}: not a known kind of file; a source ends in {', '.join(READERS)}")
    with path.open("rb") as file:
        if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{path}: UTF-16, not UTF-8; write it again as UTF-8")
    return READERS[path.suffix](path)


class Joined(Records):
    """Several files as one."""

    def __init__(self, parts: Sequence[Records]):
        self.parts = parts
        self.ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def read(self, i: int) -> Record:
        """Record i of all."""
        part = bisect.bisect_right(self.ends, i)
        return self.parts[part][i - self.ends[part]]  # from the part's end


class Pieces(Records):
    """A file cut into pieces, each from a line on: what lines of JSON, of CSV and of text have in common.

    Args:
      path: of the file.
      pieces: `(first line, begin, end)` of every piece, lines from 1 and the others in bytes.
    """

    def __init__(self, path: Path, pieces: Iterator[tuple[int, int, int]]):
        self.path = path
        self.file = path.open("rb")
        self.pieces = np.fromiter(itertools.chain.from_iterable(pieces), np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.pieces)

    def read(self, i: int) -> Record:
        """Record i."""
        line, begin, end = map(int, self.pieces[i])
        name = f"{self.path}:{line}"
        data = os.pread(self.file.fileno(), end - begin, begin)  # threads may read at once
        try:
            return Record(name, self.parse(name, data.decode().rstrip("\r\n")))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not UTF-8: byte {error.start + 1} of the line") from None

    @abc.abstractmethod
    def parse(self, name: str, text: str) -> dict[str, Any]:
        """The columns of one piece."""


class Lines(Pieces):
    """A JSON object a line; empty lines are passed over."""

    def __init__(self, path: Path):
        super().__init__(path, (place for place, line in _lines(path) if line.strip()))

    def parse(self, name: str, text: str) -> dict[str, Any]:
        """The object in a line."""
        try:
            value = json.loads(text.rstrip())
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: not JSON: {error.msg} at column {error.colno}") from None
        except RecursionError:
            raise ValueError(f"{name}: not read: brackets in brackets without end") from None
        return _object(name, value)


class Paragraphs(Pieces):
    """Plain text: what stands between empty lines is the column `text` of a record."""

    def __init__(self, path: Path):
        groups = itertools.groupby(_lines(path), key=lambda line: bool(line[1].strip()))
        paragraphs = ([place for place, _ in group] for full, group in groups if full)
        super().__init__(path, ((places[0][0], places[0][1], places[-1][2]) for places in paragraphs))

    def parse(self, name: str, text: str) -> dict[str, Any]:
        """The paragraph."""
        return {"text": text.rstrip().replace("\r\n", "\n")}


class Table(Pieces):
    """CSV with a line of column names; a quoted value may go on over several lines."""

    def __init__(self, path: Path):
        csv.field_size_limit(sys.maxsize)  # a value may be a whole document
        super().__init__(path, _rows(path))
        if not len(self.pieces):
            raise ValueError(f"{path}: no examples: the file is empty")
        self.columns: list[str] = []
        self.columns = list(self.read(0).values)
        self.pieces = self.pieces[1:]

    def parse(self, name: str, text: str) -> dict[str, Any]:
        """A row by its column names."""
        (row,) = csv.reader(io.StringIO(text, newline=""))
        columns = self.columns or row
        if len(row) != len(columns):
            raise ValueError(f"{name}: {len(row)} values for {len(columns)} columns ({', '.join(columns)})")
        return dict(zip(columns, row, strict=True))


class Whole(Records):
    """A list of JSON objects."""

    def __init__(self, path: Path):
        self.path = path
        try:
            values = json.loads(path.read_bytes().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8: byte {error.start + 1}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(values, list):
            raise ValueError(f"{path}: not a list of objects but a {type(values).__name__}")
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def read(self, i: int) -> Record:
        """Object i."""
        name = f"{self.path}[{i}]"
        return Record(name, _object(name, self.values[i]))


class Groups(Records):
    """Parquet, read by row group; the last few groups are kept."""

    def __init__(self, path: Path):
        import pyarrow
        import pyarrow.parquet

        self.path = path
        try:
            self.file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not Parquet: {error}") from None
        groups = range(self.file.num_row_groups)
        self.ends = list(itertools.accumulate(self.file.metadata.row_group(g).num_rows for g in groups))
        self.group = functools.lru_cache(GROUPS)(self.file.read_row_group)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, i: int) -> Record:
        """Row i."""
        group = bisect.bisect_right(self.ends, i)
        table = self.group(group)
        return Record(f"{self.path}[{i}]", table.slice(i - self.ends[group] + table.num_rows, 1).to_pylist()[0])


def _json(path: Path) -> Records:
    """A list in a file is read whole; many a `.json` file is lines of objects, though."""
    with path.open("rb") as file:
        first = next((line for line in file if line.removeprefix(BOM).strip()), b"")
    try:
        lines = isinstance(json.loads(first.removeprefix(BOM)), dict)
    except ValueError:
        lines = False
    return Lines(path) if lines else Whole(path)


def _lines(path: Path) -> Iterator[tuple[tuple[int, int, int], bytes]]:
    """Every line and its place. A byte order mark is no part of a line."""
    with path.open("rb") as file:
        begin = 0
        for number, line in enumerate(file, 1):
            end = begin + len(line)
            line = line.removeprefix(BOM) if number == 1 else line
            yield (number, end - len(line), end), line
            begin = end


def _rows(path: Path) -> Iterator[tuple[int, int, int]]:
    """The place of every row of a CSV file.

    Only quotes, commas and line ends matter here, and they are the same bytes in every encoding of one byte a letter.
    """
    places: list[tuple[int, int, int]] = []

    def lines() -> Iterator[str]:
        for place, line in _lines(path):
            places.append(place)
            yield line.decode("latin-1")

    try:
        for row in csv.reader(lines(), strict=True):
            if row:
                yield places[0][0], places[0][1], places[-1][2]
            places.clear()
    except csv.Error as error:
        raise ValueError(f"{path}:{places[0][0]}: not CSV: {error}") from None


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}: not an object with 'messages' or 'prompt' but a {type(value).__name__}")
    return value


READERS = {".jsonl": Lines, ".json": _json, ".csv": Table, ".parquet": Groups, ".txt": Paragraphs}
