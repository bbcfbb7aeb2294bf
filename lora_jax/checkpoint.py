"""Checkpoints of a training run, on Orbax: what is trained, the optimizer's state, and the place in the data.

    folder/40/trainable, optimizer, progress   Orbax's
    folder/40/manifest.json                    every file's size and digest, written last: without it, or
                                               where it does not agree with the files, nothing is loaded

The base is never saved. Its fingerprint is, and a run goes on only over the base that it began with.

With several hosts each writes what its devices hold, into one folder that all of them see, and the first one the rest.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lora_jax import manifest
from lora_jax.fingerprint import fingerprint as fingerprint
from lora_jax.manifest import MANIFEST as MANIFEST
from lora_jax.manifest import best as best
from lora_jax.manifest import newest as newest
from lora_jax.tree import nbytes

FULL = os.strerror(errno.ENOSPC)  # as Orbax's writers say it too
UNFINISHED = ".orbax-checkpoint-tmp"


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
    """The checkpoints of one run. As a context it waits, at its end, for what is being written.

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
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        if _first():
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f"*{UNFINISHED}"):  # by a run that was killed
                shutil.rmtree(left)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: Any) -> None:
        self.wait()

    def save(self, state: State, score: float | None = None) -> None:
        """Begins to write a checkpoint. When it is whole, those older than the `keep` newest are removed, but the best.

        The arrays are copied before this returns: they may be donated to the next step, which need not wait.

        Args:
          state: to be written.
          score: how good what was trained is, if that was measured: the higher the better.

        Raises:
          OSError: if this one, or the one before, cannot be written; those before it are untouched.
        """
        self.wait()
        try:
            self._begin(state)
        except Exception as error:  # Orbax passes on what its several writers raise
            raise self._failed(state.step, error) from error
        self._writing = self._thread.submit(self._finish, state.step, score)

    def wait(self) -> None:
        """Waits until the last checkpoint is whole.

        Raises:
          OSError: if it cannot be written; those before it are untouched.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def restore(self, like: State) -> State | None:
        """Reads the newest checkpoint that is whole.

        Args:
          like: a state of the same structure, shapes and shardings; its values do not matter.

        Returns:
          The state, or None if there is no whole checkpoint.

        Raises:
          ValueError: if it belongs to another identity.
        """
        self.wait()
        step = _agreed(newest(self.folder, self.log) if _first() else None)
        if step is None:
            return None
        saved = manifest.read(self.folder / str(step))["identity"]
        for name in sorted({*saved, *self.identity}):
            if saved.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{self.folder / str(step)}: its {name} is {saved.get(name)}, this run's is "
                    f"{self.identity.get(name)}; go on with the former, or start a new run in another folder"
                )
        return self._read(step, like)

    def best(self, like: State) -> State | None:
        """Reads the best checkpoint, as `best` finds it.

        Args:
          like: as for `restore`.

        Returns:
          The state, or None if no checkpoint was measured.
        """
        self.wait()
        step = _agreed(best(self.folder) if _first() else None)
        return None if step is None else self._read(step, like)

    def _read(self, step: int, like: State) -> State:
        restored = self._orbax.restore(
            self.folder / str(step),
            args=ocp.args.Composite(
                trainable=ocp.args.StandardRestore(like.trainable),
                optimizer=ocp.args.StandardRestore(_item(like)),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return State(step, restored["trainable"], restored["optimizer"]["state"], restored["progress"])

    def _begin(self, state: State) -> None:
        need, free = nbytes((state.trainable, state.optimizer)), shutil.disk_usage(self.folder).free
        if free < need:
            raise OSError(f"{FULL}: {need / 1e6:.1f} MB to write, {free / 1e6:.1f} MB free")
        self._orbax.save(
            self.folder / str(state.step),
            args=ocp.args.Composite(
                trainable=ocp.args.StandardSave(state.trainable),
                optimizer=ocp.args.StandardSave(_item(state)),
                progress=ocp.args.JsonSave(state.progress),
            ),
            force=True,  # there may be a broken one, which was passed over
        )

    def _finish(self, step: int, score: float | None) -> None:
        try:
            self._orbax.wait_until_finished()  # and, with several hosts, until all of them are
            if _first():
                path = self.folder / str(step)
                manifest.write(path, identity=self.identity, about=self.about, score=score)
        except Exception as error:
            raise self._failed(step, error) from error
        if _first():
            for old in {*sorted(manifest.steps(self.folder))[: -self.keep]} - {*manifest.ranked(self.folder)[:1]}:
                shutil.rmtree(self.folder / str(old))

    def _failed(self, step: int, error: Exception) -> OSError:
        """Removes what there is of a checkpoint; returns what to say of it."""
        for part in (str(step), f"{step}{UNFINISHED}"):
            shutil.rmtree(self.folder / part, ignore_errors=True)
        last = max(manifest.steps(self.folder), default=None)
        kept = "there is none before it" if last is None else f"the one of step {last} is kept"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return OSError(
            f"{self.folder / str(step)}: the checkpoint cannot be written ({reason}); {kept}; "
            f"{'make room' if FULL in str(error) else 'mend that'} and run the same command again"
        )


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
    if wrong := manifest.damage(path):
        raise ValueError(f"{path}: cannot be read: {wrong}")
    saved = manifest.read(path)["identity"]["base"]
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


def _first() -> bool:
    return jax.process_index() == 0


def _agreed(step: int | None) -> int | None:
    """What the first host says: files may show late on others."""
    if jax.process_count() == 1:
        return step
    step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
    return None if step < 0 else step
