"""What every adaptation method provides, and what they share in providing it."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import jax

from lora_jax.factored import Factor, Factored

SHARED = "/"  # an entry of the adapters that begins so belongs to no one weight


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


@dataclasses.dataclass(frozen=True)
class Along:
    """What an array of an adapter has for axes: the weight's, in the array's own order, and `None` for the rank."""

    axes: tuple[int | None, ...]


class Adapter(Protocol):
    """What every method provides."""

    @property
    def axes(self) -> Axes:
        """The axes of the weight, by their use."""
        ...

    def factored(self, w: Any, path: str, key: jax.Array | None = None, shared: Mapping[str, Any] | None = None) -> Any:
        """The adapted weight (`Factored`), given the base's and what adapters have in common."""
        ...

    def layout(self) -> Self:
        """The adapter with an `Along` in place of every array."""
        ...

    def trained(self) -> Self:
        """The adapter with `True` in place of every array that is trained, and `False` of every other."""
        ...


def weights(
    leaves: Mapping[str, Any], adapters: Mapping[str, Any], key: jax.Array | None = None
) -> dict[str, Factored]:
    """The adapted weights.

    Args:
      leaves: the base's, by path.
      adapters: by path, and what they share.
      key: a PRNG key for dropout, or `None`.

    Returns:
      `{path: weight}`.
    """
    shared = {path: entry for path, entry in adapters.items() if path.startswith(SHARED)}
    own = {path: adapter for path, adapter in adapters.items() if path not in shared}
    return {path: adapter.factored(leaves[path], path, key, shared) for path, adapter in own.items()}


def marked(adapter: Any, frozen: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    """An adapter with `True` for every array, `False` for those in the fields of these names."""
    mark = {field.name: field.name not in frozen for field in dataclasses.fields(adapter)}
    values = {name: jax.tree.map(lambda _: mark[name], getattr(adapter, name)) for name in _data(adapter)}  # noqa: B023
    return dataclasses.replace(adapter, **values)


def _data(adapter: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(adapter) if not field.metadata.get("static")]


def check(adapter: Adapter, path: str, shape: Sequence[int]) -> None:
    """Raises ValueError unless an adapter fits a weight.

    Args:
      adapter: of any method.
      path: the weight's.
      shape: the weight's.
    """
    known = sorted(axis for group in adapter.axes for axis in group) == list(range(len(shape)))
    places = jax.tree.leaves(adapter.layout(), is_leaf=lambda node: isinstance(node, Along))
    arrays = jax.tree_util.tree_leaves_with_path(adapter)
    have = [zip(place.axes, array.shape, strict=False) for place, (_, array) in zip(places, arrays, strict=True)]
    rank = next((n for pairs in have for axis, n in pairs if axis is None), 0)
    for place, (keys, array) in zip(places, arrays, strict=True):
        want = [rank if axis is None else shape[axis] for axis in place.axes if axis is None or axis < len(shape)]
        if list(array.shape) != want or not known:
            name = jax.tree_util.keystr(keys[-1:], simple=True)
            raise ValueError(
                f"the adapter of {path!r} does not fit its weight {list(shape)}: "
                f"{name} is {list(array.shape)}, should be {want}"
            )


def dropout_keys(
    dropout: float, path: str, key: jax.Array | None, stacked: tuple[int, ...], sizes: Sequence[int]
) -> Factor | None:
    """A key for each path and stacked layer; `None` without dropout."""
    if key is None or not dropout:
        return None
    return factor(jax.random.split(fold_path(key, path), tuple(sizes))[..., None], stacked)


def factor(array: jax.Array, axes: tuple[int, ...]) -> Factor:
    """A factor, given in any order of the weight's axes.

    Args:
      array: [*axes, R].
      axes: of the weight.

    Returns:
      The factor, its axes ascending.
    """
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
