"""Optimizers whose state exists for the adapters alone."""

from __future__ import annotations

import dataclasses

import jax
import optax

from lora_jax.lift import Attached
from lora_jax.tree import Tree


def trainable_mask(tree: Tree) -> Tree:
    """Marks what LoRA trains: the adapters, and nothing of the base.

    Args:
      tree: `attach(params, adapters)`, or a bare tree of adapters.

    Returns:
      The same tree with `True` at the adapters' arrays and `False` elsewhere.
    """
    if not isinstance(tree, Attached):
        return jax.tree.map(lambda _: True, tree)
    return dataclasses.replace(
        tree,
        params=jax.tree.map(lambda _: False, tree.params),
        adapters=jax.tree.map(lambda _: True, tree.adapters),
        key=None if tree.key is None else False,
    )


def optimizer(tx: optax.GradientTransformation, mask: Tree) -> optax.GradientTransformation:
    """Restricts an optimizer to the leaves a mask selects.

    The others get an update of zero and no state. Masking alone would pass their gradients through as updates.
    It is for users who keep one tree; who differentiates the adapters alone can give `tx` the adapters.

    Args:
      tx: any optax transformation.
      mask: booleans, from `trainable_mask`.

    Returns:
      A transformation over the whole tree.
    """
    frozen = jax.tree.map(lambda keep: not keep, mask)
    return optax.transforms.selective_transform(tx, freeze_mask=frozen)
