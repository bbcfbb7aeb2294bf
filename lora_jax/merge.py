"""Adding adapters into the base for good, and taking them out again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from lora_jax.adapters import SHARED, Adapter, weights
from lora_jax.factored import Factored
from lora_jax.lift import attach
from lora_jax.stored import array, is_stored
from lora_jax.tree import Tree, leaves_by_path, replace


def merge(params: Tree, adapters: Mapping[str, Adapter], full_precision: bool = False) -> Tree:
    """Adds the adapters to their weights: W + γ a b, summed in float32 and rounded once to W's dtype.

    Args:
      params: the base tree.
      adapters: `{path: adapter}`.
      full_precision: makes arrays of quantised weights; otherwise they are quantised again, which loses more than
        rounding does (`merge_error` says how much).

    Returns:
      A plain tree of the same structure, shapes and dtypes. `merge_error` says what the rounding costs, `unmerge`
      goes back.

    Raises:
      ValueError: if an adapter does not fit its weight, is not linear, or is not finite.
    """
    merged = {path: weight.dense() for path, weight in _checked(params, adapters).items()}
    if not full_precision:
        leaves = leaves_by_path(params)
        merged = {path: _like(leaves[path], w) for path, w in merged.items()}
    return replace(params, merged)


def replaced(params: Tree, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """The weights that `merge` replaces, to be kept for `unmerge`.

    Args:
      params: the base tree.
      adapters: `{path: adapter}`.

    Returns:
      `{path: weight}`.
    """
    leaves = leaves_by_path(params)
    return {path: leaves[path] for path in adapters if not path.startswith(SHARED)}


def unmerge(merged: Tree, adapters: Mapping[str, Adapter], kept: Mapping[str, Any]) -> Tree:
    """Takes adapters out of a merged tree, bit for bit: it puts back what `merge` replaced.

    Subtracting γ a b again would not do: in bfloat16 it changes a quarter of the weights.

    Args:
      merged: the tree that `merge` returned.
      adapters: the adapters that were merged.
      kept: `replaced(params, adapters)`, from before.

    Returns:
      The base tree.

    Raises:
      ValueError: if a weight was not kept, or is not what merging `kept` gives: going back would lose something.
    """
    leaves = leaves_by_path(merged)
    for path in adapters:
        if path not in kept and not path.startswith(SHARED):
            raise ValueError(f"cannot unmerge {path!r}: its original is not among the kept weights")
    for path, weight in weights(kept, adapters).items():
        again = weight.dense()
        again = _like(kept[path], again) if is_stored(leaves[path]) else again
        if not _equal(again, leaves[path]):
            raise ValueError(
                f"cannot unmerge {path!r}: it is not the kept weight plus this adapter, "
                "so it was changed after the merge, or another adapter was merged"
            )
    return replace(merged, {path: kept[path] for path in adapters if not path.startswith(SHARED)})


def merge_error(params: Tree, adapters: Mapping[str, Adapter]) -> dict[str, float]:
    """How much of each adapter is lost when it is merged into the base's dtype, or into its codes.

    ‖merged − exact‖ / ‖exact − W‖, in float64, where exact is W + γ a b.

    Args:
      params: the base tree.
      adapters: `{path: adapter}`.

    Returns:
      `{path: error}`; 0 where the adapter changes nothing.

    Raises:
      ValueError: as `merge`.
    """
    leaves = leaves_by_path(params)
    errors = {}
    for path, weight in _checked(params, adapters).items():
        exact = np.asarray(weight.value(), np.float64) + np.asarray(weight.delta(), np.float64)
        gain = weight.resolved().gain
        exact = exact if gain is None else exact * np.asarray(gain.expanded(exact.ndim)[..., 0], np.float64)
        change = np.linalg.norm(exact - np.asarray(array(leaves[path]), np.float64))
        lost = np.linalg.norm(np.asarray(array(_like(leaves[path], weight.dense())), np.float64) - exact)
        errors[path] = float(lost / change) if change else 0.0
    return errors


def _checked(params: Tree, adapters: Mapping[str, Adapter]) -> dict[str, Factored]:
    attach(params, adapters)  # checks that they fit
    for path, adapter in adapters.items():
        values = [leaf for leaf in jax.tree.leaves(adapter) if not isinstance(leaf, Tracer)]
        if not all(np.isfinite(leaf).all() for leaf in values):
            raise ValueError(f"the adapter of {path!r} has values that are not finite: it would spoil its weight")
    return weights(leaves_by_path(params), adapters)


def _like(leaf: Any, w: jax.Array) -> Any:
    """`w` stored as a leaf is, and where it is: the compiler may have placed the sum elsewhere."""

    def placed(x: jax.Array, old: Any) -> jax.Array:
        known = isinstance(old, jax.Array) and not isinstance(old, Tracer)
        return jax.device_put(x, old.sharding) if known else x

    return jax.tree.map(placed, leaf.requantised(w) if is_stored(leaf) else w, leaf)


def _equal(x: Any, y: Any) -> bool:
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return all(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=False) for a, b in pairs)
