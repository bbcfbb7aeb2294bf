"""What each operation does to the axes of a parameter: the bookkeeping behind `trace`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

from jax.extend.core import JaxprEqn

from lora_jax import _jaxpr
from lora_jax.factored import reshape_groups


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter in the layout it has at some point of the program, or several of one shape, stacked.

    Attributes:
      paths: the parameters.
      axes: for each axis, the parameter's own axes that it comes from.
      stacked: the parameter's axes from which one layer or expert was picked.
      numbered: those from which matrices were picked by an array of numbers: experts, if a batched product follows.
    """

    paths: tuple[str, ...]
    axes: tuple[frozenset[int], ...]
    stacked: frozenset[int]
    numbered: frozenset[int] = frozenset()

    def arranged(self, axes: Sequence[frozenset[int]]) -> View:
        """The same parameter with other axes."""
        return dataclasses.replace(self, axes=tuple(axes))

    def without(self, axes: Sequence[int]) -> View:
        """The same parameter after one element of some axes was picked."""
        gone = frozenset().union(*(self.axes[axis] for axis in axes))
        kept = [own for axis, own in enumerate(self.axes) if axis not in axes]
        stacked = self.stacked | (gone - frozenset().union(*kept))
        return dataclasses.replace(self, axes=tuple(kept), stacked=stacked)


def union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    """The union of any number of sets."""
    return frozenset().union(*sets)


# --- what an operation does to the axes of a view ---


def moved(eqn: JaxprEqn, views: Sequence[View | None]) -> View | None:
    """The parameter that an operation's result still is; None if it consumes the parameter."""
    name = eqn.primitive.name
    if name in ("stack", "concatenate"):
        return _stacked(eqn, views)
    move = _MOVES.get(name)
    return move(views[0], eqn) if move and views[0] and not any(views[1:]) else None


def _stacked(eqn: JaxprEqn, views: Sequence[View | None]) -> View | None:
    # Weights of one shape put side by side along an axis that none of them has: layers, to be scanned.
    first = views[0]
    if first is None or any(view is None or view.axes != first.axes for view in views):
        return None
    paths = tuple(dict.fromkeys(path for view in views if view for path in view.paths))
    if eqn.primitive.name == "stack":
        axes = list(first.axes)
        axes.insert(eqn.params["axis"], frozenset())
        return dataclasses.replace(first, paths=paths, axes=tuple(axes))
    return None if first.axes[eqn.params["dimension"]] else dataclasses.replace(first, paths=paths)


def _reshaped(view: View, eqn: JaxprEqn) -> View:
    old, new = _jaxpr.shape(eqn.invars[0]), eqn.params["new_sizes"]
    axes = [frozenset[int]()] * len(new)
    for old_axes, new_axes in reshape_groups(old, new):
        own = union(view.axes[axis] for axis in old_axes)
        for axis in new_axes:
            axes[axis] = own
    lost = union(view.axes) - union(axes)  # axes of size 1
    if lost and axes:
        axes[-1] |= lost
    return view.arranged(axes)


def _broadcast(view: View, eqn: JaxprEqn) -> View | None:
    shape, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    if math.prod(shape) != math.prod(_jaxpr.shape(eqn.invars[0])):
        return None  # repeated along an axis: a bias or a norm's scale, used element by element
    axes = [frozenset[int]()] * len(shape)
    for axis, new_axis in enumerate(kept):
        axes[new_axis] = view.axes[axis]
    return view.arranged(axes)


def _picked(view: View, eqn: JaxprEqn) -> View | None:
    # Embedding rows looked up by position are data; a layer picked from a stack is still a weight.
    old, new = _jaxpr.shape(eqn.invars[0]), _jaxpr.shape(eqn.outvars[0])
    picked = [axis for axis, (m, n) in enumerate(zip(old, new, strict=True)) if n == 1 and m > 1]
    if len([n for n in new if n > 1]) < 2 and picked:
        return None
    own = [frozenset[int]() if axis in picked else own for axis, own in enumerate(view.axes)]
    gone = union(view.axes[axis] for axis in picked) - union(own)
    return dataclasses.replace(view, axes=tuple(own), stacked=view.stacked | gone)


