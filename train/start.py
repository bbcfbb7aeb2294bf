"""How a run begins: what it trains and over which base, newly made by its method or read from an adapter's files."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax.fingerprint import fingerprint
from lora_jax.interop import hf, peft, peft_config
from lora_jax.methods import IA3, DoRA, LoRA, VeRA
from lora_jax.models import decoder
from lora_jax.soft import Prefix, Prompt
from train import loop, methods, placing
from train.config import Config

Tree = Any
# The methods that go on with an adapter, by what is in it; what has nothing of these is low-rank.
GOING_ON = {Prompt: ("prompt",), Prefix: ("prefix",), DoRA: ("dora",), VeRA: ("vera",), IA3: ("ia3",)}
LOW_RANK = ("lora", "lora+", "rslora")


class Start(NamedTuple):
    """What a run trains, before it does.

    Attributes:
      base: what is trained over; None where every parameter is trained.
      trainable: adapters, a prompt, a prefix or all parameters, where they are kept between steps.
      gather: brings that to where it computes.
      trained: what identifies it.
      about: what it is, in words.
    """

    base: Tree
    trainable: Tree
    gather: placing.Gather
    trained: str
    about: str

    def identity(self, model: hf.Checkpoint, data: str, how: str = "") -> dict[str, str]:
        """What must be the same whenever the run goes on: its base, its data's digest, and what is trained how."""
        whole = model.params if self.base is None else self.base
        return {"base": fingerprint(whole), "data": data, "trained": self.trained + how}


def begin(config: Config, model: hf.Checkpoint, f: Callable, batch: Tree) -> Start:
    """Makes or reads what a run trains, on the mesh in context.

    Args:
      config: of the run.
      model: the base.
      f: a function of parameters and a batch, for methods that look at data.
      batch: some.

    Raises:
      FileNotFoundError, ValueError: as `adapters`, and as `methods.start`.
    """
    trained = config.method
    if config.adapter:
        begun = model.params, adapters(config, model, config.force)
        trained = f"{config.method} from {fingerprint(begun[1])}"
    else:
        begun = methods.start(jax.random.key(config.seed), config, model, f, batch)
    base, trainable, gather = placing.started(config, model.config, *begun)
    parameters = f"{lora.count(trainable):,} parameters"
    if config.adapter:
        about = f"{config.model}: going on with {config.method} of {config.adapter}, {parameters}"
        about += f" of {', '.join(trainable)}" if isinstance(trainable, dict) else ""
    elif config.method == "full":
        about = f"{config.model}: training all of its {parameters}"
    elif config.method in methods.SOFT:
        about = f"{config.model}: {config.method} tuning, {parameters}"
    else:
        spec = methods.spec(config)
        trained = f"{config.method} {spec!r}"
        about = f"{config.model}:\n{lora.report(decoder.forward, base, *methods.traced(model), spec=spec)}"
    return Start(base, trainable, gather, trained, about)


def adapters(config: Config, model: hf.Checkpoint, force: bool) -> Tree:
    """Reads what `config.adapter` names: it says what is trained and how large, and the config how.

    Args:
      config: of the run; of `config.lora` the dropout counts.
      model: the base.
      force: do not check that it is the adapter's own; its shapes are enough.

    Returns:
      Adapters, a prompt or a prefix, as `peft.load`.

    Raises:
      FileNotFoundError, ValueError: as `peft.load`; or it is of another method than the config.
    """
    folder = Path(config.adapter)
    if (folder / loop.CONFIG).is_file() and not (folder / peft_config.NAME).is_file():
        raise ValueError(
            f"config.adapter={folder}: is the folder of a run; give its {folder / 'adapter'}, or what train.export "
            "writes of it with --for=peft"
        )
    found = peft.load(folder, model.config, model.params, force)
    kinds = {type(part) for part in (found.values() if isinstance(found, dict) else [found])}
    able = next((names for kind, names in GOING_ON.items() if kind in kinds), LOW_RANK)
    if config.method not in able:
        raise ValueError(f"config.method={config.method!r}: {folder} goes on with {' or '.join(map(repr, able))}")
    if not isinstance(found, dict):
        tokens = jax.tree.leaves(found)[0].shape[-2 if config.method == "prompt" else 1]
        if tokens != methods.tokens(config):
            raise ValueError(f"{folder}: has {tokens} trained tokens; give config.lora.rank={tokens}")
        return jax.tree.map(jnp.asarray, found)
    return {path: jax.tree.map(jnp.asarray, _dropping(part, config.lora.dropout)) for path, part in found.items()}


def _dropping(adapter: Any, share: float) -> Any:
    if isinstance(adapter, DoRA):
        return dataclasses.replace(adapter, lora=_dropping(adapter.lora, share))
    return dataclasses.replace(adapter, dropout=share) if isinstance(adapter, LoRA | VeRA) else adapter
