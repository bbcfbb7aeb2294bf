"""Where a run's arrays are on the mesh of `config.mesh`: its base, what is trained, the optimizer's state.

What is trained is kept divided between steps, and gathered where it computes, once in a step.
The mesh is JAX's context: what is made under it is on every device, and the decoder keeps rows divided.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import sharding
from lora_jax.models import keys
from lora_jax.models.config import DecoderConfig
from train import hosts

Tree = Any
Config = Any  # of train/config.py
Places = Callable[[DecoderConfig, Tree], Tree]
Gather = Callable[[Tree], Tree]


def on_mesh(train: Callable[[Config, Path, str], None]) -> Callable[[Config, Path, str], None]:
    """A trainer's `train(config, folder, name)` with the mesh of its config in context, if it names one.

    Several hosts have one in any case: each device takes a part of the rows. One host without a mesh takes one device,
    and says so where there are more.
    """

    @functools.wraps(train)
    def run(config: Config, folder: Path, name: str) -> None:
        line = config.mesh or ("data=-1" if hosts.several() else "")
        if not line and (devices := jax.local_device_count()) > 1:
            print(
                f"one of {devices} devices computes; --config.mesh=data={devices} takes all, a whole base on each, "
                f"fsdp={devices} divides it"
            )
        with jax.set_mesh(sharding.mesh(line)) if line else contextlib.nullcontext():
            train(config, folder, name)

    return run


def check(config: Config) -> None:
    """Finds rows that cannot be divided over the devices of the mesh in context.

    Raises:
      ValueError: naming the setting, and what would do.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    along = {name: sizes[name] for name in sharding.BATCH if sizes.get(name, 1) > 1}
    parts = {"batch_size": config.accumulate, "eval.batch_size": 1}
    for name, count in {"batch_size": config.batch_size, "eval.batch_size": config.eval.get("batch_size", 0)}.items():
        least = parts[name] * math.prod(along.values())
        if count % least:
            by = [f"{axis}={size}" for axis, size in along.items()]
            by += [f"accumulate={parts[name]}"] if parts[name] > 1 else []
            raise ValueError(
                f"config.{name}={count} rows cannot be divided over {', '.join(by)} (config.mesh={config.mesh!r}); "
                f"take a multiple of {least}"
            )


def base(config: Config) -> Places | None:
    """Where a base that is read goes, as `hf.load` takes it; None where there is no mesh."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return None
    return lambda shape, params: sharding.places(params, weight_specs(config, shape, params, mesh), mesh)


def started(config: Config, shape: DecoderConfig, base: Tree, trainable: Tree) -> tuple[Tree, Tree, Gather]:
    """What `methods.start` gives, on the mesh in context; as it is where there is none.

    Returns:
      The base; what is trained, where it is kept; and what brings that to where it computes.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty or base is None:  # all parameters, where these are trained, are where the base was
        return base, trainable, lambda trainable: trainable
    specs = weight_specs(config, shape, base, mesh)
    base = jax.device_put(base, sharding.places(base, specs, mesh))
    places, computing = trained(config, base, trainable, specs, mesh)
    trainable = jax.device_put(trainable, places)
    return (
        sharding.gathered(base, specs),
        trainable,
        functools.partial(jax.lax.with_sharding_constraint, shardings=computing),
    )


def trained(config: Config, base: Tree, trainable: Tree, specs: sharding.Specs, mesh: Mesh) -> tuple[Tree, Tree]:
    """Where what is trained is between steps, and where it computes.

    Adapters compute where the weights do that they adapt, as `config.sharding.follow` says, a prompt or prefix on every
    device. Without a base what is trained is all parameters, which are where the base was.
    """
    if base is None:
        return (sharding.places(trainable, specs, mesh),) * 2
    if isinstance(trainable, dict):
        computing = sharding.adapter_places(trainable, specs, mesh, config.sharding.follow)
    else:
        computing = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), trainable)
    return sharding.divided(trainable, computing) if config.sharding.divide else computing, computing


def moments(optimizer: Tree, where: Tree, mesh: Mesh) -> Tree:
    """Where an optimizer's state is that was made of what is trained: as that, and a count on every device.

    Args:
      optimizer: its state, or the shapes of it.
      where: what is trained is, as `trained` gives it.
      mesh: of the devices.
    """
    own = dict(jax.tree_util.tree_leaves_with_path(where))

    # A moment's path ends as that of the array that it is of; those of what is frozen are not there.
    def place(path: tuple[Any, ...], _: Any) -> NamedSharding:
        ends = (path[i:] for i in range(len(path)))
        return next((own[end] for end in ends if end in own), NamedSharding(mesh, PartitionSpec()))

    return jax.tree_util.tree_map_with_path(place, optimizer)


def whole(tree: Tree) -> Tree:
    """A tree whose arrays of one device are on every device of the mesh in context."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.device_put(x, everywhere) if len(x.devices()) == 1 else x, tree)


def kept(trainable: Tree, optimizer: Tree) -> tuple[Tree, Tree] | None:
    """Where a step leaves what it was given, as `make_update` takes it: where that is; None where there is no mesh."""
    if jax.sharding.get_mesh().empty:
        return None
    return jax.tree.map(lambda x: x.sharding, (trainable, optimizer))


def weight_specs(config: Config, shape: DecoderConfig, params: Tree, mesh: Mesh) -> sharding.Specs:
    """What each weight of a base is divided along, as `config.sharding.rules` say, or the usual ones."""
    names = keys.axis_names(shape)
    known = {name for own in names.values() for name in own.split()}
    rules = config.sharding.rules or [rule for rule in sharding.RULES if rule[0] in known]
    return sharding.specs(params, names, rules, mesh)
