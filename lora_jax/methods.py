"""The adaptation methods: each is data that knows which factored weight it makes of a base weight."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lora_jax.factored import Factored


class Axes(NamedTuple):
    """Which axes of a weight its factors share and which they divide among them.

    Attributes:
      stacked: axes that only select (scanned layers, experts): both factors have them.
      inp: axes that are contracted with the data: the factor `a` has them.
      out: axes that are kept: the factor `b` has them.
    """

    stacked: tuple[int, ...]
    inp: tuple[int, ...]
    out: tuple[int, ...]


class Adapter(Protocol):
    """What every method provides."""

    def factored(self, w: jax.Array, path: str, key: jax.Array | None = None) -> Factored:
        """The adapted weight."""
        ...

    def check(self, path: str, shape: Sequence[int]) -> None:
        """Raises ValueError unless the factors fit a weight of this shape."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adaptation: the weight becomes W + γ a b.

    Both factors are float32 whatever the base's dtype, and are cast to the data's dtype where they are used.

    Attributes:
      a: [*stacked, *in, R].
      b: [*stacked, R, *out].
      scale: γ, α/r or α/√r.
      axes: where the stacked, in and out axes are in the weight.
      dropout: the probability with which an element of the adapter's input is dropped while a key is attached.

    Source: Hu et al. 2021, arXiv 2106.09685.
    """

    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})
    axes: Axes = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def rank(self) -> int:
        """The number of columns of `a`."""
        return self.a.shape[-1]

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """`γ a` and `b` in the weight's own layout: its axes (1 where a factor has none), then the rank."""
        stacked, inp, out = self.axes
        n = len(stacked)
        rank_last = jnp.moveaxis(self.b, n, -1)
        return (
            _laid_out(self.a * self.scale, (*stacked, *inp), out),
            _laid_out(rank_last, (*stacked, *out), inp),
        )

    def factored(self, w: jax.Array, path: str, key: jax.Array | None = None) -> Factored:
        """The weight `w + γ a b`; `key` turns dropout on, with a key of its own for each path and stacked layer."""
        a, b = self.factors()
        return Factored(w, a, b, self._keys(path, key), path, self.dropout)

    def check(self, path: str, shape: Sequence[int]) -> None:
        """Raises ValueError unless `a` and `b` fit a weight of this shape."""
        stacked, inp, out = ([shape[axis] for axis in axes if axis < len(shape)] for axes in self.axes)
        want = ([*stacked, *inp, self.rank], [*stacked, self.rank, *out])
        have = (list(self.a.shape), list(self.b.shape))
        if want != have or sorted(axis for axes in self.axes for axis in axes) != list(range(len(shape))):
            raise ValueError(
                f"the adapter of {path!r} does not fit its weight {list(shape)}: "
                f"a is {have[0]}, should be {want[0]}; b is {have[1]}, should be {want[1]}"
            )

    def _keys(self, path: str, key: jax.Array | None) -> jax.Array | None:
        if key is None or not self.dropout:
            return None
        keys = jax.random.split(fold_path(key, path), self.a.shape[: len(self.axes.stacked)])
        return _laid_out(keys[..., None], self.axes.stacked, (*self.axes.inp, *self.axes.out))


def _laid_out(factor: jax.Array, axes: Sequence[int], absent: Sequence[int]) -> jax.Array:
    # The factor's axes are `axes` of the weight, then one more; afterwards all of the weight's, in its order.
    full = jnp.expand_dims(factor, tuple(range(len(axes), len(axes) + len(absent))))
    order = [*axes, *absent]
    return full.transpose(*(order.index(axis) for axis in range(len(order))), len(order))


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """Derives the key of one path, the same in every process and for every set of other paths.

    Args:
      key: a PRNG key.
      path: where a weight stands in its tree.

    Returns:
      `key` with a 32-bit checksum of the path folded in.
    """
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
