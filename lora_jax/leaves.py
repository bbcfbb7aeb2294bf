"""Training a leaf itself: all of it (a bias, a norm, a head), or some rows of an embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.adapters import Along, Axes, factor, marked
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

    @property
    def axes(self) -> Axes:
        """Each stands for itself."""
        return Axes(tuple(range(self.value.ndim)), (), ())

    def layout(self) -> Leaf:
        """As the leaf."""
        return Leaf(Along(self.axes.stacked))  # type: ignore[arg-type]

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
        if max(self.rows) >= table:
            raise ValueError(f"{path!r} has {table} rows: there is no row {max(self.rows)} to train")
        chosen = (jnp.arange(table)[:, None] == jnp.array(self.rows)).astype(self.delta.dtype)
        return Factored(
            weight(w),
            (factor(chosen, self.axes.inp),),
            (factor(jnp.moveaxis(self.delta, 0, -1), self.axes.out),),
            path=path,
        )

    def layout(self) -> Rows:
        """The rows are what the sum of factors runs over."""
        return dataclasses.replace(self, delta=Along((None, *self.axes.out)))

    def trained(self) -> Rows:
        """What is added."""
        return marked(self)
