"""Checkpoints of a training run, on Orbax: what is trained, the optimizer's state, and the place in the data.

    folder/40/trainable, optimizer, progress   Orbax's
    folder/40/manifest.json                    every file's size and digest, written last: without it, or
                                               where it does not agree with the files, nothing is loaded

The base is never saved. Its fingerprint is, and a run goes on only over the base that it began with.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from lora_jax.fingerprint import fingerprint as fingerprint
from lora_jax.tree import nbytes

MANIFEST = "manifest.json"


class State(NamedTuple):
    """What a run needs to go on as if it had never stopped.

    Args:
      step: updates made.
      trainable: the adapters, or the whole parameters where these are trained.
      optimizer: optax's state.
      progress: JSON: the data iterator's state, seeds, and whatever else the run wants back.
    """

    step: int
    trainable: Any
    optimizer: Any
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: made if it is not there.
      identity: JSON that must be the same whenever the run goes on: `base`, its fingerprint, and
        others such as the spec.
      keep: how many checkpoints are kept, the newest; the one with the highest score is kept besides.
      about: JSON to keep beside them for readers, such as the whole config and the library's version.
      log: told, in one line, of every checkpoint that is passed over.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        identity: Mapping[str, Any],
        keep: int = 2,
        about: Mapping[str, Any] | None = None,
        log: Callable[[str], None] = print,
    ):
        self.folder = Path(folder).absolute()
        self.identity = json.loads(json.dumps(identity))
        self.keep = keep
        self.about = dict(about or {})
        self.log = log
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(enable_async_checkpointing=False, cleanup_tmp_directories=True),
        )

    def save(self, state: State, score: float | None = None) -> None:
        """Writes a checkpoint, and then removes those that are older than the `keep` newest, but for the best.

        Args:
          state: to be written.
          score: how good what was trained is, if that was measured: the higher the better.

        Raises:
          OSError: if it cannot be written; the checkpoints before it are untouched.
        """
        try:
            self._write(state, score)
        except Exception as error:  # Orbax passes on what its several writers raise
            for part in (str(state.step), f"{state.step}.orbax-checkpoint-tmp"):
                shutil.rmtree(self.folder / part, ignore_errors=True)
            last = max(_steps(self.folder), default=None)
            kept = "there is none before it" if last is None else f"the one of step {last} is kept"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise OSError(
                f"{self.folder / str(state.step)}: the checkpoint cannot be written ({reason}); {kept}; "
                "make room and run the same command again"
            ) from error
        for step in {*sorted(_steps(self.folder))[: -self.keep]} - {*_ranked(self.folder)[:1]}:
            shutil.rmtree(self.folder / str(step))

    def restore(self, like: State) -> State | None:
        """Reads the newest checkpoint that is whole.

        Args:
          like: a state of the same structure, shapes and shardings; its values do not matter.

        Returns:
          The state, or None if there is no whole checkpoint.

        Raises:
          ValueError: if it belongs to another identity.
        """
        step = newest(self.folder, self.log)
        if step is None:
            return None
        saved = json.loads((self.folder / str(step) / MANIFEST).read_text())["identity"]
        for name in sorted({*saved, *self.identity}):
            if saved.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{self.folder / str(step)}: its {name} is {saved.get(name)}, this run's is "
                    f"{self.identity.get(name)}; go on with the former, or start a new run in another folder"
                )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(like.trainable),
                optimizer=ocp.args.StandardRestore(_item(like)),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return State(step, restored["trainable"], restored["optimizer"]["state"], restored["progress"])

    def _write(self, state: State, score: float | None) -> None:
        path = self.folder / str(state.step)
        need, free = nbytes((state.trainable, state.optimizer)), shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(f"disk full: {need / 1e6:.1f} MB to write, {free / 1e6:.1f} MB free")
        shutil.rmtree(path, ignore_errors=True)  # a broken one that was passed over
        self._manager.reload()
        self._manager.save(
            state.step,
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(state.trainable),
                optimizer=ocp.args.StandardSave(_item(state)),
                progress=ocp.args.JsonSave(state.progress),
            ),
        )
        manifest = {"identity": self.identity, "about": self.about, "score": score, "files": _digests(path)}
        part = path / f"{MANIFEST}.part"
        with part.open("w") as file:
            json.dump(manifest, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path / MANIFEST)


def newest(folder: str | os.PathLike, log: Callable[[str], None] = print) -> int | None:
    """The step of the newest checkpoint in a folder that is whole; None if there is none.

    Args:
      folder: of checkpoints.
      log: told, in one line, of every newer one that is not.
    """
    for step in sorted(_steps(Path(folder)), reverse=True):
        if (damage := _damage(Path(folder) / str(step))) is None:
            return step
        log(f"passing over checkpoint {Path(folder) / str(step)}: {damage}")
    return None


def best(folder: str | os.PathLike) -> int | None:
    """The step of the whole checkpoint with the highest score in a folder; None if none has one.

    Args:
      folder: of checkpoints.
    """
    return next((step for step in _ranked(Path(folder)) if _damage(Path(folder) / str(step)) is None), None)


def load(folder: str | os.PathLike, like: Any, base: str, step: int | None = None) -> Any:
    """Reads what was trained from a checkpoint of a run, to use it.

    Args:
      folder: of checkpoints.
      like: a tree of the same structure, such as `jax.eval_shape` gives.
      base: fingerprint of the base it is to be used with.
      step: of the checkpoint, such as `best` gives; without it, the newest that is whole.

    Returns:
      The adapters, or the whole parameters where these were trained.

    Raises:
      FileNotFoundError: if there is no whole checkpoint.
      ValueError: if it was trained over another base, or is another tree.
    """
    step = newest(folder) if step is None else step
    if step is None:
        raise FileNotFoundError(f"{folder}: no whole checkpoint; train first")
    path = Path(folder).absolute() / str(step)
    if damage := _damage(path):
        raise ValueError(f"{path}: cannot be read: {damage}")
    saved = json.loads((path / MANIFEST).read_text())["identity"]["base"]
    if saved != base:
        raise ValueError(f"{path}: trained over a base with fingerprint {saved}; this one has {base}")
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        # The shapes are the file's: ranks may have been chosen by the data. Orbax names leaves by all of their keys.
        saved = {_name(keys): leaf for keys, leaf in _named(reader.metadata(path / "trainable").item_metadata.tree)}
        here = [_name(keys) for keys, _ in _named(like)]
        if other := sorted({*saved} ^ {*here}):
            raise ValueError(f"{path}: has another tree, such as {other[0]!r}; use the settings it was trained with")
        like = jax.tree_util.tree_map_with_path(
            lambda keys, x: jax.ShapeDtypeStruct(saved[_name(keys)].shape, x.dtype, sharding=sharding), like
        )
        return reader.restore(path / "trainable", like)


def _named(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _name(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _item(state: State) -> dict[str, Any]:
    """The optimizer's state with the step beside it: Orbax saves no empty tree, as plain SGD's is."""
    return {"step": state.step, "state": state.optimizer}


def _steps(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]


def _ranked(folder: Path) -> list[int]:
    """The steps of the checkpoints that have a score, the best first, and of several such the earliest."""
    scores = {}
    for step in _steps(folder):
        with contextlib.suppress(OSError, ValueError):  # half-written or damaged: it has none
            scores[step] = json.loads((folder / str(step) / MANIFEST).read_text()).get("score")
    return sorted((step for step in scores if scores[step] is not None), key=lambda step: (-scores[step], step))


def _digests(path: Path) -> dict[str, list]:
    """`{file: [size, digest]}` of every file below a folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != f"{MANIFEST}.part")
    return {str(file.relative_to(path)): [file.stat().st_size, _digest(file)] for file in files}


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
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
