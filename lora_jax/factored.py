"""A weight kept as a base and a product of two factors, in whatever layout the model has brought it to."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """One factor of a weight: an array of some of the weight's axes, in their order, and a last one for the rank.

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
class Factored:
    """The weight `w + γ Σ_r a[..., r] b[..., r]`, without the sum being formed.

    Each factor has some of the axes of `w` and broadcasts along the others. A transposition, a slice or a reshape of
    the weight is then the same operation on the base and on each factor, and no rule needs to know which axes were in,
    out or stacked.

    Attributes:
      w: the base, of the weight's shape and dtype.
      a: the first factor.
      b: the second factor.
      key: PRNG keys for dropout on the input of the adapter, over stacked axes (a factor of rank 1), or `None`.
      path: where the weight stands in the tree, for error messages.
      scale: γ, multiplied into the R-wide activations: the smallest thing that it can go to.
      dropout: the probability that an element of the input is dropped.
    """

    w: jax.Array
    a: Factor
    b: Factor
    key: Factor | None
    path: str = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.w.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return self.w.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the base."""
        return self.w.dtype

    @property
    def rank(self) -> int:
        """R, the size of the axis that is summed over."""
        return self.a.array.shape[-1]

    def delta(self, dtype: jnp.dtype = jnp.float32, precision: Any = jax.lax.Precision.HIGHEST) -> jax.Array:
        """γ Σ_r a b, broadcast to the weight's shape; summed in `dtype`, in full precision on every platform."""
        letters = string.ascii_letters[: self.ndim]
        names = ["".join(letters[axis] for axis in factor.axes) for factor in (self.a, self.b)]
        kept = [axis for axis in range(self.ndim) if axis in self.a.axes or axis in self.b.axes]
        low = jnp.einsum(
            f"{names[0]}Z,{names[1]}Z->{''.join(letters[axis] for axis in kept)}",
            self.a.array.astype(dtype),
            self.b.array.astype(dtype),
            precision=precision,
        )
        low = low.reshape([n if axis in kept else 1 for axis, n in enumerate(self.shape)])
        return jnp.broadcast_to(self.scale * low, self.shape)

    def added(self) -> jax.Array:
        """The weight as data (rows looked up in an embedding), added up in the base's dtype."""
        return self.w + self.delta(self.dtype, precision=None).astype(self.dtype)

    def dense(self) -> jax.Array:
        """The weight itself, added up in float32 and rounded once to the base's dtype."""
        return (self.w.astype(jnp.float32) + self.delta()).astype(self.dtype)


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
