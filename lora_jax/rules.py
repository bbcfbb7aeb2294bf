"""How each JAX operation acts on a factored weight: one rule per primitive.

A rule takes the equation's parameters, its operands (at least one of them `Factored`) and `bind`, which evaluates the
original operation on arrays, and returns the outputs. It raises `NoRule` where the result is not a product of factors.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.factored import Factor, Factored, compact, reshape_groups

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


def rearranged(weight: Factored, w: jax.Array, move: Callable[[jax.Array], jax.Array]) -> Factored | jax.Array:
    """The weight after an operation on its axes.

    Args:
      weight: before.
      w: what the operation made of the base.
      move: does the same to a factor expanded to the weight's axes, of size 1 where it has none, and the rank.

    Returns:
      The weight after.
    """
    a, b = (factor.moved(weight.ndim, move) for factor in (weight.a, weight.b))
    key = None if weight.key is None else weight.key.moved(weight.ndim, move)
    return settled(dataclasses.replace(weight, w=w, a=a, b=b, key=key))


def settled(weight: Factored) -> Factored | jax.Array:
    """A row of an embedding is data, not a weight: nothing is left to factor, and adding it up costs what it is."""
    return weight.added() if weight.ndim <= 1 else weight


# --- operations that leave the weight a weight ---


@rule("convert_element_type", "reduce_precision")
def _cast(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    dtype = params.get("new_dtype", weight.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise NoRule(f"a cast to {jnp.dtype(dtype).name} is not linear")
    return [dataclasses.replace(weight, w=bind(weight.w)[0])]


@rule("copy", "copy_p", "sharding_constraint", "name", "optimization_barrier", "reshard", "device_put")
def _keep(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    # Constraints and tags are meant for the base; the factors are small and follow from it.
    outs = bind(*(arg.w if isinstance(arg, Factored) else arg for arg in args))
    return [
        dataclasses.replace(arg, w=out) if isinstance(arg, Factored) else out
        for arg, out in zip(args, outs, strict=True)
    ]


@rule("stop_gradient")
def _stop_gradient(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    a, b = lax.stop_gradient((weight.a, weight.b))
    return [dataclasses.replace(weight, w=bind(weight.w)[0], a=a, b=b)]


@rule("neg")
def _neg(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    return [dataclasses.replace(weight, w=-weight.w, a=dataclasses.replace(weight.a, array=-weight.a.array))]


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
    operands[position], one[position] = weight.w, jnp.ones((), weight.dtype)
    a = weight.a.array * bind(*one)[0].astype(weight.a.array.dtype)
    return [dataclasses.replace(weight, w=bind(*operands)[0], a=dataclasses.replace(weight.a, array=a))]


@rule("transpose")
def _transpose(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    order = (*params["permutation"], weight.ndim)
    return [rearranged(weight, bind(weight.w)[0], lambda f: lax.transpose(f, order))]


@rule("rev")
def _rev(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    return [rearranged(weight, bind(weight.w)[0], lambda f: lax.rev(f, params["dimensions"]))]


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

    return [rearranged(weight, bind(weight.w)[0], move)]


@rule("squeeze")
def _squeeze(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    return [rearranged(weight, bind(weight.w)[0], lambda f: lax.squeeze(f, params["dimensions"]))]


@rule("expand_dims", "broadcast_in_dim")
def _broadcast(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight = only(args, 0)
    w = bind(weight.w)[0]

    def move(factor: jax.Array) -> jax.Array:
        shape = [1] * w.ndim + [factor.shape[-1]]
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

    return [rearranged(weight, bind(weight.w)[0], move)]


@rule("dynamic_slice")
def _dynamic_slice(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, starts = only(args, 0), args[1:]

    def move(factor: jax.Array) -> jax.Array:
        zero = jnp.zeros((), starts[0].dtype)
        start = [s if factor.shape[axis] != 1 else zero for axis, s in enumerate(starts)]
        sizes = [n if factor.shape[axis] != 1 else 1 for axis, n in enumerate(params["slice_sizes"])]
        return lax.dynamic_slice(factor, [*start, zero], [*sizes, factor.shape[-1]])

    return [rearranged(weight, bind(weight.w, *starts)[0], move)]


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

    return [rearranged(weight, w, window(i)) for i, w in enumerate(bind(weight.w))]


@rule("unstack")
def _unstack(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, axis = only(args, 0), params["axis"]

    def pick(i: int) -> Callable[[jax.Array], jax.Array]:
        return lambda f: lax.index_in_dim(f, i if f.shape[axis] != 1 else 0, axis, keepdims=False)

    return [rearranged(weight, w, pick(i)) for i, w in enumerate(bind(weight.w))]


@rule("stack")
def _stack(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    return [_joined(args, bind, lambda factors: jnp.stack(factors, params["axis"]))]


@rule("concatenate")
def _concatenate(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    axis = params["dimension"]
    for arg in args:
        if isinstance(arg, Factored) and arg.shape[axis] != 1 and not (axis in arg.a.axes and axis in arg.b.axes):
            raise NoRule("weights are joined along an axis of one factor")
    return [_joined(args, bind, lambda factors: jnp.concatenate(factors, axis))]


def _joined(args: Sequence[Any], bind: Bind, join: Callable[[list[jax.Array]], jax.Array]) -> Factored:
    if not all(isinstance(arg, Factored) for arg in args):
        raise NoRule("adapted and other weights are joined; give all of them an adapter, or none")
    if len({(arg.shape, arg.rank, arg.a.axes, arg.b.axes, arg.scale, arg.dropout) for arg in args}) > 1:
        raise NoRule("weights of different shapes, ranks or scales are joined")

    def joined(factors: Sequence[Factor]) -> Factor:
        return compact(join([factor.expanded(args[0].ndim) for factor in factors]))

    return dataclasses.replace(
        args[0],
        w=bind(*(arg.w for arg in args))[0],
        a=joined([arg.a for arg in args]),
        b=joined([arg.b for arg in args]),
        key=None if args[0].key is None else joined([arg.key for arg in args]),
        path=", ".join(dict.fromkeys(arg.path for arg in args)),
    )


# --- operations that consume the weight ---


def dropped(weight: Factored, x: jax.Array) -> jax.Array:
    """The input of the adapter: `x`, with dropout if the weight carries a key."""
    if weight.key is None or not weight.dropout:
        return x
    keep = jax.random.bernoulli(weight.key.array.reshape(-1)[0], 1 - weight.dropout, x.shape)
    return jnp.where(keep, x / jnp.asarray(1 - weight.dropout, x.dtype), jnp.zeros((), x.dtype))


def contract(
    weight: Factored,
    x: jax.Array,
    weight_axes: str,
    x_axes: str,
    out_axes: str,
    precision: Any,
    preferred_element_type: Any,
) -> jax.Array:
    """The adapter's part of an einsum of `x` and the weight: `x` with one factor, then with the other.

    The order is the one with fewer multiplications. Two products, never one of three operands, which a compiler may
    reassociate into forming the weight.

    Args:
      weight: the weight, of axes `weight_axes`.
      x: the data, of axes `x_axes`.
      weight_axes: a letter per axis.
      x_axes: a letter per axis; those shared with the weight are contracted, or kept if they are in `out_axes`.
      out_axes: the axes of the result.
      precision: as in `jax.lax.dot_general`.
      preferred_element_type: the result's dtype.

    Returns:
      An array that broadcasts to the result's shape.
    """
    sizes = dict(zip(weight_axes, weight.shape, strict=True)) | dict(zip(x_axes, x.shape, strict=True))
    rank = next(letter for letter in string.ascii_letters if letter not in sizes)
    sizes[rank] = weight.rank
    factors = [("".join(weight_axes[axis] for axis in f.axes) + rank, f.array) for f in (weight.a, weight.b)]

    def cost(letters: set[str]) -> int:
        return math.prod(sizes[letter] for letter in letters)

    def between(first: str, second: str) -> str:
        needed = {*out_axes, *second}
        return "".join(letter for letter in dict.fromkeys(x_axes + first) if letter in needed)

    def total(first: str, second: str) -> int:
        return cost({*x_axes, *first}) + cost({*between(first, second), *second})

    (a_axes, _), (b_axes, _) = factors
    if total(b_axes, a_axes) < total(a_axes, b_axes):
        factors.reverse()
    (first, down), (second, up) = factors
    middle = between(first, second)
    present = "".join(letter for letter in out_axes if letter in middle or letter in second)
    t = jnp.einsum(f"{x_axes},{first}->{middle}", dropped(weight, x), down.astype(x.dtype), precision=precision)
    y = jnp.einsum(
        f"{middle},{second}->{present}",
        t * weight.scale,
        up.astype(x.dtype),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return y.reshape([sizes[letter] if letter in present else 1 for letter in out_axes])


@rule("dot_general")
def _dot_general(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    position = 0 if isinstance(args[0], Factored) else 1
    weight, x = only(args, position), args[1 - position]
    (contracting, batch) = params["dimension_numbers"]
    w_shared = [*contracting[position], *batch[position]]
    x_shared = [*contracting[1 - position], *batch[1 - position]]
    letters = iter(string.ascii_letters)
    w_axes = [next(letters) for _ in range(weight.ndim)]
    pairs = dict(zip(x_shared, w_shared, strict=True))
    x_axes = [w_axes[pairs[axis]] if axis in pairs else next(letters) for axis in range(x.ndim)]
    free_w = [letter for axis, letter in enumerate(w_axes) if axis not in w_shared]
    free_x = [letter for axis, letter in enumerate(x_axes) if axis not in x_shared]
    free = free_w + free_x if position == 0 else free_x + free_w
    out_axes = [w_axes[axis] for axis in batch[position]] + free
    y = bind(*(arg.w if isinstance(arg, Factored) else arg for arg in args))[0]
    low = contract(
        weight,
        x,
        "".join(w_axes),
        "".join(x_axes),
        "".join(out_axes),
        params["precision"],
        params["preferred_element_type"],
    )
    return [y + low.astype(y.dtype)]


@rule("ragged_dot_general")
def _ragged_dot(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, (x, _, groups) = only(args, 1), args
    numbers = params["ragged_dot_dimension_numbers"]
    (x_in, w_in), (x_batch, _) = numbers.dot_dimension_numbers
    rows = [axis for axis in range(x.ndim) if axis not in x_in]
    (group,) = numbers.rhs_group_dimensions or (None,)
    kept = [axis for axis in range(weight.ndim) if axis != group and axis not in w_in]
    if group is None or x_batch or len(rows) != 1 or len(w_in) != 1 or len(kept) != 1:
        raise NoRule("only the grouped product [M, D] x [E, D, F] of ragged_dot has a rule")
    order = (group, w_in[0], kept[0])
    experts, d, f = (weight.shape[axis] for axis in order)

    def factor(factor: Factor, n: int) -> jax.Array:
        value = lax.transpose(factor.expanded(weight.ndim), (*order, weight.ndim))
        return jnp.broadcast_to(value, (experts, *value.shape[1:])).reshape(experts, n, weight.rank).astype(x.dtype)

    if (w_in[0] in weight.a.axes) == (w_in[0] in weight.b.axes):
        raise NoRule("the contracted axis of ragged_dot must be in one factor")
    first, second = (weight.a, weight.b) if w_in[0] in weight.a.axes else (weight.b, weight.a)
    x_MD = x if x_in[0] == 1 else x.T
    t_MR = weight.scale * lax.ragged_dot(dropped(weight, x_MD), factor(first, d), groups)
    low = lax.ragged_dot(t_MR, factor(second, f).swapaxes(1, 2), groups)
    y = bind(x, weight.w, groups)[0]
    return [y + low.astype(y.dtype)]


@rule("gather")
def _gather(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, indices = only(args, 0), args[1]
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    indexed = [*numbers.start_index_map, *numbers.operand_batching_dims]
    w = bind(weight.w, indices)[0]
    offset = numbers.offset_dims
    batch = [axis for axis in range(w.ndim) if axis not in offset]
    sliced = [axis for axis in range(weight.ndim) if axis not in numbers.collapsed_slice_dims]
    sliced = [axis for axis in sliced if axis not in numbers.operand_batching_dims]

    def move(factor: jax.Array) -> jax.Array:
        shape = [1] * w.ndim + [factor.shape[-1]]
        for out_axis, axis in zip(offset, sliced, strict=True):
            shape[out_axis] = sizes[axis] if factor.shape[axis] != 1 else 1
        if not any(factor.shape[axis] != 1 for axis in indexed):
            return factor.reshape(shape)
        if not all(factor.shape[axis] != 1 for axis in numbers.operand_batching_dims):
            raise NoRule("a batched gather along an axis of one factor")
        for out_axis in batch:
            shape[out_axis] = w.shape[out_axis]
        # An index along an axis that this factor does not have must not move it.
        there = jnp.array([factor.shape[axis] != 1 for axis in numbers.start_index_map])
        picked = lax.gather(
            factor,
            jnp.where(there, indices, jnp.zeros((), indices.dtype)),
            numbers._replace(offset_dims=(*offset, w.ndim)),
            [n if factor.shape[axis] != 1 else 1 for axis, n in enumerate(sizes)] + [factor.shape[-1]],
            mode=params["mode"],
            indices_are_sorted=params["indices_are_sorted"],
            unique_indices=params["unique_indices"],
            fill_value=params["fill_value"],
        )
        return picked.reshape(shape)

    looked_up = [axis for axis in indexed if (axis in weight.a.axes) != (axis in weight.b.axes)]
    if not looked_up:  # a layer or an expert was picked: what is left is still a weight
        return [rearranged(weight, w, move)]
    a, b = (factor.moved(weight.ndim, move) for factor in (weight.a, weight.b))
    return [dataclasses.replace(weight, w=w, a=a, b=b, key=None).added()]


@rule("conv_general_dilated")
def _conv(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    x, weight = args[0], only(args, 1)
    numbers = params["dimension_numbers"]
    (out_axis, *window), feature = numbers.rhs_spec, numbers.out_spec[1]
    groups = params["feature_group_count"]
    if params["batch_group_count"] != 1:
        raise NoRule("a convolution with batch groups")
    inner, outer = weight.a, weight.b
    if out_axis in inner.axes:
        inner, outer = outer, inner
    if out_axis in inner.axes or any(axis in outer.axes for axis in window):
        raise NoRule("a convolution whose output axis is not in a factor of its own")
    kernel = jnp.moveaxis(jnp.squeeze(inner.expanded(weight.ndim), out_axis), -1, out_axis)
    kernel = jnp.concatenate([kernel] * groups, axis=out_axis).astype(x.dtype)
    t = lax.conv_general_dilated(
        dropped(weight, x),
        kernel,
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        numbers,
        groups,
        precision=params["precision"],
    )
    t = weight.scale * jnp.moveaxis(t, feature, -1)
    t = t.reshape(*t.shape[:-1], groups, weight.rank)
    up = outer.array.reshape(groups, -1, weight.rank).astype(x.dtype)
    low = jnp.einsum(
        "...gr,gor->...go",
        t,
        up,
        precision=params["precision"],
        preferred_element_type=params["preferred_element_type"],
    )
    y = bind(x, weight.w)[0]
    return [y + jnp.moveaxis(low.reshape(*low.shape[:-2], -1), -1, feature).astype(y.dtype)]
