"""Which checkpoints of a folder are whole: each has a manifest with the size and digest of its every file."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write(path: Path, **about: Any) -> None:
    """Makes a checkpoint whole: writes its manifest, whole or not at all.

    Args:
      path: of the checkpoint; every other file of it is there.
      about: JSON to write besides.
    """
    part = path / f"{MANIFEST}.part"
    with part.open("w") as file:
        json.dump(about | {"files": _digests(path)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path / MANIFEST)


def read(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole."""
    return json.loads((path / MANIFEST).read_text())


def newest(folder: str | os.PathLike, log: Callable[[str], None] = print) -> int | None:
    """The step of the newest checkpoint in a folder that is whole; None if there is none.

    Args:
      folder: of checkpoints.
      log: told, in one line, of every newer one that is not.
    """
    for step in sorted(steps(Path(folder)), reverse=True):
        if (wrong := damage(Path(folder) / str(step))) is None:
            return step
        log(f"passing over checkpoint {Path(folder) / str(step)}: {wrong}")
    return None


def best(folder: str | os.PathLike) -> int | None:
    """The step of the whole checkpoint with the highest score in a folder; None if none has one.

    Args:
      folder: of checkpoints.
    """
    return next((step for step in ranked(Path(folder)) if damage(Path(folder) / str(step)) is None), None)


def steps(folder: Path) -> list[int]:
    """The steps that have a checkpoint, whole or not, in no order."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]


def ranked(folder: Path) -> list[int]:
    """The steps of the checkpoints that have a score, the best first, and of several such the earliest."""
    scores = {}
    for step in steps(folder):
        with contextlib.suppress(OSError, ValueError):  # half-written or damaged: it has none
            scores[step] = read(folder / str(step)).get("score")
    return sorted((step for step in scores if scores[step] is not None), key=lambda step: (-scores[step], step))


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    try:
        files = read(path)["files"]
    except FileNotFoundError:
        return "half-written (it has no manifest.json)"
    except (ValueError, KeyError):
        return "its manifest.json is damaged"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
        if _digest(file) != digest:
            return f"{name} has changed since it was written"
    return None


def _digests(path: Path) -> dict[str, list]:
    """`{file: [size, digest]}` of every file below a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != f"{MANIFEST}.part")
    return {str(file.relative_to(path)): [file.stat().st_size, _digest(file)] for file in files}


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