def _gathered(view: View, eqn: JaxprEqn) -> View | None:
    numbers, new = eqn.params["dimension_numbers"], _jaxpr.shape(eqn.outvars[0])
    if len(numbers.offset_dims) < 2 or numbers.operand_batching_dims:
        return None
    picked = numbers.collapsed_slice_dims
    if len(numbers.offset_dims) == len(new):
        return view.without(sorted(picked))
    if len(numbers.offset_dims) < len(new) - 1 or len(picked) != 1:
        return None
    axes = [own for axis, own in enumerate(view.axes) if axis not in picked]
    (place,) = set(range(len(new))) - set(numbers.offset_dims)
    axes.insert(place, view.axes[picked[0]])
    return dataclasses.replace(view, axes=tuple(axes), numbered=view.numbered | view.axes[picked[0]])


def _all(view: View, eqn: JaxprEqn) -> View:
    return view


_MOVES: dict[str, Callable[[View, JaxprEqn], View | None]] = {
    **dict.fromkeys(
        ("convert_element_type", "reduce_precision", "copy", "sharding_constraint", "name", "neg", "rev",
         "stop_gradient", "reshard", "device_put", "split", "pvary", "all_gather"),
        _all,
    ),
    "transpose": lambda view, eqn: view.arranged([view.axes[axis] for axis in eqn.params["permutation"]]),
    "reshape": _reshaped,
    "squeeze": lambda view, eqn: view.arranged(
        [own for axis, own in enumerate(view.axes) if axis not in eqn.params["dimensions"]]
    ),
    "unstack": lambda view, eqn: view.without([eqn.params["axis"]]) if len(view.axes) > 2 else None,
    "broadcast_in_dim": _broadcast,
    "slice": _picked,
    "dynamic_slice": _picked,
    "gather": _gathered,
    "mul": lambda view, eqn: view if _jaxpr.shape(eqn.invars[1]) == () else None,
    "div": lambda view, eqn: view if _jaxpr.shape(eqn.invars[1]) == () else None,
}  # fmt: skip


# --- what an operation that consumes a view contracts and batches ---

Consumed = tuple[str, Sequence[int], Sequence[int]]


def consumed(view: View, eqn: JaxprEqn, position: int) -> Consumed:
    """The kind of use that an operation makes of its operand `position`, and which axes it contracts and batches."""
    return _CONSUMERS.get(eqn.primitive.name, _elementwise)(view, eqn, position)


def _elementwise(view: View, eqn: JaxprEqn, position: int) -> Consumed:
    simple = eqn.primitive.name in _ELEMENTWISE
    return ("elementwise" if simple else "other"), (), ()


def _dot(view: View, eqn: JaxprEqn, position: int) -> Consumed:
    contracting, batch = eqn.params["dimension_numbers"]
    if len(view.axes) < 2 and not view.stacked:
        return "elementwise", contracting[position], batch[position]
    return ("expert" if batch[position] else "dense"), contracting[position], batch[position]


def _ragged(view: View, eqn: JaxprEqn, position: int) -> Consumed:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracting, batch = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions if position == 1 else ()
    return "expert", contracting[position], (*batch[position], *groups)


def _lookup(view: View, eqn: JaxprEqn, position: int) -> Consumed:
    numbers = eqn.params["dimension_numbers"]
    if position or len(view.axes) < 2:
        return "other", (), ()
    return "embedding", numbers.start_index_map, numbers.operand_batching_dims


def _convolved(view: View, eqn: JaxprEqn, position: int) -> Consumed:
    _, *window = eqn.params["dimension_numbers"].rhs_spec
    return ("convolution", window, ()) if position == 1 else ("other", (), ())


def _row(view: View, eqn: JaxprEqn, position: int) -> Consumed:
    old, new = _jaxpr.shape(eqn.invars[0]), _jaxpr.shape(eqn.outvars[0])
    picked = [axis for axis, (m, n) in enumerate(zip(old, new, strict=True)) if n == 1 and m > 1]
    return ("embedding", picked, ()) if len(picked) == 1 and len(old) == 2 else ("elementwise", (), ())


_CONSUMERS: dict[str, Callable[[View, JaxprEqn, int], Consumed]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged,
    "gather": _lookup,
    "conv_general_dilated": _convolved,
    "slice": _row,
    "dynamic_slice": _row,
}

_ELEMENTWISE = frozenset(
    [
        "add",
        "sub",
        "mul",
        "div",
        "max",
        "min",
        "pow",
        "integer_pow",
        "exp",
        "log",
        "tanh",
        "logistic",
        "sqrt",
        "rsqrt",
        "square",
        "abs",
        "sign",
        "select_n",
        "broadcast_in_dim",
        "reduce_sum",
        "add_any",
    ]
)
