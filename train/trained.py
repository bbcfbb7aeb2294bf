"""What was trained, put back on its base: from the folder of a run, or an adapter in PEFT's files."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import lora_jax as lora
from lora_jax import checkpoint, soft
from lora_jax.interop import hf, peft, peft_config
from lora_jax.models import decoder
from train import loop, methods

Tree = Any


def is_peft(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's files."""
    return (folder / peft_config.NAME).is_file()


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
    config, key = ConfigDict(run), jax.random.key(run["seed"])
    if config.method == "loftq":
        base, like = methods.start(key, config, model)
    else:
        base, like = model.params, jax.eval_shape(lambda key: methods.start(key, config, model)[1], key)
    found = checkpoint.load(folder / "checkpoints", like, checkpoint.fingerprint(base))
    return methods.runner(config, model)(found, base)


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
    if is_peft(folder):
        return from_peft(folder, model)
    if not (folder / loop.CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder}: neither the folder of a run (no {loop.CONFIG}) nor a PEFT adapter (no {peft_config.NAME})"
        )
    return from_run(folder, loop.resolved(folder), model)
