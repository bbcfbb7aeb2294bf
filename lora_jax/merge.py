"""Adding adapters into the base for good, and taking them out again."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from lora_jax.lift import attach
from lora_jax.methods import Adapter
from lora_jax.tree import Tree, leaves_by_path, replace


def merge(params: Tree, adapters: Mapping[str, Adapter]) -> Tree:
    """Adds the adapters to their weights: W + γ a b, summed in float32 and rounded once to W's dtype.

    Args:
      params: the base tree.
      adapters: `{path: adapter}`.

    Returns:
      A plain tree of the same structure, shapes and dtypes. `merge_error` says what the rounding costs, `unmerge`
      goes back.

    Raises:
      ValueError: if an adapter does not fit its weight.
    """
    attach(params, adapters)  # checks that they fit
    leaves = leaves_by_path(params)
    return replace(params, {path: a.factored(leaves[path], path).dense() for path, a in adapters.items()})


def replaced(params: Tree, adapters: Mapping[str, Adapter]) -> dict[str, jax.Array]:
    """The weights that `merge` replaces, to be kept for `unmerge`.

    Args:
      params: the base tree.
      adapters: `{path: adapter}`.

    Returns:
      `{path: weight}`.
    """
    leaves = leaves_by_path(params)
    return {path: leaves[path] for path in adapters}


def unmerge(merged: Tree, adapters: Mapping[str, Adapter], kept: Mapping[str, jax.Array]) -> Tree:
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
    for path, adapter in adapters.items():
        if path not in kept:
            raise ValueError(f"cannot unmerge {path!r}: its original is not among the kept weights")
        again = adapter.factored(kept[path], path).dense()
        if not np.array_equal(np.asarray(again), np.asarray(leaves[path]), equal_nan=False):
            raise ValueError(
                f"cannot unmerge {path!r}: it is not the kept weight plus this adapter, "
                "so it was changed after the merge, or another adapter was merged"
            )
    return replace(merged, {path: kept[path] for path in adapters})


def merge_error(params: Tree, adapters: Mapping[str, Adapter]) -> dict[str, float]:
    """How much of each adapter is lost when it is merged into the base's dtype.

    ‖merged − (W + γ a b)‖ / ‖γ a b‖, in float64.

    Args:
      params: the base tree.
      adapters: `{path: adapter}`.

    Returns:
      `{path: error}`; 0 where the adapter is zero.
    """
    leaves = leaves_by_path(params)
    errors = {}
    for path, adapter in adapters.items():
        weight = adapter.factored(leaves[path], path)
        delta = np.asarray(weight.delta(), np.float64)
        exact = np.asarray(weight.w, np.float64) + delta
        lost = np.linalg.norm(np.asarray(weight.dense(), np.float64) - exact)
        errors[path] = float(lost / norm) if (norm := np.linalg.norm(delta)) else 0.0
    return errors
