"""What a run would take, before anything is rented or downloaded.

`python -m train.plan --config=configs/quickstart.py --topology=v5e:4x4` compiles the training step of a config of
`train/sft.py` for chips that need not be there, with their own compiler, and shows what it takes of each chip, what the
chips exchange and the least time; beside it, full fine-tuning and sampling with a key/value cache, of as many rows.

`config.model` may also name one of `train/architectures.py`, such as llama-3.1-8b: no weight is read. Where the config
has no data, `config.data.length` says how long rows are.
"""

import copy
import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import rich.console
from absl import flags
from jax.sharding import Mesh
from ml_collections import config_flags

from lora_jax import sharding
from lora_jax.data import chat
from lora_jax.interop import hf
from lora_jax.models import kernels
from lora_jax.models.config import DecoderConfig
from train import advice, architectures, examples, forecast, launch, loop, methods, plan_table, programs, topology
from train import config as settings


class Rows(NamedTuple):
    """What a run's batches are made of.

    Attributes:
      shape: of the model.
      length: tokens in a row.
      learned: the most of them that are learned.
      tokens: to learn, in all data.
    """

    shape: DecoderConfig
    length: int
    learned: int
    tokens: int


def main(_: list[str]) -> None:
    """Reads the command line and plans."""
    config, name = launch.settings(CONFIG)
    plan(config, topology.get(TOPOLOGY.value, TARGET.value), rich.console.Console(), name, PICTURE.value, TOKENS.value)


def plan(
    config: settings.Config,
    where: topology.Topology,
    console: rich.console.Console,
    name: str,
    picture: str = "",
    tokens: int = 0,
) -> None:
    """Compiles, and prints what it takes.

    Args:
      config: from `train/config.py`.
      where: what to compile for.
      console: where to print.
      name: of the experiment, for the picture.
      picture: a PNG to draw; "" for none.
      tokens: to learn in the data; 0 to count them.

    Raises:
      ValueError, OSError: with one line that says what to change; also if the run does not fit.
    """
    rows = read(config, tokens)
    mesh, dtype = mesh_of(config, where), dtype_of(config, where)
    rows = rows._replace(shape=attending(config, rows.shape, where, dtype))
    step = programs.training(config, rows.shape, mesh, dtype, rows.length, rows.learned)
    full = programs.training(fully(config), rows.shape, mesh, dtype, rows.length, rows.learned)
    sampled = programs.sampling(config, rows.shape, mesh, dtype, rows.length)
    found = {
        config.method + (f" on {config.quantize}" if config.quantize else ""): forecast.make(step, mesh, where),
        "all parameters": forecast.make(full, mesh, where),
        "sampling": forecast.make(sampled, mesh, where),
    }
    first, _, sampling = found.values()
    fitting = advice.rows_that_fit(config, rows.shape, mesh, dtype, rows.length, rows.learned, first)
    console.print(plan_table.table(found))
    rate, trained = methods.rate(config, rows.shape.dim), advice.trained(step)
    facts = [
        f"{config.model} on {first.chips} x {first.chip}, mesh {dict(first.mesh)}, {config.batch_size} rows of "
        f"{rows.length} tokens, config.remat={config.remat!r}",
        f"between steps: {first.state / sampling.state:.3f} of what sampling keeps without its cache; at the peak: "
        f"{first.peak / sampling.peak:.3f} of sampling's",
        "rows a chip that fit at once, about: "
        + ", ".join(f"{n} with config.remat={remat!r}" for remat, n in fitting.items()),
        advice.capacity(trained, rows.tokens),
        f"the learning rate is {rate:.3g}",
    ]
    if not config.mesh and mesh.size > 1:  # a run's own default is not the plan's
        facts.append(
            f"to run so, give --config.mesh=fsdp={mesh.size}: without it a run takes one device, or a whole base on "
            "each of several hosts' devices"
        )
    console.print("\n".join(facts), soft_wrap=True, highlight=False)
    if picture:
        plan_table.picture(found, f"{name} on {where.name}", Path(picture))
        console.print(f"picture: {picture}")
    if not first.fits:
        raise ValueError(
            f"does not fit: {plan_table.gib(first.peak)} a chip of {plan_table.gib(first.room)}; "
            f"try {advice.changes(config, mesh, first, fitting)}"
        )


