"""Optimizers whose state exists for the adapters alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from lora_jax.lift import Attached
from lora_jax.tree import Tree


def trainable_mask(tree: Tree) -> Tree:
    """Marks what is trained: the adapters but for what they keep frozen, and nothing of the base.

    Args:
      tree: `attach(params, adapters)`, or a bare tree of adapters.

    Returns:
      The same tree with `True` at the adapters' arrays and `False` elsewhere.
    """
    if not isinstance(tree, Attached):
        return {path: adapter.trained() for path, adapter in tree.items()}
    return dataclasses.replace(
        tree,
        params=jax.tree.map(lambda _: False, tree.params),
        adapters=trainable_mask(tree.adapters),
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


def labels(adapters: Tree) -> Tree:
    """Names every array of the adapters by its role: "a", "b", "m", ...; "frozen" where it is not trained.

    Args:
      adapters: `{path: adapter}`.

    Returns:
      The same tree with a name in place of every array, for `optax.partition`.
    """

    def name(key_path: Any, trained: bool) -> str:
        return key_path[-1].name if trained else "frozen"

    return jax.tree_util.tree_map_with_path(name, trainable_mask(adapters))


def lora_plus(
    make: Callable[[Any], optax.GradientTransformation], rate: Any, adapters: Tree, ratio: float = 16.0
) -> optax.GradientTransformation:
    """LoRA+: a learning rate for `b` that is larger than that of the other factors.

    Args:
      make: makes an optimizer of a learning rate, such as `optax.adam`.
      rate: a learning rate or a schedule.
      adapters: what is trained.
      ratio: λ, how many times larger the rate of `b` is.

    Returns:
      The partitioned optimizer; what is frozen has no state.

    Source: Hayou et al. 2024, arXiv 2402.12354.
    """
    schedule: Callable[[Any], Any] = rate if callable(rate) else optax.constant_schedule(rate)
    roles = labels(adapters)
    groups = {
        role: make((lambda step: ratio * schedule(step)) if role == "b" else rate) for role in jax.tree.leaves(roles)
    }
    return optax.partition({**groups, "frozen": optax.set_to_zero()}, roles)
