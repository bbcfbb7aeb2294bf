"""What a run trained, apart from all that going on takes: an adapter in PEFT's files, with a card."""

import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lora_jax.interop import peft
from lora_jax.interop.hf import Checkpoint
from train import hosts, loop, methods
from train.config import Config

FOLDER = "adapter"
PACKAGED = "HuggingFaceTB/SmolLM2-135M-Instruct"

Tree = Any


def writer(config: Config, model: Checkpoint, base: Tree) -> Callable[[Path, int, Tree], None] | None:
    """`write` for a run, as `run` takes it; None where every parameter is trained: there is no adapter then."""
    return None if config.method == "full" else functools.partial(write, config=config, model=model, base=base)


def write(folder: Path, step: int, trainable: Tree, *, config: Config, model: Checkpoint, base: Tree) -> None:
    """Writes the adapter of a run into its folder, whole or not at all, or says why PEFT has no such adapter.

    Args:
      folder: of the run.
      step: updates made.
      trainable: adapters, a prompt or a prefix.
      config: of the run.
      model: what was loaded for it.
      base: what was trained over; the model's parameters, but for LoftQ.
    """
    trainable, whole = hosts.whole(trainable), folder / FOLDER
    with tempfile.TemporaryDirectory() as elsewhere:
        # Every host takes part, since the base's fingerprint may be read from all of them; the first one's files count.
        part = folder / f"{FOLDER}.part" if hosts.first() else Path(elsewhere)
        try:
            peft.save(part, trainable, model.config, base, card(folder, config.to_dict(), config.model, step))
        except ValueError as error:
            print(f"{whole}: not written: {error}")
            return
    if not hosts.first():
        return
    shutil.rmtree(whole, ignore_errors=True)
    part.rename(whole)
    size = sum(file.stat().st_size for file in whole.iterdir())
    print(f"{whole}: {size / 1e6:.1f} MB, what was trained, in PEFT's files")


def card(folder: Path, run: dict[str, Any], model: str, step: int | None) -> peft.Card:
    """What is known of a run's adapter.

    Args:
      folder: of the run.
      run: its config, as JSON.
      model: name or folder of the base.
      step: updates made.
    """
    lines = [line for line in loop.read(folder / loop.METRICS) if step is None or line["step"] <= step]
    losses = [line["heldout_loss"] for line in lines if "heldout_loss" in line]
    named = {"held-out loss before": losses[0], "held-out loss after": losses[-1]} if len(losses) > 1 else {}
    began = run.get("adapter", "")
    spec = None if began or run["method"] in (*methods.SOFT, "full") else methods.spec(ConfigDict(run))
    return peft.Card(name(model), spec, run["data"]["source"], step, named, began=began)


def name(model: str) -> str:
    """The name of a base on the hub, where it is the packaged one."""
    return PACKAGED if model == "smollm2" else model
