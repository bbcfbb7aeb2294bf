"""The programs of a run, lowered for devices that need not be there: the training step, and sampling beside it.

Nothing is computed and no weight is read: arrays are shapes with their places on a mesh.
"""

import copy
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax import cost, sharding
from lora_jax.data import packing
from lora_jax.interop import hf
from lora_jax.models import decoder
from lora_jax.models.config import DecoderConfig
from lora_jax.quantize import quantize
from train import config as settings
from train import methods, objective, placing
from train.start import adapters
from train.update import make_update

Tree = Any


class Program(NamedTuple):
    """A program, lowered but not compiled.

    Attributes:
      lowered: as `jax.jit(f).lower(...)` gives it.
      parts: what it is given, shapes with their places, by name.
      flops: of its products, on all devices together.
      kept: bytes that the forward pass keeps for the backward pass, on each device; 0 where there is none.
      away: bytes that each device sends to its host's memory in the forward pass and fetches in the backward pass.
      tokens: that it goes through.
    """

    lowered: Any
    parts: Mapping[str, Tree]
    flops: int
    kept: int
    away: int
    tokens: int


class Kept(NamedTuple):
    """Bytes that the forward pass keeps for the backward pass, in a device's memory and in its host's."""

    device: int
    host: int


def training(
    config: settings.Config, shape: DecoderConfig, mesh: Mesh, dtype: jnp.dtype, length: int, learned: int
) -> Program:
    """The step that `train/sft.py` compiles.

    Args:
      config: of the run.
      shape: of the model.
      mesh: of the devices.
      dtype: of the base.
      length: tokens in a row.
      learned: the most of them that are learned in a row.

    Returns:
      The program, its parts `base`, `adapters` (what is trained), `optimizer` and `batch`.
    """
    parts = state(config, shape, mesh, dtype) | {"batch": _batch(config.batch_size, length, sharding.rows(mesh))}
    trainable, optimizer = parts["adapters"], parts["optimizer"]
    model = _model(config, shape, dtype)
    tx = methods.optimizer(config, trainable, settings.schedule(config, methods.rate(config, shape.dim)))
    key = jax.eval_shape(jax.random.key, 0)
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    places = jax.tree.map(lambda x: x.sharding, (trainable, optimizer))
    specs = placing.weight_specs(config, shape, model.params, mesh)
    _, computing = placing.trained(config, parts["base"], trainable, specs, mesh)
    gather = functools.partial(jax.lax.with_sharding_constraint, shardings=computing)

    def step(shape: DecoderConfig) -> Any:
        loss, tree = _loss(config, dataclasses.replace(model, config=shape), trainable, learned)
        return make_update(loss, tree, tx, config.accumulate, places, gather)

    given = trainable, optimizer, parts["base"], parts["batch"], key
    with jax.set_mesh(mesh):
        placing.check(config)
        lowered = step(shape).lower(*given)
    # What a kernel of attention computes is not to be seen; in chunks it is as much. Nor what of the room for experts'
    # rows is used on each device; on one device there is none.
    flops = cost.flops(step(dataclasses.replace(shape, attention="chunked")), *given)
    row, rows = kept(config, shape, length, learned, dtype), config.batch_size // row_parts(mesh)
    return Program(
        lowered, parts, flops, row.device * rows // config.accumulate, row.host * rows, config.batch_size * length
    )


def state(config: settings.Config, shape: DecoderConfig, mesh: Mesh, dtype: jnp.dtype) -> dict[str, Tree]:
    """What stays on the devices between two steps.

    Args:
      config: of the run.
      shape: of the model.
      mesh: of the devices.
      dtype: of the base.

    Returns:
      `base`, `adapters` (what is trained) and `optimizer`, shapes with their places.
    """
    model = _model(config, shape, dtype)
    base, trainable = _start(config, model)
    specs = placing.weight_specs(config, shape, model.params, mesh)
    where, _ = placing.trained(config, base, trainable, specs, mesh)
    tx = methods.optimizer(config, trainable, settings.schedule(config, methods.rate(config, shape.dim)))
    optimizer = jax.eval_shape(tx.init, trainable)
    return {
        "base": None if base is None else sharding.gathered(placed(base, sharding.places(base, specs, mesh)), specs),
        "adapters": placed(trainable, where),
        "optimizer": placed(optimizer, placing.moments(optimizer, where, mesh)),
    }


def kept(config: settings.Config, shape: DecoderConfig, length: int, learned: int, dtype: jnp.dtype) -> Kept:
    """What the forward pass keeps of a row for the backward pass, on one device.

    Args:
      config: of the run.
      shape: of the model.
      length, learned: as `training`.
      dtype: of the base.
    """
    model = _model(config, shape, dtype)
    base, trainable = _start(config, model)
    loss, tree = _loss(config, model, trainable, learned)

    def residuals(trainable: Tree, base: Tree, batch: Tree) -> Any:
        return jax.vjp(lambda trainable: loss(tree(trainable, base, None), batch)[0], trainable)[1]

    def held(rows: int) -> tuple[int, int]:
        arrays = jax.make_jaxpr(residuals)(trainable, base, _batch(rows, length)).out_avals
        away = [x for x in arrays if x.memory_space is jax.memory.Space.Host]
        return _bytes(arrays), _bytes(away)

    # What does not grow with the rows is no activation.
    (all_1, away_1), (all_2, away_2) = held(1), held(2)
    return Kept(all_2 - all_1 - (away_2 - away_1), away_2 - away_1)


