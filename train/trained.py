"""What was trained, put back on its base: from the folder of a run, or an adapter in PEFT's files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax import checkpoint, soft
from lora_jax.interop import hf, peft, peft_config
from lora_jax.models import decoder
from train import adapter, loop, methods

Tree = Any


class Found(NamedTuple):
    """What a run has trained.

    Attributes:
      base: what it was trained over; the model's parameters, but for LoftQ. None where every parameter was trained.
      trained: adapters, a prompt, a prefix, or all parameters.
      step: of the checkpoint.
    """

    base: Tree
    trained: Tree
    step: int


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's files."""
    return (folder / peft_config.NAME).is_file()


def read(folder: Path, run: dict[str, Any], model: hf.Checkpoint, log: Callable[[str], None] = print) -> Found:
    """Reads a run's best checkpoint, or where none was evaluated its newest, and tells which.

    Args:
      folder: of the run.
      run: its config, from `loop.resolved`.
      model: the base; of what lies in files, shapes are looked at alone.
      log: told which.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.load`.
    """
    config, key, saved = ConfigDict(run), jax.random.key(run["seed"]), folder / "checkpoints"
    base = model.params
    if run.get("adapter"):
        like = peft.load(folder / loop.BEGAN, model.config, base, force=True)
    elif config.method == "loftq":
        base, like = methods.start(key, config, model)
    else:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)
        like = jax.eval_shape(
            lambda key, params: methods.start(key, config, dataclasses.replace(model, params=params))[1], key, shapes
        )
    best = checkpoint.best(saved)
    step = checkpoint.newest(saved) if best is None else best
    found = checkpoint.load(saved, like, checkpoint.fingerprint(base), step)
    log(f"{folder}: step {step}, {'the newest' if best is None else 'the best'} of its checkpoints")
    return Found(None if config.method == "full" else base, found, step)


def from_run(folder: Path, run: dict[str, Any], model: hf.Checkpoint) -> Tree:
    """What the model of a run runs with: the base with its adapters, or all parameters where these were trained.

    Args:
      folder: of the run.
      run: its config, from `loop.resolved`.
      model: the base.

    Returns:
      What a function that `methods.applied` takes.

    Raises:
      FileNotFoundError, ValueError: as `checkpoint.load`.
    """
    found = read(folder, run, model)
    return methods.runner(ConfigDict(run), model)(found.trained, found.base)


def from_peft(folder: Path, model: hf.Checkpoint) -> Tree:
    """The same of an adapter in PEFT's files.

    Raises:
      FileNotFoundError, ValueError: as `peft.load`.
    """
    found = peft.load(folder, model.config, model.params)
    if isinstance(found, soft.Prompt | soft.Prefix):
        return soft.attach(model.params, found, model.config, keys_values=lora.lift(decoder.keys_values))
    return lora.attach(model.params, found)


def load(folder: Path, model: hf.Checkpoint) -> Tree:
    """The one or the other.

    Raises:
      FileNotFoundError: if the folder is neither.
    """
    return from_peft(folder, model) if is_peft(folder) else from_run(folder, settings(folder), model)


def settings(folder: Path | None) -> dict[str, Any]:
    """The config of a run, or what is known of it: of a PEFT adapter its base; without a folder, the packaged one.

    Raises:
      FileNotFoundError: if the folder is neither.
    """
    known = {"model": "smollm2", "dtype": "", "quantize": "", "method": ""}
    if folder is None:
        return known
    if is_peft(folder):
        named = peft_config.Settings(folder / peft_config.NAME).values.get("base_model_name_or_path") or ""
        return known if named in ("", adapter.PACKAGED) else known | {"model": named}
    if not (folder / loop.CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder}: neither the folder of a run (no {loop.CONFIG}) nor a PEFT adapter (no {peft_config.NAME})"
        )
    return loop.resolved(folder)
