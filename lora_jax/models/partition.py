"""Where activations are on a mesh of devices, if one is in context (`with jax.set_mesh(mesh):`); nothing otherwise.

Left to itself XLA may divide activations as weights are, and then gathers whatever meets them. Told where the rows are,
it gathers the shards of weights and sums gradients, and nothing else.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

ROWS = ("data", "fsdp", "expert")  # axes of the mesh along which rows are divided; "tensor" divides what is in a row
EXPERTS = "expert"  # the one of them along which experts are divided as well: there it is tokens that travel


def rows(x: jax.Array) -> jax.Array:
    """x, its first axis divided along `ROWS` and its others whole; as it is, where its rows cannot be divided so."""
    return _divided(x, 0) if _shares(x) > 1 else x


def chunks(x: jax.Array, size: int) -> jax.Array:
    """The tokens of x, [B, T, ...], in chunks [n, N, ...] of `size` or a little more, the last filled up with zeros.

    A chunk has tokens of every device's rows, so that it is divided as these are.
    """
    shares = _shares(x)
    x = x.reshape(shares, -1, *x.shape[2:])
    each = -(-size // shares)
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % each)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(shares, -1, each, *x.shape[2:]).swapaxes(0, 1)
    x = x.reshape(x.shape[0], shares * each, *x.shape[3:])
    return _divided(x, 1) if shares > 1 else x


def apart(f: Callable[..., jax.Array], rows: tuple[jax.Array, ...], stacked: Any) -> jax.Array:
    """f(*rows, stacked, along=...), every device computing its own rows; for what XLA cannot divide, such as a sort.

    Args:
      f: what it gives for a row must not depend on the others.
      rows: arrays whose first axis is divided along `ROWS`.
      stacked: weights, whose first axis numbers experts. Of a divided one a device has its part along `EXPERTS`, and
        the whole along the other axes of `ROWS`.

    Returns:
      What f gives. `along` is the axis of the mesh along which f has a part of the weights, or "" where it has all.
    """
    if _shares(rows[0]) == 1:
        return f(*rows, stacked, along="")
    names = tuple(name for name in _free_axes() if name in ROWS)
    parts = _mesh().shape.get(EXPERTS, 1)
    along = EXPERTS if EXPERTS in names and all(w.shape[0] % parts == 0 for w in jax.tree.leaves(stacked)) else ""
    divided = PartitionSpec(names)
    specs = (*[divided] * len(rows), PartitionSpec(along or None))
    run = functools.partial(f, along=along)
    return jax.shard_map(run, in_specs=specs, out_specs=divided, axis_names=set(names), check_vma=False)(*rows, stacked)


def table(w_VD: jax.Array) -> jax.Array:
    """A table to look rows up in, every row whole on the device that has it."""
    if not _free_axes():
        return w_VD
    return jax.lax.with_sharding_constraint(w_VD, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))


def _divided(x: jax.Array, axis: int) -> jax.Array:
    along = tuple(name for name in _free_axes() if name in ROWS)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*[None] * axis, along))


def _shares(x: jax.Array) -> int:
    """In how many shares the rows of x are divided; 1 where they cannot be."""
    mesh = _mesh()
    shares = math.prod(mesh.shape[name] for name in _free_axes() if name in ROWS)
    return 1 if x.shape[0] % shares else shares


def _mesh() -> jax.sharding.AbstractMesh:
    return jax.sharding.get_abstract_mesh()


def _free_axes() -> list[str]:
    """The axes of the mesh that divide something and are XLA's to use: not those of a `shard_map` around this."""
    mesh = _mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1]
