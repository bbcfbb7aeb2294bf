"""How operations that multiply data with a factored weight act: one rule per primitive, as in `rules.py`."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.factored import After, Factor, Factored, named
from lora_jax.rules import Bind, NoRule, only, rearranged, rule
from lora_jax.stored import Deferred, used

Named = list[tuple[str, jax.Array]]


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
    first, second = ([named(f, weight_axes, rank) for f in group] for group in (weight.a, weight.b))

    def cost(letters: set[str]) -> int:
        return math.prod(sizes[letter] for letter in letters)

    def between(first: set[str], second: set[str]) -> set[str]:
        return {*x_axes, *first} & {*out_axes, *second}

    def total(first: set[str], second: set[str]) -> int:
        return cost({*x_axes, *first}) + cost(between(first, second) | second)

    a, b = ({letter for name, _ in group for letter in name} for group in (first, second))
    if total(b, a) < total(a, b):
        (first, a), (second, b) = (second, b), (first, a)

    def through(t: jax.Array, t_axes: str, factors: Named, later: set[str], **how: Any) -> tuple[jax.Array, str]:
        # One factor after the other, the one that leaves least first.
        def left(i: int) -> str:
            needed = later.union(*(name for j, (name, _) in enumerate(factors) if j != i))
            return "".join(letter for letter in dict.fromkeys(t_axes + factors[i][0]) if letter in needed)

        i = min(range(len(factors)), key=lambda i: cost(set(left(i))))
        (name, array), rest = factors[i], factors[:i] + factors[i + 1 :]
        last = {} if rest else how
        t = jnp.einsum(f"{t_axes},{name}->{left(i)}", t, array.astype(x.dtype), precision=precision, **last)
        return through(t, left(i), rest, later, **how) if rest else (t, left(i))

    t, middle = through(dropped(weight, x), x_axes, first, {*out_axes, *b})
    order = "".join(letter for letter in out_axes if letter in middle or letter in b)
    y, axes = through(t * weight.scale, middle, second, {*out_axes}, preferred_element_type=preferred_element_type)
    y = jnp.einsum(f"{axes}->{order}", y) if axes != order else y
    return y.reshape([sizes[letter] if letter in order else 1 for letter in out_axes])


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
    letters = "".join(w_axes), "".join(x_axes), "".join(out_axes)
    weight = _resolved(weight)
    gain, where = _gain(weight.gain, weight.shape, *letters)
    if where == "in":
        x = (x * gain).astype(x.dtype)
    if weight.moments is not None:
        x = _measured(weight.moments, x, *letters)

    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return bind(*((w, x) if position == 0 else (x, w)))[0]

    y = used(product, weight.w, x)
    if weight.rank:
        y = y + contract(weight, x, *letters, params["precision"], params["preferred_element_type"]).astype(y.dtype)
    if where == "out":
        y = (y * gain).astype(y.dtype)
    if weight.after is not None:
        y = y + _after(weight.after, y, *letters)
    return [y]


def _resolved(weight: Factored) -> Factored:
    try:
        return weight.resolved()
    except ValueError as reason:
        raise NoRule(str(reason)) from None


def _gain(
    factor: Factor | None, shape: Sequence[int], weight_axes: str, x_axes: str, out_axes: str
) -> tuple[jax.Array, str]:
    """The gain, broadcasting against the data or against the result, and which of the two ("" without one)."""
    if factor is None:
        return jnp.ones(()), ""
    name = "".join(weight_axes[axis] for axis in factor.axes)
    sizes = dict(zip(weight_axes, shape, strict=True))
    for where, axes in (("out", out_axes), ("in", x_axes)):
        if set(name) <= set(axes):
            order = "".join(letter for letter in axes if letter in name)
            gain = jnp.einsum(f"{name}->{order}", factor.array[..., 0])
            return gain.reshape([sizes[letter] if letter in name else 1 for letter in axes]), where
    raise NoRule("the axes that are rescaled are partly contracted and partly kept")


def _after(after: After, y: jax.Array, weight_axes: str, x_axes: str, out_axes: str) -> jax.Array:
    """up(act(down y)), over the axes that the product has from the weight alone."""
    rank = next(letter for letter in string.ascii_letters if letter not in weight_axes + x_axes)
    factors = [("".join(weight_axes[i] for i in f.axes) + rank, f.array) for f in (after.down, after.up)]
    (down, down_array), (up, up_array) = factors
    if not set(down) - {rank} <= set(out_axes):
        raise NoRule("a bottleneck sits on the output of a product, and this one contracts its axes")
    low = "".join(letter for letter in out_axes if letter not in down or letter in x_axes) + rank
    t = after.activation(jnp.einsum(f"{out_axes},{down}->{low}", y, down_array.astype(y.dtype)))
    return jnp.einsum(f"{low},{up}->{out_axes}", t, up_array.astype(y.dtype))


def _measured(moments: Factor, x: jax.Array, weight_axes: str, x_axes: str, out_axes: str) -> jax.Array:
    """`x` itself, with Σ x xᵀ over what is contracted as the gradient of the weight's `moments`."""
    name = "".join(weight_axes[axis] for axis in moments.axes)
    inner = [letter for letter in name if letter in x_axes and letter not in out_axes]
    spare = iter(letter for letter in string.ascii_letters if letter not in weight_axes + x_axes)
    other = {letter: next(spare) for letter in inner}
    again = "".join(other.get(letter, letter) for letter in x_axes)

    @jax.custom_vjp
    def measured(x: jax.Array, _: jax.Array) -> jax.Array:
        return x

    def forward(x: jax.Array, _: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x, x

    def backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        x32 = x.astype(jnp.float32)
        second = jnp.einsum(f"{x_axes},{again}->{name}{''.join(other.values())}", x32, x32)
        return dy, second.reshape(moments.array.shape)

    measured.defvjp(forward, backward)
    return measured(x, moments.array)


@rule("ragged_dot_general")
def _ragged_dot(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, (x, _, groups) = _resolved(only(args, 1)), args
    _linear(weight, "a grouped product")
    numbers = params["ragged_dot_dimension_numbers"]
    (x_in, w_in), (x_batch, _) = numbers.dot_dimension_numbers
    rows = [axis for axis in range(x.ndim) if axis not in x_in]
    (group,) = numbers.rhs_group_dimensions or (None,)
    kept = [axis for axis in range(weight.ndim) if axis != group and axis not in w_in]
    if group is None or x_batch or len(rows) != 1 or len(w_in) != 1 or len(kept) != 1:
        raise NoRule("only the grouped product [M, D] x [E, D, F] of ragged_dot has a rule")
    order = (group, w_in[0], kept[0])
    experts, d, f = (weight.shape[axis] for axis in order)
    y = used(lambda w, x: bind(x, w, groups)[0], weight.w, x)
    x_MD = x if x_in[0] == 1 else x.T

    def each(factor: Factor, n: int) -> jax.Array:
        value = lax.transpose(factor.expanded(weight.ndim), (*order, weight.ndim))
        return jnp.broadcast_to(value, (experts, *value.shape[1:])).reshape(experts, n, -1).astype(x.dtype)

    if weight.rank:
        if (w_in[0] in weight.axes("a")) == (w_in[0] in weight.axes("b")):
            raise NoRule("the contracted axis of ragged_dot must be in one factor")
        first, second = weight.product("a"), weight.product("b")
        if w_in[0] not in first.axes:
            first, second = second, first
        t_MR = weight.scale * lax.ragged_dot(dropped(weight, x_MD), each(first, d), groups)
        y = y + lax.ragged_dot(t_MR, each(second, f).swapaxes(1, 2), groups).astype(y.dtype)
    if weight.gain is not None:
        if w_in[0] in weight.gain.axes:
            raise NoRule("the contracted axis of ragged_dot is rescaled")
        expert_M = jnp.repeat(jnp.arange(experts), groups, total_repeat_length=x_MD.shape[0])
        gain_EF = jnp.broadcast_to(lax.transpose(weight.gain.expanded(3), (*order, 3))[:, 0, :, 0], (experts, f))
        y = (y * gain_EF[expert_M]).astype(y.dtype)
    return [y]


@rule("gather")
def _gather(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    weight, indices = only(args, 0), args[1]
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    indexed = [*numbers.start_index_map, *numbers.operand_batching_dims]
    w = _picked(weight, params, indices, bind)
    offset, ndim = numbers.offset_dims, len(w.shape)
    batch = [axis for axis in range(ndim) if axis not in offset]
    sliced = [axis for axis in range(weight.ndim) if axis not in numbers.collapsed_slice_dims]
    sliced = [axis for axis in sliced if axis not in numbers.operand_batching_dims]

    def move(factor: jax.Array) -> jax.Array:
        shape = [1] * ndim + [factor.shape[-1]]
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
            numbers._replace(offset_dims=(*offset, ndim)),
            [n if factor.shape[axis] != 1 else 1 for axis, n in enumerate(sizes)] + [factor.shape[-1]],
            mode=params["mode"],
            indices_are_sorted=params["indices_are_sorted"],
            unique_indices=params["unique_indices"],
            fill_value=params["fill_value"],
        )
        return picked.reshape(shape)

    if weight.rank:  # nothing is left of a factor but its rank
        looked_up = any(not weight.axes(name).difference(indexed) for name in "ab")
    else:
        looked_up = any(axis not in weight.gain.axes for axis in indexed) if weight.gain else len(sliced) < 2
    if not looked_up:  # layers or experts were picked: what is left is still a weight
        return [rearranged(weight, w, move)]
    _linear(weight, "a lookup")
    rows = dataclasses.replace(_resolved(weight), key=None)
    return [rows.each(w, lambda factor: factor.moved(weight.ndim, move)).added()]


def _picked(weight: Factored, params: dict[str, Any], indices: Any, bind: Bind) -> Any:
    """The base after a lookup; layers are picked off what is stored, not off all layers made into arrays."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    first = numbers.start_index_map == numbers.collapsed_slice_dims == (0,) and not numbers.operand_batching_dims
    layers = first and tuple(sizes[1:]) == tuple(weight.shape[1:])
    leading = numbers.offset_dims == tuple(range(indices.ndim - 1, indices.ndim - 2 + weight.ndim))
    if isinstance(weight.w, Deferred) and weight.w.by_parts and layers and leading:
        return weight.w.sliced(lambda x: x.at[indices[..., 0]].get(mode=params["mode"]))
    return weight.based(lambda w: bind(w, indices)[0])


@rule("conv_general_dilated")
def _conv(params: dict[str, Any], args: Sequence[Any], bind: Bind) -> list[Any]:
    x, weight = args[0], _resolved(only(args, 1))
    _linear(weight, "a convolution")
    numbers = params["dimension_numbers"]
    _, *window = numbers.rhs_spec
    feature = numbers.out_spec[1]
    y = used(lambda w, x: bind(x, w)[0], weight.w, x)
    if weight.rank:
        y = y + _low_rank_conv(weight, x, params).astype(y.dtype)
    if weight.gain is not None:
        if any(axis in window for axis in weight.gain.axes):
            raise NoRule("a convolution whose input is rescaled")
        shape = [n if axis == feature else 1 for axis, n in enumerate(y.shape)]
        y = (y * weight.gain.expanded(weight.ndim).reshape(shape)).astype(y.dtype)
    return [y]


def _low_rank_conv(weight: Factored, x: jax.Array, params: dict[str, Any]) -> jax.Array:
    """A convolution with R output channels, and a product over them."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    (out_axis, *window), feature = numbers.rhs_spec, numbers.out_spec[1]
    if params["batch_group_count"] != 1:
        raise NoRule("a convolution with batch groups")
    inner, outer = weight.product("a"), weight.product("b")
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
    return jnp.moveaxis(low.reshape(*low.shape[:-2], -1), -1, feature)


def _linear(weight: Factored, operation: str) -> None:
    if weight.after is not None or weight.moments is not None:
        raise NoRule(f"a bottleneck or a measurement sits on a product, and this is {operation}")
