"""The adaptation methods: each is data that knows which factored weight it makes of a base weight."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax

from lora_jax.factored import Factor, Factored


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

    Both end in the rank, so that bringing them into the layout of any weight is a reshape and moves nothing. As
    matrices they are a_DR and b_FR, the transposes of the papers' A and PEFT's B itself.

    Attributes:
      a: [*stacked, *in, R].
      b: [*stacked, *out, R].
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

    def factored(self, w: jax.Array, path: str, key: jax.Array | None = None) -> Factored:
        """The weight `w + γ a b`; `key` turns dropout on, with a key of its own for each path and stacked layer."""
        stacked, inp, out = self.axes
        a, b = _factor(self.a, (*stacked, *inp)), _factor(self.b, (*stacked, *out))
        return Factored(w, a, b, self._keys(path, key), path, self.scale, self.dropout)

    def check(self, path: str, shape: Sequence[int]) -> None:
        """Raises ValueError unless `a` and `b` fit a weight of this shape."""
        stacked, inp, out = ([shape[axis] for axis in axes if axis < len(shape)] for axes in self.axes)
        want = ([*stacked, *inp, self.rank], [*stacked, *out, self.rank])
        have = (list(self.a.shape), list(self.b.shape))
        if want != have or sorted(axis for axes in self.axes for axis in axes) != list(range(len(shape))):
            raise ValueError(
                f"the adapter of {path!r} does not fit its weight {list(shape)}: "
                f"a is {have[0]}, should be {want[0]}; b is {have[1]}, should be {want[1]}"
            )

    def _keys(self, path: str, key: jax.Array | None) -> Factor | None:
        if key is None or not self.dropout:
            return None
        stacked = self.axes.stacked
        return _factor(jax.random.split(fold_path(key, path), self.a.shape[: len(stacked)])[..., None], stacked)


def _factor(array: jax.Array, axes: tuple[int, ...]) -> Factor:
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    if order != list(range(len(axes))):
        array = array.transpose(*order, len(axes))
    return Factor(array, tuple(sorted(axes)))


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """Derives the key of one path, the same in every process and for every set of other paths.

    Args:
      key: a PRNG key.
      path: where a weight stands in its tree.

    Returns:
      `key` with a 32-bit checksum of the path folded in.
    """
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
