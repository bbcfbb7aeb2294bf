"""Where activations are on a mesh of devices, if one is in context (`with jax.set_mesh(mesh):`); nothing otherwise.

Left to itself XLA may divide activations as weights are, and then gathers whatever meets them. Told where the rows are,
it gathers the shards of weights and sums gradients, and nothing else.
"""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

ROWS = ("data", "fsdp", "expert")  # axes of the mesh along which rows are divided; "tensor" divides what is in a row


def rows(x: jax.Array) -> jax.Array:
    """x, its first axis divided along `ROWS` and its others whole; as it is, where its rows cannot be divided so."""
    along = tuple(name for name in _free_axes() if name in ROWS)
    if not along or x.shape[0] % math.prod(_mesh().shape[name] for name in along):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(along))


def table(w_VD: jax.Array) -> jax.Array:
    """A table to look rows up in, every row whole on the device that has it."""
    if not _free_axes():
        return w_VD
    return jax.lax.with_sharding_constraint(w_VD, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))


def _mesh() -> jax.sharding.AbstractMesh:
    return jax.sharding.get_abstract_mesh()


def _free_axes() -> list[str]:
    """The axes of the mesh that divide something and are XLA's to use: not those of a `shard_map` around this."""
    mesh = _mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1]
