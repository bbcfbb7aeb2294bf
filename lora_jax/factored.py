"""A weight kept as a base and a product of two factors, in whatever layout the model has brought it to."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
    """The weight `w + Σ_r a[..., r] b[..., r]`, without the sum being formed.

    Both factors have the axes of `w` and a last one for the rank. An axis that a factor does not depend on has size
    1 there, so the product broadcasts to the shape of `w`. A transposition, a slice or a reshape of the weight is
    then the same operation on each of the three arrays, and no rule needs to know which axes were in, out or stacked.

    Attributes:
      w: the base, of the weight's shape S and dtype.
      a: the first factor, S with some axes 1, then R. γ is multiplied into it.
      b: the second factor, likewise.
      key: a PRNG key for dropout on the input of the adapter, or an array of them over stacked axes (S with all other
        axes 1), or `None` for no dropout.
      path: where the weight stands in the tree, for error messages.
      dropout: the probability that an element of the input is dropped.
    """

    w: jax.Array
    a: jax.Array
    b: jax.Array
    key: jax.Array | None
    path: str = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape S of the weight."""
        return self.w.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the weight."""
        return self.w.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the base."""
        return self.w.dtype

    def has(self, factor: jax.Array, axis: int) -> bool:
        """Whether a factor depends on an axis (of size 1, no factor does)."""
        return factor.shape[axis] != 1

    def delta(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """The product of the factors as one array of the weight's shape, summed over the rank in `dtype`."""
        return jnp.broadcast_to(product(self.a.astype(dtype), self.b.astype(dtype)), self.shape)

    def added(self) -> jax.Array:
        """The weight as data (rows looked up in an embedding), added up in the base's dtype."""
        low = product(self.a.astype(self.dtype), self.b.astype(self.dtype), precision=None)
        return self.w + low.astype(self.dtype)

    def dense(self) -> jax.Array:
        """The weight itself, added up in float32 and rounded once to the base's dtype."""
        return (self.w.astype(jnp.float32) + self.delta()).astype(self.dtype)


def product(a: jax.Array, b: jax.Array, precision: Any = jax.lax.Precision.HIGHEST) -> jax.Array:
    """Sums the product of two broadcast factors over their last axis, the rank, as one matrix product.

    Args:
      a: [..., R], axes of size 1 broadcast against those of `b`.
      b: [..., R], likewise.
      precision: as in `jax.lax.dot_general`; by default float32 arithmetic on every platform.

    Returns:
      Σ_r a[..., r] b[..., r], of the broadcast shape.
    """
    letters = string.ascii_letters[: a.ndim - 1]
    kept_a = [axis for axis in range(a.ndim - 1) if a.shape[axis] != 1]
    kept_b = [axis for axis in range(b.ndim - 1) if b.shape[axis] != 1]
    kept = [axis for axis in range(a.ndim - 1) if axis in kept_a or axis in kept_b]

    def names(axes: Sequence[int]) -> str:
        return "".join(letters[axis] for axis in axes)

    summed = jnp.einsum(
        f"{names(kept_a)}Z,{names(kept_b)}Z->{names(kept)}",
        a.reshape([a.shape[axis] for axis in kept_a] + [a.shape[-1]]),
        b.reshape([b.shape[axis] for axis in kept_b] + [b.shape[-1]]),
        precision=precision,
    )
    return summed.reshape([max(m, n) for m, n in zip(a.shape[:-1], b.shape[:-1], strict=True)])


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
