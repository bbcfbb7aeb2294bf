"""Which adapters may be combined, and those of one weight brought together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import jax.numpy as jnp
from jax.core import Tracer

from lora_jax.adapters import Adapter
from lora_jax.methods import LoRA

Adapters = Mapping[str, Adapter]
Weighted = list[tuple[LoRA, float]]
_UNDERSTOOD = ("a", "b", "scale", "axes", "dropout", "start", "frozen", "common")


def understood(path: str, adapter: Adapter) -> LoRA:
    """The adapter, if its delta is γ a b and nothing else.

    Args:
      path: where its weight stands, for the error.
      adapter: of any method.

    Returns:
      `adapter`.

    Raises:
      ValueError: if it is of another method, or has a field that is not known here and may change the delta.
    """
    way_out = "only a LoRA's a b can be combined: merge it into its base, and extract the difference of the two"
    if type(adapter) is not LoRA:
        raise ValueError(f"the adapter of {path!r} is a {type(adapter).__name__}; {way_out}")
    for field in dataclasses.fields(adapter):
        value = getattr(adapter, field.name)
        plain = value is field.default or (isinstance(value, bool | int | float | str) and value == field.default)
        if field.name not in _UNDERSTOOD and not plain:
            raise ValueError(f"the adapter of {path!r} has {field.name!r}; {way_out}")
    return adapter


def checked(path: str, adapter: Adapter) -> LoRA:
    """The adapter, if it is a LoRA whose numbers are finite, as far as they are known yet.

    Args:
      path: where its weight stands, for the error.
      adapter: of any method.

    Returns:
      `adapter`.

    Raises:
      ValueError: if it is not.
    """
    lora = understood(path, adapter)
    starts = zip(("start of a", "start of b"), lora.start or (), strict=False)
    for name, factor in (("a", lora.a), ("b", lora.b), *starts):
        if not isinstance(factor, Tracer) and not jnp.isfinite(factor).all():
            raise ValueError(f"{name} of the adapter of {path!r} {list(factor.shape)} is not finite everywhere")
    if not math.isfinite(lora.scale):
        raise ValueError(f"the scale of the adapter of {path!r} is {lora.scale}")
    return lora


def written_out(path: str, adapter: Adapter) -> LoRA:
    """The same delta as γ a b of two float32 factors that have every stacked axis, with no start.

    Args:
      path: where its weight stands, for the error.
      adapter: of any method.

    Returns:
      An adapter, of the ranks of `a` and of its start together, and with the factor that all experts share repeated.

    Raises:
      ValueError: as `checked`, or if the factors do not fit each other.
    """
    lora = checked(path, adapter)
    factors = [jnp.asarray(factor, jnp.float32) for factor in (lora.a, lora.b)]
    if lora.start is not None:
        a0, b0 = (jnp.asarray(factor, jnp.float32) for factor in lora.start)
        factors = [jnp.concatenate(pair, -1) for pair in zip(factors, (a0, -b0), strict=True)]
    stacked, inp, out = lora.axes
    n, (which, shared) = len(stacked), lora.common
    places = [stacked.index(axis) for axis in shared]
    a, b = (jnp.expand_dims(x, places) if name == which else x for name, x in zip("ab", factors, strict=True))
    fits = (a.ndim, b.ndim, a.shape[-1]) == (n + len(inp) + 1, n + len(out) + 1, b.shape[-1])
    if not fits or any(a.shape[i] != b.shape[i] for i in range(n) if i not in places):
        raise ValueError(
            f"the factors of {path!r}, {list(lora.a.shape)} and {list(lora.b.shape)}, do not fit {lora.axes}; "
            "the k-th of a stack of adapters is jax.tree.map(lambda x: x[k], stack)"
        )
    stack = [max(sizes) for sizes in zip(a.shape[:n], b.shape[:n], strict=True)]
    a, b = (jnp.broadcast_to(x, (*stack, *x.shape[n:])) for x in (a, b))
    return dataclasses.replace(lora, a=a, b=b, start=None, common=("", ()))


def grouped(
    trees: Iterable[Adapters], weights: Sequence[float] | None = None, shares: bool = False, everywhere: str = ""
) -> dict[str, Weighted]:
    """Brings together the adapters of each path, written out.

    Args:
      trees: K trees of adapters.
      weights: K numbers, or `None` for ones.
      shares: whether the weights are divided by their sum.
      everywhere: the name of the operation, if it needs every path in every tree.

    Returns:
      `{path: [(adapter, weight), ...]}`, with those trees that have the path.

    Raises:
      ValueError: if there is no tree, the weights are not K finite numbers (and shares), an adapter is missing, or it
        cannot be combined with the others of its path.
    """
    trees = list(trees)
    if not trees or not all(isinstance(tree, Mapping) for tree in trees):
        raise ValueError("give a list of trees of adapters, [{path: LoRA}, ...]")
    values = _checked_weights(len(trees), weights, shares)
    found: dict[str, Weighted] = {path: [] for tree in trees for path in tree}
    for i, (tree, value) in enumerate(zip(trees, values, strict=True)):
        for path in found:
            if path in tree:
                found[path].append((written_out(path, tree[path]), value))
            elif everywhere:
                raise ValueError(f"{everywhere} needs the same paths in every tree, but tree {i} has no {path!r}")
    for path, adapters in found.items():
        first, *others = [_weight(adapter) for adapter, _ in adapters]
        for other in others:
            if other != first:
                raise ValueError(f"the adapters of {path!r} are of different weights: {first} and {other}")
    return found


def _checked_weights(n: int, weights: Sequence[float] | None, shares: bool) -> list[float]:
    values = [1.0] * n if weights is None else [float(weight) for weight in weights]
    if len(values) != n:
        raise ValueError(f"{len(values)} weights for {n} trees of adapters: give one for each")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"the weights {values} are not all finite")
    if not shares:
        return values
    if min(values) < 0 or not sum(values):
        raise ValueError(
            f"the weights {values} are no shares of a mean: none may be negative, nor all 0 (add takes any)"
        )
    return [value / sum(values) for value in values]


def _weight(adapter: LoRA) -> str:
    stacked, inp, out = adapter.axes
    a, b = (list(factor.shape[:-1]) for factor in (adapter.a, adapter.b))
    return f"in {a} out {b}, axes {(stacked, inp, out)}"
