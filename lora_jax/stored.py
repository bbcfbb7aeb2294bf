"""A base weight that is stored in another form than the model uses, such as quantised: it becomes an array when needed.

A node of the parameter tree is stored in this sense if it has `shape`, `dtype` and `dequantised()`, and all its arrays
have the weight's leading axes, so that slicing them slices the weight.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Move = Callable[[jax.Array], jax.Array]


def is_stored(node: Any) -> bool:
    """Whether a node of a tree stands for one array that it stores in another form."""
    return hasattr(node, "dequantised")


def abstract(leaf: Any) -> Any:
    """What a function is traced with in place of a leaf: the shape and dtype of what is stored."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_stored(leaf) else leaf


def array(leaf: Any) -> Any:
    """The array that a leaf is, or stands for."""
    return leaf.dequantised() if is_stored(leaf) else leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Deferred:
    """A stored weight, and what the model has done to its layout since: done again each time that it is used.

    Attributes:
      stored: the node of the parameter tree.
      moves: operations on the array, in order.
      layer_moves: the same operations on one layer of the array, as long as each of them leaves the first axis alone;
        `None` after one that does not.
    """

    stored: Any
    moves: tuple[Move, ...] = dataclasses.field(default=(), metadata={"static": True})
    layer_moves: tuple[Move, ...] | None = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in the present layout."""
        return jax.eval_shape(self.value).shape if self.moves else self.stored.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype in the present layout."""
        return jax.eval_shape(self.value).dtype if self.moves else self.stored.dtype

    def moved(self, move: Move, layer: Move | None = None) -> Deferred:
        """The weight after one more operation, and what that is for one of its layers."""
        layers = None if layer is None or self.layer_moves is None else (*self.layer_moves, layer)
        return dataclasses.replace(self, moves=(*self.moves, move), layer_moves=layers)

    def cast(self, dtype: jnp.dtype) -> Deferred:
        """The weight in another dtype."""
        return self.moved(lambda w: w.astype(dtype), lambda w: w.astype(dtype))

    def layer(self, stored: Any) -> Deferred:
        """The weight of one layer, given what is stored of it."""
        return Deferred(stored, self.layer_moves or (), None if self.layer_moves else ())

    def sliced(self, pick: Callable[[jax.Array], jax.Array]) -> Deferred:
        """The weight after an operation on its leading axes alone, done to what is stored."""
        return Deferred(jax.tree.map(pick, self.stored))

    @property
    def by_parts(self) -> bool:
        """Whether all that is stored has the weight's first axis, so that a part along it can be taken of that."""
        return not self.moves and all(x.shape[:1] == self.shape[:1] for x in jax.tree.leaves(self.stored))

    def value(self) -> jax.Array:
        """The array."""
        w = self.stored.dequantised()
        for move in self.moves:
            w = move(w)
        return w


Weight = jax.Array | Deferred


def weight(leaf: Any) -> Weight:
    """A leaf of the parameter tree as a base."""
    return Deferred(jax.lax.stop_gradient(leaf)) if is_stored(leaf) else leaf


def used(f: Callable[..., jax.Array], w: Weight, *data: jax.Array) -> jax.Array:
    """`f(w, *data)`, whose backward pass keeps what is stored and makes the array again.

    Without this the array would be a residual: a float copy of every layer.

    Args:
      f: a function that is linear in the weight.
      w: a weight.
      *data: the other operands.

    Returns:
      The result.
    """
    if not isinstance(w, Deferred):
        return f(w, *data)
    return jax.checkpoint(lambda w, *data: f(w.value(), *data))(w, *data)