def sampling(config: settings.Config, shape: DecoderConfig, mesh: Mesh, dtype: jnp.dtype, length: int) -> Program:
    """A step of sampling: one token for each of as many rows as the batch has, with a cache of so many tokens a row.

    Args:
      config: of the run; its base is what is sampled from.
      shape: of the model.
      mesh: of the devices.
      dtype: of the base and the cache.
      length: tokens in a row of the cache.

    Returns:
      The program, its parts `base`, `cache` and `batch`.
    """
    model = _model(config, shape, dtype)
    base = _start(config, model)[0] or model.params
    specs = placing.weight_specs(config, shape, base, mesh)
    rows = sharding.rows(mesh)
    cache = jax.eval_shape(lambda: decoder.init_cache(shape, config.batch_size, length, dtype))
    heads = "tensor" if shape.kv_heads % mesh.shape["tensor"] == 0 else None
    keys_values = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH, heads))
    where = {"k": keys_values, "v": keys_values, "positions": rows, "length": NamedSharding(mesh, PartitionSpec())}
    parts = {
        "base": sharding.gathered(placed(base, sharding.places(base, specs, mesh)), specs),
        "cache": placed(cache, where),
        "batch": jax.ShapeDtypeStruct((config.batch_size, 1), jnp.int32, sharding=rows),
    }

    def step(params: Tree, cache: Tree, tokens: jax.Array, positions: jax.Array) -> Any:
        return methods.applied(decoder.forward_with_cache)(params, tokens, shape, positions, cache)

    given = parts["base"], parts["cache"], parts["batch"], parts["batch"]
    with jax.set_mesh(mesh):
        lowered = jax.jit(step, donate_argnums=1).lower(*given)
    return Program(lowered, parts, cost.flops(step, *given), 0, 0, config.batch_size)


def placed(tree: Tree, places: Tree) -> Tree:
    """Shapes with their places."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def bytes_per_chip(tree: Tree, tiled: bool = False) -> int:
    """What one device holds of arrays, or of shapes with their places.

    Args:
      tree: of them.
      tiled: as a TPU holds them, which fills up two axes of each to tiles.
    """
    shards = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree))
    sizes = ((_tiled(shape) if tiled else math.prod(shape), dtype) for shape, dtype in shards)
    return sum(math.ceil(size * _bits(dtype) / 8) for size, dtype in sizes)


def _tiled(shape: tuple[int, ...]) -> int:
    """How many numbers an array takes in tiles of 8 x 128, over the two axes that it fills up least."""
    if len(shape) < 2:
        return math.prod(-(-size // 128) * 128 for size in shape)

    def over(rows: int, columns: int) -> int:
        height = -(-rows // 8) * 8 if rows > 8 else 1 << (rows - 1).bit_length()
        return math.prod(shape) // (rows * columns) * height * -(-columns // 128) * 128

    return min(over(*pair) for pair in itertools.permutations(shape, 2))


def _model(config: settings.Config, shape: DecoderConfig, dtype: jnp.dtype) -> hf.Checkpoint:
    """The base as `methods.load` gives it."""
    params = jax.eval_shape(lambda key: decoder.init(key, shape, dtype), jax.random.key(0))
    model = hf.Checkpoint(shape, params, None, None, None, config.model)
    rules = methods.quantised(config)
    if not rules:
        return model
    sites = methods.sites(model)
    params = jax.eval_shape(lambda params: quantize(params, sites, rules), params)
    return dataclasses.replace(model, params=params)


def _start(config: settings.Config, model: hf.Checkpoint) -> tuple[Tree, Tree]:
    """The base and what is trained, as `start.begin` makes them."""
    if config.adapter:
        return model.params, jax.eval_shape(lambda x: x, adapters(config, model, force=True))
    config = copy.deepcopy(config)
    config.soft_text = ""  # a prompt is as large whatever it starts from, and here is no tokenizer

    def start(key: jax.Array, params: Tree) -> tuple[Tree, Tree]:
        return methods.start(key, config, dataclasses.replace(model, params=params))

    return jax.eval_shape(start, jax.random.key(0), model.params)


def _loss(config: settings.Config, model: hf.Checkpoint, trainable: Tree, learned: int) -> tuple[Any, Any]:
    """The loss of a batch, and the tree that it takes, as `train/sft.py` has them."""
    nll = functools.partial(
        objective.negative_log_likelihood,
        shape=model.config,
        learned=learned,
        remat=config.remat,
        chunk=config.loss_chunk,
        packed=config.data.pack,
        once=bool(config.loss_chunk) and not methods.head_adapted(trainable, model.config),
    )
    return methods.applied(nll), methods.runner(config, model)


def _batch(rows: int, length: int, place: NamedSharding | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """As `packing.batch` makes it."""
    return {
        name: jax.ShapeDtypeStruct((rows, length), x.dtype, sharding=place)
        for name, x in packing.batch([], length).items()
    }


def row_parts(mesh: Mesh) -> int:
    """Among how many devices the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in sharding.BATCH)


def _bytes(tree: Tree) -> int:
    leaves = (x for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))
    return sum(math.ceil(x.size * _bits(x.dtype) / 8) for x in leaves)


def _bits(dtype: Any) -> int:
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return 64  # a random key
    return jax.dtypes.itemsize_bits(dtype)
