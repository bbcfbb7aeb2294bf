"""Walks the metadata of a GGUF file before it is read: a length that lies would be believed, element by element."""

import struct
from pathlib import Path
from typing import BinaryIO

MAGIC, ARRAY, STRING = b"GGUF", 9, 8
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each type of value
DEPTH = 3  # of arrays in arrays


def check(path: Path) -> None:
    """Checks that all lengths in a file's metadata fit into it.

    Args:
      path: of the file.

    Raises:
      ValueError: it is not a GGUF file, or cut, or a length in it lies.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            magic, version, tensors, pairs = struct.unpack("<4sIQQ", file.read(24))
            if magic != MAGIC or version not in (2, 3):
                raise ValueError(f"it begins with {magic!r}, version {version}")
            if tensors > size or pairs > size:
                raise ValueError(f"{tensors} tensors and {pairs} values in {size} bytes")
            for _ in range(pairs):
                _text(file, size)
                (kind,) = struct.unpack("<I", file.read(4))
                _value(file, kind, size, DEPTH)
            for _ in range(tensors):
                _text(file, size)
                (axes,) = struct.unpack("<I", file.read(4))
                if axes > 4:
                    raise ValueError(f"a tensor of {axes} axes")
                file.seek(8 * axes + 12, 1)
        except (struct.error, ValueError) as error:
            raise ValueError(f"{path}: not a whole GGUF file ({error}); download it again") from None


def _text(file: BinaryIO, size: int) -> None:
    (length,) = struct.unpack("<Q", file.read(8))
    _skip(file, length, size)


def _value(file: BinaryIO, kind: int, size: int, depth: int) -> None:
    if kind == STRING:
        _text(file, size)
    elif kind in WIDTHS:
        _skip(file, WIDTHS[kind], size)
    elif kind == ARRAY and depth:
        kind, length = struct.unpack("<IQ", file.read(12))
        if kind in WIDTHS:
            _skip(file, WIDTHS[kind] * length, size)
            return
        if length > size:
            raise ValueError(f"an array of {length} elements in {size} bytes")
        for _ in range(length):
            _value(file, kind, size, depth - 1)
    else:
        raise ValueError(f"a value of type {kind}")


def _skip(file: BinaryIO, count: int, size: int) -> None:
    if count > size - file.tell():
        raise ValueError(f"{count} bytes after byte {file.tell()} of {size}")
    file.seek(count, 1)
