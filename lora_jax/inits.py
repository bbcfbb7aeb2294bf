"""Starting values for the factor that does not start at zero."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Initialiser = Callable[[jax.Array, Sequence[int], int], jax.Array]


def uniform(key: jax.Array, shape: Sequence[int], fan_in: int) -> jax.Array:
    """Draws from U(-1/√d_in, 1/√d_in), as PEFT does.

    Args:
      key: a PRNG key.
      shape: the factor's shape, ending in the rank.
      fan_in: d_in, how many inputs each output sums over.

    Returns:
      float32 of that shape.
    """
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def normal(key: jax.Array, shape: Sequence[int], fan_in: int) -> jax.Array:
    """Draws from N(0, 1/d_in): unit variance in gives unit variance out.

    Args:
      key: a PRNG key.
      shape: the factor's shape, ending in the rank.
      fan_in: d_in, how many inputs each output sums over.

    Returns:
      float32 of that shape.
    """
    return jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5


INITIALISERS: dict[str, Initialiser] = {"uniform": uniform, "normal": normal}
