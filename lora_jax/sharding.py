"""How a base, its adapters and its batches lie on a mesh of devices.

Every axis of a weight has a name, such as D or F, and rules say along which axis of the mesh a name is divided. What
adapters are divided along, they have from their weights.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax.adapters import SHARED, Adapter, Along
from lora_jax.stored import is_stored
from lora_jax.tree import Tree, leaves_by_path, nearest, replace

AXES = ("data", "fsdp", "tensor", "expert")
BATCH = ("data", "fsdp", "expert")  # what the rows of a batch are divided along
ACROSS = ("data", "fsdp")  # what may go from one slice of TPUs to another, in a step a few times and not at every layer
# Of the decoder: heads, the MLP's hidden axis and the vocabulary over "tensor"; what is left of a weight along D.
RULES = (
    ("E", "expert"),
    ("F", "tensor"),
    ("S", "tensor"),
    ("H", "tensor"),
    ("K", "tensor"),
    ("V", "tensor"),
    ("D", "fsdp"),
)
SIDES = ("stacked", "inp", "out")
FOLLOW = ("stacked", "tensor")

Specs = Mapping[str, PartitionSpec]


def mesh(text: str, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the axes `AXES` from one line, such as "fsdp=4, tensor=2".

    Args:
      text: sizes by name; an axis that is not named has 1, and one may be -1: what the others leave.
      devices: all of them, unless given.

    Returns:
      The mesh, its sizes multiplying to the number of devices. Where these are of several slices, such as slices of
      TPUs or machines of GPUs, "data" goes across them, and "fsdp" as far as "data" does not.

    Raises:
      ValueError: if an axis is unknown or given twice, the sizes do not multiply to the number of devices, or they
        cannot be laid over slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in AXES:
            raise ValueError(f"mesh {text!r}: no axis {name!r}; there are {', '.join(AXES)}")
        if name in sizes:
            raise ValueError(f"mesh {text!r}: {name} is given twice; give each axis one size")
        if not re.fullmatch(r"-1|[1-9]\d*", size):
            raise ValueError(f"mesh {text!r}: the size of {name} must be a positive number or -1, not {size!r}")
        sizes[name] = int(size)
    open_axes = [name for name in AXES if sizes.get(name) == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(open_axes) > 1:
        raise ValueError(f"mesh {text!r}: only one axis can be -1, not {' and '.join(open_axes)}")
    if open_axes and len(devices) % known == 0:
        sizes[open_axes[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(
            f"mesh {text!r}: its sizes multiply to {known}, and there are {len(devices)} devices; "
            f"sizes that divide them are {_divisors(len(devices))}, and -1 takes what the others leave"
        )
    laid = _laid(text, [sizes.get(name, 1) for name in AXES], devices)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _laid(text: str, sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices in the shape of a mesh, neighbours along an axis being near each other."""
    slices = left = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:  # an axis of the torus is divided by two of the mesh's only where it must be
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    along = ACROSS if devices[0].platform == "tpu" else AXES  # between machines of GPUs any axis is as good
    across = []
    for name, size in zip(AXES, sizes, strict=True):
        across.append(math.gcd(size, left) if name in along else 1)
        left //= across[-1]
    if left > 1:
        raise ValueError(
            f"mesh {text!r}: the devices are of {slices} slices, across which only {' and '.join(along)} go; "
            f"let these multiply to a multiple of {slices}, such as data={slices}"
        )
    within = [size // count for size, count in zip(sizes, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def specs(params: Tree, names: Mapping[str, str], rules: Sequence[tuple[str, str]], mesh: Mesh) -> dict[str, Any]:
    """What each weight is divided along.

    A name is divided by the first rule for it whose axis of the mesh is not yet used by the weight.

    Args:
      params: arrays, or anything with their shapes.
      names: of the axes of every weight, as `{pattern: "L D F"}`; the first pattern that is found in a path counts.
      rules: pairs of a name and an axis of the mesh.
      mesh: from `mesh`.

    Returns:
      `{path: PartitionSpec}`.

    Raises:
      ValueError: if a pattern or a rule matches nothing, a rule is no pair, a weight has no names or another number of
        them, or an axis cannot be divided; with what would do.
    """
    leaves = leaves_by_path(params)
    found, used = {}, set()
    for path, leaf in leaves.items():
        pattern = next((pattern for pattern in names if re.search(pattern, path)), None)
        if pattern is None:
            raise ValueError(f"the axes of {path!r} {list(leaf.shape)} have no names")
        used.add(pattern)
        own = names[pattern].split()
        if len(own) != len(leaf.shape):
            raise ValueError(
                f"{path!r} {list(leaf.shape)} has {len(leaf.shape)} axes, its names are {names[pattern]!r}"
            )
        found[path] = own
    for pattern in names:
        if pattern not in used:
            raise ValueError(f"no parameter matches {pattern!r}, which names axes; nearest: {nearest(pattern, leaves)}")
    every = {name for own in found.values() for name in own}
    for rule in rules:
        if not isinstance(rule, (tuple, list)) or len(rule) != 2:
            raise ValueError(
                f"sharding.rules: {rule!r} is no pair of a name and an axis of the mesh; give pairs, such as "
                '(("F", "tensor"),)'
            )
        name, axis = rule
        if axis not in mesh.shape:
            raise ValueError(f"rule {name!r} -> {axis!r}: the mesh has the axes {', '.join(mesh.shape)}")
        if name not in every:
            raise ValueError(f"rule {name!r} -> {axis!r}: no axis has this name; there are {', '.join(sorted(every))}")
    along = {path: _along(own, rules, mesh) for path, own in found.items()}
    for path, own in found.items():
        for name, size, axis in zip(own, leaves[path].shape, along[path], strict=True):
            if axis and size % mesh.shape[axis]:
                # What would do divides every weight along this axis.
                sizes = [leaves[other].shape[axes.index(axis)] for other, axes in along.items() if axis in axes]
                raise ValueError(
                    f"{path!r} {list(leaves[path].shape)}: axis {name} of size {size} cannot be divided by "
                    f"{axis}={mesh.shape[axis]}; choose {axis} among {_divisors(math.gcd(mesh.size, *sizes))}, "
                    f"or leave the rule for {name} out"
                )
    return {path: PartitionSpec(*axes) for path, axes in along.items()}


def _along(names: Sequence[str], rules: Sequence[tuple[str, str]], mesh: Mesh) -> list[str | None]:
    along: list[str | None] = []
    for name in names:
        along.append(
            next((axis for rule, axis in rules if rule == name and axis not in along and mesh.shape[axis] > 1), None)
        )
    return along


def places(params: Tree, specs: Specs, mesh: Mesh) -> Tree:
    """Where every array of a base is.

    Of a quantised weight the codes are divided as the weight, and its scales as far as the blocks can be; what has not
    its axes is small, and everywhere.

    Args:
      params: arrays, or anything with their shapes.
      specs: from `specs`.
      mesh: from `mesh`.

    Returns:
      A tree of `NamedSharding`, as `jax.device_put` and `jax.jit` take it.

    Raises:
      ValueError: if the codes of a quantised weight cannot be divided as the weight.
    """

    def place(path: str, leaf: Any) -> Any:
        largest = max(math.prod(array.shape) for array in jax.tree.leaves(leaf))

        def one(array: Any) -> NamedSharding:
            spec = specs[path] if len(array.shape) == len(leaf.shape) else PartitionSpec()
            uneven = {
                axis: size for axis, size in zip(spec, array.shape, strict=False) if axis and size % mesh.shape[axis]
            }
            if uneven and math.prod(array.shape) == largest:
                axis, size = next(iter(uneven.items()))
                raise ValueError(
                    f"{path!r} {list(leaf.shape)} is quantised, and its {size} codes along an axis cannot be divided "
                    f"by {axis}={mesh.shape[axis]}; leave it as it is, or choose another mesh"
                )
            return NamedSharding(mesh, PartitionSpec(*(None if axis in uneven else axis for axis in spec)))

        return jax.tree.map(one, leaf)

    return replace(params, {path: place(path, leaf) for path, leaf in leaves_by_path(params).items()})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gathered:
    """A stored weight whose shards travel as they are stored: left to itself XLA gathers what they become.

    Attributes:
      stored: the weight.
      along: what divides its axes where it computes, those of a batch's rows left out.
    """

    stored: Any
    along: tuple[str | None, ...] = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        return self.stored.shape

    @property
    def ndim(self) -> int:
        """How many axes the weight has."""
        return self.stored.ndim

    @property
    def dtype(self) -> Any:
        """The weight's dtype."""
        return self.stored.dtype

    def dequantised(self) -> jax.Array:
        """The weight, of shards that are gathered first."""
        mesh = jax.sharding.get_abstract_mesh()
        free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
        if not free:  # within a `shard_map` it is gathered already
            return self.stored.dequantised()

        def gathered(x: jax.Array) -> jax.Array:
            along = self.along[-x.ndim :] if x.ndim == self.stored.ndim else ()
            return jax.lax.with_sharding_constraint(x, PartitionSpec(*(a if a in free else None for a in along)))

        return jax.tree.map(gathered, self.stored).dequantised()


def gathered(params: Tree, specs: Specs) -> Tree:
    """A base whose quantised weights are gathered in their codes, a quarter of the bytes, where a mesh is in context.

    Args:
      params: of a base.
      specs: from `specs`.

    Returns:
      The same arrays, quantised weights as `Gathered`.
    """
    stored = {path: leaf for path, leaf in leaves_by_path(params).items() if is_stored(leaf)}
    along = {path: tuple(None if axis in BATCH else axis for axis in specs[path]) for path in stored}
    return replace(params, {path: Gathered(leaf, along[path]) for path, leaf in stored.items()})


def adapter_places(
    adapters: Mapping[str, Adapter], specs: Specs, mesh: Mesh, follow: Sequence[str] = FOLLOW
) -> dict[str, Any]:
    """Where every array of the adapters is: divided as its weight along the axes that follow it, whole along others.

    Along stacked axes (experts) and what "tensor" divides, each device has the part that it computes with. Along
    "fsdp" every device has all, and a gradient is summed. What follows "inp" and "out" as well takes less memory, and
    is gathered for every product. `docs/devices.md` counts what each exchanges.

    Args:
      adapters: `{path: adapter}`.
      specs: of the weights, from `specs`.
      mesh: from `mesh`.
      follow: which follow the weight: its axes "stacked", "inp" or "out", or what an axis of the mesh divides.

    Returns:
      A tree of `NamedSharding`.

    Raises:
      ValueError: if `follow` has another word.
    """
    if other := [word for word in follow if word not in (*SIDES, *mesh.shape)]:
        raise ValueError(
            f"adapters follow their weights along {', '.join(map(repr, SIDES))}, or along the axes "
            f"{', '.join(mesh.shape)} of the mesh, not {other[0]!r}"
        )

    def place(path: str, adapter: Adapter) -> Any:
        kept: dict[int | None, Any] = {}
        if not path.startswith(SHARED):
            sides = [axis for side in SIDES if side in follow for axis in getattr(adapter.axes, side)]
            kept = {axis: along for axis, along in enumerate(specs[path]) if axis in sides or along in follow}

        def one(place: Along) -> NamedSharding:
            return NamedSharding(mesh, PartitionSpec(*(kept.get(i) for i in place.axes)))

        return jax.tree.map(one, adapter.layout(), is_leaf=lambda node: isinstance(node, Along))

    return {path: place(path, adapter) for path, adapter in adapters.items()}


def divided(arrays: Tree, places: Tree) -> Tree:
    """Where arrays that compute at `places` are kept until then: divided along every axis of the mesh.

    Those that do not divide an array yet divide the first of its axes that they can: together, which is one gather, or
    else each, the largest first; one that can divide none is left out. A TPU pads the last axes: they come last.

    Args:
      arrays: anything with shapes.
      places: of each, a `NamedSharding`.

    Returns:
      A tree of `NamedSharding`.
    """

    def fits(names: Sequence[str], sizes: Sequence[int], mesh: Mapping[str, int]) -> list[int]:
        parts = math.prod(mesh[name] for name in names)
        return [axis for axis, size in enumerate(sizes) if size % parts == 0]

    def one(array: Any, place: NamedSharding) -> NamedSharding:
        mesh, left = place.mesh.shape, list(place.shard_shape(array.shape))
        along = [names if isinstance(names, tuple) else (names,) if names else () for names in place.spec]
        along += [()] * (len(left) - len(along))
        used = {name for names in along for name in names}
        free = tuple(name for name, size in mesh.items() if size > 1 and name not in used)
        each = [(name,) for name in sorted(free, key=mesh.__getitem__, reverse=True)]
        for names in [free] if fits(free, left, mesh) else each:
            for axis in fits(names, left, mesh)[:1]:
                along[axis] += names
                left[axis] //= math.prod(mesh[name] for name in names)
        return NamedSharding(place.mesh, PartitionSpec(*(names or None for names in along)))

    return jax.tree.map(one, arrays, places)


def rows(mesh: Mesh) -> NamedSharding:
    """Where a batch is: its rows divided along every axis of the mesh that does not divide a row's own computation."""
    return NamedSharding(mesh, PartitionSpec(BATCH))
