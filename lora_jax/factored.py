"""A weight kept as a base and what adapts it, in whatever layout the model has brought it to."""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.stored import Deferred, Move, Weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """An array of some of a weight's axes, in their order, and a last one for the rank (of size 1: the same for all).

    It broadcasts along the axes that it does not have. They are left out of the array rather than kept with size 1,
    so that a factor can be what the adapter stores, as it is, until something moves its axes: a reshaped copy would be
    made of all layers before a scan, and be saved for every layer within it.

    Attributes:
      array: [*axes, R].
      axes: which of the weight's axes those are, ascending.
    """

    array: jax.Array
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def expanded(self, ndim: int) -> jax.Array:
        """The array with all axes of a weight of `ndim`, those that it does not have of size 1."""
        sizes = dict(zip(self.axes, self.array.shape, strict=False))
        return self.array.reshape([sizes.get(axis, 1) for axis in range(ndim)] + [self.array.shape[-1]])

    def moved(self, ndim: int, move: Callable[[jax.Array], jax.Array]) -> Factor:
        """The factor after an operation on the axes of its weight, given as one on the expanded array."""
        return compact(move(self.expanded(ndim)))


def compact(expanded: jax.Array) -> Factor:
    """The factor that an array with all of a weight's axes, some of size 1, and the rank stands for."""
    axes = tuple(axis for axis, n in enumerate(expanded.shape[:-1]) if n != 1)
    return Factor(expanded.reshape(*(expanded.shape[axis] for axis in axes), expanded.shape[-1]), axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class After:
    """What is added to the result of a weight's product: `y + up(act(down y))`, a bottleneck adapter.

    Attributes:
      down: [*stacked, *out, R].
      up: [*stacked, *out, R].
      activation: between them.
    """

    down: Factor
    up: Factor
    activation: Callable[[jax.Array], jax.Array] = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """The weight `g ∘ (w + γ Σ_r a[..., r] b[..., r])`, without the sum being formed.

    `a` and `b` are products of factors, of which LoRA has one each; without any there is no sum. Every factor has some
    of the axes of `w` and broadcasts along the others. A transposition, a slice or a reshape of the weight is then the
    same operation on the base and on each factor, and no rule needs to know which axes were in, out or stacked.

    Attributes:
      w: the base, of the weight's shape and dtype: an array, or what is stored in its place.
      a: the first factors.
      b: the second factors.
      gain: g, of rank 1, or `None` for 1.
      fan_in: 0, or the size of a column: g is then `gain / ‖w + γ a b‖`, the norm taken over the axes that `gain`
        does not have, as a constant of the backward pass.
      after: what is added to the result of a product, or `None`.
      moments: a factor whose gradient becomes Σ x xᵀ over the inputs x that the weight meets, or `None`.
      key: PRNG keys for dropout on the input of the adapter, over stacked axes (a factor of rank 1), or `None`.
      path: where the weight stands in the tree, for error messages.
      scale: γ, multiplied into the R-wide activations: the smallest thing that it can go to.
      dropout: the probability that an element of the input is dropped.
    """

    w: Weight
    a: tuple[Factor, ...] = ()
    b: tuple[Factor, ...] = ()
    gain: Factor | None = None
    after: After | None = None
    moments: Factor | None = None
    key: Factor | None = None
    path: str = dataclasses.field(default="", metadata={"static": True})
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
    fan_in: int = dataclasses.field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.w.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return len(self.w.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the base."""
        return self.w.dtype

    @property
    def rank(self) -> int:
        """R, the size of the axis that is summed over; 0 without factors."""
        return max((factor.array.shape[-1] for factor in (*self.a, *self.b)), default=0)

    def axes(self, name: str) -> set[int]:
        """The axes that the factors `a` or `b` have between them."""
        return {axis for factor in getattr(self, name) for axis in factor.axes}

    def product(self, name: str) -> Factor:
        """The factors `a` or `b` multiplied out to one."""
        if len(factors := getattr(self, name)) == 1:
            return factors[0]
        return compact(functools.reduce(jnp.multiply, [factor.expanded(self.ndim) for factor in factors]))

    @property
    def factors(self) -> list[Factor]:
        """Everything in it that has axes of the weight, but the base."""
        return jax.tree.leaves(dataclasses.replace(self, w=None), is_leaf=_is_factor)

    def each(self, w: Any, change: Callable[[Factor], Factor]) -> Factored:
        """The weight with another base, and every factor changed."""
        rest = jax.tree.map(change, dataclasses.replace(self, w=None), is_leaf=_is_factor)
        return dataclasses.replace(rest, w=w)

    def based(self, move: Move, layer: Move | None = None) -> Weight:
        """The base after an operation on its axes: at once, or where it is stored in another form, when it is used.

        Args:
          move: the operation.
          layer: the same on one layer, if it leaves the first axis alone.
        """
        return self.w.moved(move, layer) if isinstance(self.w, Deferred) else move(self.w)

    def value(self) -> jax.Array:
        """The base as an array."""
        return self.w.value() if isinstance(self.w, Deferred) else self.w

    def resolved(self) -> Factored:
        """The weight with a plain gain: divided by the norm, where there is one.

        Raises:
          ValueError: if the weight was cut along the axes of the norm.
        """
        if self.gain is None or not self.fan_in:
            return self
        over = [axis for axis in range(self.ndim) if axis not in self.gain.axes]
        if math.prod(self.shape[axis] for axis in over) != self.fan_in:
            raise ValueError("it was cut or joined along its input axes, so that the norm of a column is not known")
        unit = (slice(None),) * len(self.gain.axes) + (None,)
        gain = self.gain.array / jax.lax.stop_gradient(_nonzero(_norm(self, over)))[unit]
        return dataclasses.replace(self, gain=Factor(gain, self.gain.axes), fan_in=0)

    def delta(self, dtype: jnp.dtype = jnp.float32, precision: Any = jax.lax.Precision.HIGHEST) -> jax.Array:
        """γ Σ_r a b, broadcast to the weight's shape; summed in `dtype`, in full precision on every platform."""
        if not self.rank:
            return jnp.zeros(self.shape, dtype)
        letters = string.ascii_letters[: self.ndim]
        names, arrays = zip(*(named(f, letters, "Z") for f in (*self.a, *self.b)), strict=True)
        kept = [axis for axis in range(self.ndim) if axis in self.axes("a") | self.axes("b")]
        arrays = [array.astype(dtype) for array in arrays]
        low = jnp.einsum(f"{','.join(names)}->{''.join(letters[axis] for axis in kept)}", *arrays, precision=precision)
        low = low.reshape([n if axis in kept else 1 for axis, n in enumerate(self.shape)])
        return jnp.broadcast_to(self.scale * low, self.shape)

    def added(self) -> jax.Array:
        """The weight as data (rows looked up in an embedding), added up in the base's dtype."""
        value = self.value()
        if self.rank:
            value = value + self.delta(self.dtype, precision=None).astype(self.dtype)
        gain = self.resolved().gain
        return value if gain is None else value * gain.expanded(self.ndim)[..., 0].astype(self.dtype)

    def dense(self) -> jax.Array:
        """The weight itself, added up in float32 and rounded once to the base's dtype.

        Raises:
          ValueError: if it is not a linear map.
        """
        if self.after is not None:
            raise ValueError(f"the adapter of {self.path!r} is not linear in the weight: it cannot be added into it")
        if not self.rank and self.gain is None:
            return self.value()
        total = self.value().astype(jnp.float32) + self.delta()
        if self.gain is not None:
            gain = self.gain.expanded(self.ndim)[..., 0]
            if self.fan_in:
                over = tuple(axis for axis in range(self.ndim) if axis not in self.gain.axes)
                gain = gain / _nonzero(jnp.sqrt(jnp.sum(total**2, over, keepdims=True)))
            total = total * gain
        return total.astype(self.dtype)


def _is_factor(node: Any) -> bool:
    return isinstance(node, Factor)


def named(factor: Factor, letters: Sequence[str], rank: str) -> tuple[str, jax.Array]:
    """A factor as an operand of an einsum: its letters, and its array without a rank axis of size 1.

    Args:
      factor: of a weight.
      letters: one for each axis of the weight.
      rank: the letter of the rank.

    Returns:
      Letters and array.
    """
    name = "".join(letters[axis] for axis in factor.axes)
    if factor.array.shape[-1] == 1:
        return name, factor.array[..., 0]
    return name + rank, factor.array


def _nonzero(norm: jax.Array) -> jax.Array:
    # A column of zeros, of a padded head or a projection that starts at zero, has magnitude 0 and stays as it is.
    return jnp.where(norm > 0, norm, 1)


def _norm(weight: Factored, over: Sequence[int]) -> jax.Array:
    # ‖w + γ a b‖² = ‖w‖² + 2γ Σ_r (wᵀa)∘b + γ² Σ b∘((aᵀa) b) per column: a b is not formed.
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    letters = string.ascii_letters[: weight.ndim]
    columns = "".join(letter for axis, letter in enumerate(letters) if axis not in over)
    w = weight.value().astype(jnp.float32)
    square = jnp.sum(w * w, tuple(over))
    if weight.rank:
        first, second = ("a", "b") if set(over) & weight.axes("a") else ("b", "a")
        (a_axes, a), (b_axes, b) = (
            ("".join(letters[axis] for axis in factor.axes), factor.array)
            for factor in map(weight.product, (first, second))
        )
        stacked = "".join(letter for letter in columns if letter in a_axes)
        cross = einsum(f"{letters},{a_axes}Z->{columns}Z", w, a)
        gram = einsum(f"{a_axes}Z,{a_axes}Y->{stacked}ZY", a, a)
        square += 2 * weight.scale * einsum(f"{columns}Z,{b_axes}Z->{columns}", cross, b)
        square += weight.scale**2 * einsum(f"{stacked}ZY,{b_axes}Z,{b_axes}Y->{columns}", gram, b, b)
    return jnp.sqrt(jnp.maximum(square, 0))  # where terms cancel, rounding may leave less than nothing


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs the axes before a reshape with the axes after it that hold the same elements.

    Axes of size 1 belong to no group.

    Args:
      old: the shape before.
      new: the shape after, of the same number of elements.

    Returns:
      Pairs (old axes, new axes), in order, each the smallest runs of equal product.
    """
    groups = []
    olds = [axis for axis, n in enumerate(old) if n != 1]
    news = [axis for axis, n in enumerate(new) if n != 1]
    while olds or news:
        left, right = [olds.pop(0)], [news.pop(0)]
        n_left, n_right = old[left[0]], new[right[0]]
        while n_left != n_right:
            if n_left < n_right:
                left.append(olds.pop(0))
                n_left *= old[left[-1]]
            else:
                right.append(news.pop(0))
                n_right *= new[right[-1]]
        groups.append((left, right))
    return groups
