"""One training step, compiled: the gradient of a mean over a batch, in however many parts, and the optimizer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.models import partition

Tree = Any


def make_update(
    loss: Callable,
    tree: Callable,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    places: Any = None,
    gather: Callable[[Tree], Tree] = lambda trainable: trainable,
) -> Callable[..., tuple[Tree, Tree, dict[str, jax.Array]]]:
    """Compiles a training step for a loss that is a mean over items: tokens, pairs.

    The gradient is of Σ loss / Σ count over the whole batch. Parts with unequal counts weigh what they have.

    Args:
      loss: `loss(tree, batch)` gives a sum over items, their count, and, if there is more to record, a dict of other
        sums over the same items, and of maxima, whose names end in "_max". A part of a batch is a batch.
      tree: `tree(trainable, base, key)` gives what `loss` takes.
      tx: the optimizer.
      accumulate: parts that a batch is computed in; divides its rows.
      places: shardings of `(trainable, optimizer)`, which they keep; None leaves this to XLA, on one device to no one.
      gather: puts what is trained where it computes, once for all parts; gradients are summed back to `places`.

    Returns:
      `update(trainable, optimizer, base, batch, key)`, which gives the first two anew, and numbers: `loss`, the other
      sums as means, the maxima, `gradient_norm` and, where the batch has `segments`, `tokens`. It takes the memory of
      the first two; the base stays.
    """

    def back(tree: Tree) -> Tree:
        return jax.lax.with_sharding_constraint(tree, places[0]) if places else tree

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=places and (*places, None))
    def update(trainable, optimizer, base, batch, key):
        def total(gathered, part, key):
            value, count, *more = loss(tree(gathered, base, key), jax.tree.map(partition.rows, part))
            return value, (count, {"loss": value, **(more[0] if more else {})})

        def add(gradient, part_and_key):
            now, sums = jax.grad(total, has_aux=True)(gathered, *part_and_key)
            return jax.tree.map(jnp.add, gradient, back(now)), sums

        gathered = gather(trainable)
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        zero = back(jax.tree.map(jnp.zeros_like, trainable))
        gradient, sums = jax.lax.scan(add, zero, (parts, jax.random.split(key, accumulate)))
        counts, sums = sums
        count = counts.sum()
        gradient = jax.tree.map(lambda x: x / count, gradient)
        numbers = {name: x.max() if name.endswith("_max") else x.sum() / count for name, x in sums.items()}
        updates, optimizer = tx.update(gradient, optimizer, trainable)
        numbers |= {"gradient_norm": optax.tree.norm(gradient), "tokens": tokens(batch)}
        return optax.apply_updates(trainable, updates), optimizer, numbers

    return update


def tokens(batch: Tree) -> jax.Array:
    """How many places of a batch hold a token: those whose segment is not 0."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    return sum((jnp.sum(x > 0) for path, x in leaves if "segments" in jax.tree_util.keystr(path)), jnp.zeros((), int))
