"""How operations that leave a weight a weight act on a factored one: one rule per primitive; `products.py` has others.

A rule takes the equation's parameters, its operands (at least one of them `Factored`) and `bind`, which evaluates the
original operation on arrays, and returns the outputs. It raises `NoRule` where the result is not a product of factors.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.factored import Factor, Factored, compact, reshape_groups
from lora_jax.stored import Deferred

Bind = Callable[..., list[Any]]
Rule = Callable[[dict[str, Any], Sequence[Any], Bind], list[Any]]

RULES: dict[str, Rule] = {}


class NoRule(Exception):
    """An operation whose result on a factored weight has no factors; the message says why."""


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers a rule for the primitives of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


def only(args: Sequence[Any], position: int) -> Factored:
    """The factored operand, which must be the one at `position` and no other."""
    if any(isinstance(arg, Factored) and i != position for i, arg in enumerate(args)):
        raise NoRule("a weight arrives where data is expected")
    return args[position]


def rearranged(weight: Factored, w: Any, move: Callable[[jax.Array], jax.Array]) -> Factored | jax.Array:
    """The weight after an operation on its axes.

    Args:
      weight: before.
      w: what the operation made of the base.
      move: does the same to a factor expanded to the weight's axes, of size 1 where it has none, and the rank.

    Returns:
      The weight after.
    """
    return settled(weight.each(w, lambda factor: factor.moved(weight.ndim, move)))


def settled(weight: Factored) -> Factored | jax.Array:
    """A row of an embedding is data, not a weight: nothing is left to factor, and adding it up costs what it is."""
    return weight.added() if weight.ndim <= 1 else weight


@rule("convert_element_type", "reduce_precision")
def _cast(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    dtype = params.get("new_dtype", weight.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise NoRule(f"a cast to {jnp.dtype(dtype).name} is not linear")
    w = weight.w.cast(dtype) if isinstance(weight.w, Deferred) else bind(weight.w)[0]
    return [dataclasses.replace(weight, w=w)]


@rule("copy", "sharding_constraint", "name", "optimization_barrier", "reshard", "device_put")
def _keep(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    # Constraints and tags are meant for the base; the factors are small and follow from it. What is stored in another
    # form passes as it is.
    here = [i for i, arg in enumerate(args) if not (isinstance(arg, Factored) and isinstance(arg.w, Deferred))]
    if len(here) < len(args) and len(args) > 1:
        return list(args)
    outs = list(args)
    if here:
        arrays = bind(*(arg.w if isinstance(arg, Factored) else arg for arg in args))
        for i, array in zip(here, arrays, strict=True):
            outs[i] = dataclasses.replace(args[i], w=array) if isinstance(args[i], Factored) else array
    return outs


@rule("stop_gradient")
def _stop_gradient(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    return [weight.each(weight.based(lambda w: bind(w)[0]), lax.stop_gradient)]


@rule("neg")
def _neg(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    return [_times(weight, weight.based(lambda w: -w), -1)]


@rule("mul")
def _mul(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    return _scaled(args, 0 if isinstance(args[0], Factored) else 1, bind)


@rule("div")
def _div(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    return _scaled(args, 0, bind)


def _scaled(args: Sequence[Any], position: int, bind: Bind) -> list[Any]:
    weight, other = only(args, position), args[1 - position]
    if jnp.ndim(other):
        raise NoRule("a weight may be scaled by a scalar, not by an array")
    operands, one = list(args), list(args)
    one[position] = jnp.ones((), weight.dtype)

    def scaled(w: jax.Array) -> jax.Array:
        operands[position] = w
        return bind(*operands)[0]

    return [_times(weight, weight.based(scaled), bind(*one)[0])]


def _times(weight: Factored, w: Any, scalar: Any) -> Factored:
    """The weight times a scalar, given the base times it."""
    if weight.after is not None:
        raise NoRule("what is added to the weight's product is not linear in it")

    def by(factor: Factor, scalar: Any) -> Factor:
        return dataclasses.replace(factor, array=factor.array * jnp.asarray(scalar).astype(factor.array.dtype))

    gain = weight.gain
    if gain is not None and weight.fan_in:
        gain = by(gain, abs(scalar))  # the norm that it is divided by grows as well
    return dataclasses.replace(weight, w=w, a=tuple(by(f, scalar) for f in weight.a[:1]) + weight.a[1:], gain=gain)


@rule("transpose")
def _transpose(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, (first, *rest) = only(args, 0), params["permutation"]
    layer = None if first else lambda w: lax.transpose(w, [axis - 1 for axis in rest])
    order = (first, *rest, weight.ndim)
    return [rearranged(weight, weight.based(lambda w: bind(w)[0], layer), lambda f: lax.transpose(f, order))]


@rule("rev")
def _rev(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    return [rearranged(weight, weight.based(lambda w: bind(w)[0]), lambda f: lax.rev(f, params["dimensions"]))]


@rule("reshape")
def _reshape(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, new = only(args, 0), params["new_sizes"]
    groups = reshape_groups(weight.shape, new)

    def move(factor: jax.Array) -> jax.Array:
        shape = [1] * len(new)
        for old_axes, new_axes in groups:
            present = [factor.shape[axis] != 1 for axis in old_axes]
            if all(present):
                for axis in new_axes:
                    shape[axis] = new[axis]
            elif any(present):
                raise NoRule(f"the reshape {weight.shape} -> {new} joins an axis of one factor with one of the other")
        return factor.reshape(*shape, factor.shape[-1])

    kept = len(new) > 1 and weight.shape[0] == new[0]
    w = weight.based(lambda w: bind(w)[0], (lambda w: w.reshape(new[1:])) if kept else None)
    return [rearranged(weight, w, move)]


@rule("squeeze")
def _squeeze(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    return [rearranged(weight, weight.based(lambda w: bind(w)[0]), lambda f: lax.squeeze(f, params["dimensions"]))]


@rule("broadcast_in_dim")
def _broadcast(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    w = weight.based(lambda w: bind(w)[0])
    ndim = len(w.shape)

    def move(factor: jax.Array) -> jax.Array:
        shape = [1] * ndim + [factor.shape[-1]]
        for axis, new_axis in enumerate(params["broadcast_dimensions"]):
            shape[new_axis] = factor.shape[axis]
        return factor.reshape(shape)

    return [rearranged(weight, w, move)]


@rule("slice")
def _slice(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    strides = params["strides"] or [1] * weight.ndim
    windows = [slice(*w) for w in zip(params["start_indices"], params["limit_indices"], strides, strict=True)]

    def move(factor: jax.Array) -> jax.Array:
        return factor[tuple(w if factor.shape[axis] != 1 else slice(None) for axis, w in enumerate(windows))]

    return [rearranged(weight, weight.based(lambda w: bind(w)[0]), move)]


@rule("dynamic_slice")
def _dynamic_slice(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, starts = only(args, 0), args[1:]

    def move(factor: jax.Array) -> jax.Array:
        zero = jnp.zeros((), starts[0].dtype)
        start = [s if factor.shape[axis] != 1 else zero for axis, s in enumerate(starts)]
        sizes = [n if factor.shape[axis] != 1 else 1 for axis, n in enumerate(params["slice_sizes"])]
        return lax.dynamic_slice(factor, [*start, zero], [*sizes, factor.shape[-1]])

    sizes = params["slice_sizes"]
    if isinstance(weight.w, Deferred) and not weight.w.moves and list(sizes[1:]) == list(weight.shape[1:]):
        # A layer is sliced off what is stored, not off all layers made into arrays.
        w = weight.w.sliced(lambda x: lax.dynamic_slice_in_dim(x, starts[0], sizes[0]))
    else:
        w = weight.based(lambda w: bind(w, *starts)[0])
    return [rearranged(weight, w, move)]


@rule("split")
def _split(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, axis = only(args, 0), params["axis"]
    ends = list(itertools.accumulate(params["sizes"]))

    def window(i: int) -> Callable[[jax.Array], jax.Array]:
        def move(factor: jax.Array) -> jax.Array:
            if factor.shape[axis] == 1:
                return factor
            return lax.slice_in_dim(factor, ends[i] - params["sizes"][i], ends[i], axis=axis)

        return move

    return [rearranged(weight, _part(weight, bind, i), window(i)) for i in range(len(ends))]


def _part(weight: Factored, bind: Bind, i: int) -> Any:
    return weight.based(lambda w: bind(w)[i])


@rule("unstack")
def _unstack(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, axis = only(args, 0), params["axis"]

    def pick(i: int) -> Callable[[jax.Array], jax.Array]:
        return lambda f: lax.index_in_dim(f, i if f.shape[axis] != 1 else 0, axis, keepdims=False)

    return [rearranged(weight, _part(weight, bind, i), pick(i)) for i in range(weight.shape[axis])]


@rule("stack")
def _stack(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    return [_joined(args, bind, lambda factors: jnp.stack(factors, params["axis"]))]


@rule("concatenate")
def _concatenate(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    axis = params["dimension"]
    for arg in args:
        mixed = isinstance(arg, Factored) and arg.rank and arg.shape[axis] != 1
        if mixed and not (axis in arg.axes("a") and axis in arg.axes("b")):
            raise NoRule("weights are joined along an axis of one factor")
    return [_joined(args, bind, lambda factors: jnp.concatenate(factors, axis), axis)]


def _joined(
    args: Sequence[Any], bind: Bind, join: Callable[[list[jax.Array]], jax.Array], along: int | None = None
) -> Factored:
    if not all(isinstance(arg, Factored) for arg in args):
        raise NoRule("adapted and other weights are joined; give all of them an adapter, or none")
    if any(isinstance(arg.w, Deferred) for arg in args):
        raise NoRule("weights that are stored in another form are joined")
    if len({(arg.shape, form(arg)) for arg in args}) > 1:
        raise NoRule("weights of different shapes, ranks, scales or methods are joined")
    ndim = args[0].ndim

    def joined(*factors: Factor) -> Factor:
        arrays = [factor.expanded(ndim) for factor in factors]
        if along is not None:  # what is the same along an axis is repeated for each of the weights
            arrays = [jnp.repeat(x, n // x.shape[along], along) for x, n in zip(arrays, sizes, strict=True)]
        return compact(join(arrays))

    sizes = [arg.shape[along] if along is not None else 1 for arg in args]
    first, *rest = [dataclasses.replace(arg, w=None, path="") for arg in args]
    whole = jax.tree.map(joined, first, *rest, is_leaf=lambda node: isinstance(node, Factor))
    path = ", ".join(dict.fromkeys(arg.path for arg in args))
    return dataclasses.replace(whole, w=bind(*(arg.w for arg in args))[0], path=path)


def form(value: Any) -> Any:
    """What two weights must have in common to take each other's place: everything but the values and the path."""
    if not isinstance(value, Factored):
        return None
    leaves, structure = jax.tree.flatten(dataclasses.replace(value, path=""))
    return structure, tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in leaves)
