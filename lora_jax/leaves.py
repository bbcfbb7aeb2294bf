"""Training a leaf itself: all of it (a bias, a norm, a head), or some rows of an embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import Axes, factor, fits, marked
from lora_jax.factored import Factored
from lora_jax.stored import weight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf that is trained as a whole, in place of the base's.

    Attributes:
      value: float32, of the leaf's shape; the leaf's values at first.
    """

    value: jax.Array

    def factored(
        self, w: Any, path: str, key: jax.Array | None = None, shared: Mapping[str, Any] | None = None
    ) -> Factored:
        """The value in the base's dtype."""
        return Factored(self.value.astype(w.dtype), path=path)

    def check(self, path: str, shape: Sequence[int]) -> None:
        """Raises ValueError unless it has the leaf's shape."""
        everything = tuple(range(len(shape)))
        fits(path, shape, Axes(everything, (), ()), {"value": (self.value, everything)})

    def trained(self) -> Leaf:
        """All of it."""
        return marked(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Some rows of an embedding, trained: W + Σ_i 1[row = rows_i] delta_i, a factored weight like any other.

    Attributes:
      delta: [n, *out], zero at first.
      rows: which n rows.
      axes: as for `LoRA`.
    """

    delta: jax.Array
    rows: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axes: Axes = dataclasses.field(metadata={"static": True})

    def factored(
        self, w: Any, path: str, key: jax.Array | None = None, shared: Mapping[str, Any] | None = None
    ) -> Factored:
        """The weight: one factor selects, the other holds what is added."""
        (table,) = (w.shape[axis] for axis in self.axes.inp)
        chosen = (jnp.arange(table)[:, None] == jnp.array(self.rows)).astype(self.delta.dtype)
        return Factored(
            weight(w),
            (factor(chosen, self.axes.inp),),
            (factor(jnp.moveaxis(self.delta, 0, -1), self.axes.out),),
            path=path,
        )

    def check(self, path: str, shape: Sequence[int]) -> None:
        """Raises ValueError unless the rows are the embedding's."""
        fits(path, shape, self.axes, {"delta": (jnp.moveaxis(self.delta, 0, -1), self.axes.out)}, len(self.rows))
        if max(self.rows) >= shape[self.axes.inp[0]]:
            raise ValueError(f"{path!r} has {shape[self.axes.inp[0]]} rows: there is no row {max(self.rows)} to train")

    def trained(self) -> Rows:
        """What is added."""
        return marked(self)