def check(config: settings.Config, tokens: int = 0) -> None:
    """Finds what no plan can be made of.

    Args:
      config: of the run.
      tokens: to learn in the data; 0 to count them.

    Raises:
      ValueError: naming the setting.
    """
    if other := sorted(set(config) - set(settings.sft())):
        raise ValueError(
            f"config.{other[0]} is of another trainer, and plans are of train.sft's runs; "
            "give a config of these, such as configs/quickstart.py"
        )
    settings.check_common(config)
    if config.data.stream and config.data.source and not tokens:
        raise ValueError(
            "config.data.stream=True: tokens to learn that are not read yet cannot be counted; give --tokens"
        )


def read(config: settings.Config, tokens: int = 0) -> Rows:
    """The model's shape and the rows of a config's data, or as `config.data.length` says where it has none.

    Args:
      config: of the run.
      tokens: to learn in the data; 0 to count them, or to take those of all steps.

    Raises:
      ValueError, OSError: with one line that says what to change.
    """
    check(config, tokens)
    length, steps = config.data.length, config.steps * config.batch_size
    if config.model in architectures.ARCHITECTURES or not config.data.source:
        if length < 1:
            raise ValueError("config.data.length=0: say how many tokens a row has, where there is no data to read")
        shape = shape_of(config)
        return Rows(shape, length, length, tokens or steps * length)
    model = hf.load(config.model, weights=False)
    format = chat.Format(model.tokenizer, model.chat_template, model.special, loop.started(Path()))
    data = examples.prepare(config, format, methods.room(config, model.config))
    return Rows(model.config, data.length, data.learned, tokens or sum(int(x.learn.sum()) for x in data.tokens))


def shape_of(config: settings.Config) -> DecoderConfig:
    """The shape of a config's model: a known architecture, or what is read from its files."""
    if config.model in architectures.ARCHITECTURES:
        return architectures.decoder(config.model)
    try:
        return hf.load(config.model, weights=False).config
    except FileNotFoundError as error:
        known = ", ".join(architectures.ARCHITECTURES)
        raise FileNotFoundError(f"{error}; to plan, also one of {known}") from None


def attending(
    config: settings.Config, shape: DecoderConfig, where: topology.Topology, dtype: jnp.dtype
) -> DecoderConfig:
    """The shape, its attention computed as the run will; prints by what."""
    kind, why = kernels.choose(config.attention, where.platform, shape, dtype, config.method in methods.SOFT)
    print(f"attention: {kind} ({why})")
    return dataclasses.replace(shape, attention=kind)


def mesh_of(config: settings.Config, where: topology.Topology) -> Mesh:
    """The mesh of a config's line; of an empty one, the base divided over all devices."""
    return sharding.mesh(config.mesh or "fsdp=-1", where.devices)


def dtype_of(config: settings.Config, where: topology.Topology) -> jnp.dtype:
    """The dtype of the base."""
    return jnp.dtype(config.dtype or ("bfloat16" if where.chip.flops else loop.base_dtype()))


def fully(config: settings.Config) -> settings.Config:
    """The same run, all parameters trained."""
    other = copy.deepcopy(config)
    other.method, other.quantize, other.adapter = "full", "", ""
    return other


if __name__ == "__main__":
    CONFIG = config_flags.DEFINE_config_file("config", None, "a file such as configs/quickstart.py")
    TOPOLOGY = flags.DEFINE_string("topology", "here", "v5e:4x4 and the like, h100, h100:8, or here: this machine")
    TARGET = flags.DEFINE_string("target", "", "a file with XLA's description of a GPU, in place of the H100's")
    TOKENS = flags.DEFINE_integer("tokens", 0, "tokens to learn in the data; 0: counted, or those of all steps")
    PICTURE = flags.DEFINE_string("picture", "", "PNG to draw; empty: none")
    launch.run(main, settings.sft)
