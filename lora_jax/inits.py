"""Starting values of the factors: random for one of them, or taken from the weight for both."""

from __future__ import annotations

import math
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


def orthogonal(key: jax.Array, shape: Sequence[int], fan_in: int) -> jax.Array:
    """Draws columns that are orthogonal to each other, of the length that `uniform` gives them on average.

    Args:
      key: a PRNG key.
      shape: the factor's shape, ending in the rank.
      fan_in: d_in, how many inputs each output sums over.

    Returns:
      float32 of that shape.
    """
    matrices = jax.nn.initializers.orthogonal()
    stacked = max(1, math.prod(shape[:-1]) // fan_in)
    keys = jax.random.split(key, stacked)
    a_SDR = jax.vmap(lambda k: matrices(k, (math.prod(shape[:-1]) // stacked, shape[-1]), jnp.float32))(keys)
    return (a_SDR * 3**-0.5).reshape(shape)


INITIALISERS: dict[str, Initialiser] = {"uniform": uniform, "normal": normal, "orthogonal": orthogonal}


def pissa(w_DF: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """The largest singular vectors: γ a b is the best approximation of W of this rank.

    Args:
      w_DF: a matrix, float32.
      rank: R.
      scale: γ.

    Returns:
      a_DR and b_FR, each with the roots of the singular values.

    Source: Meng et al. 2024, arXiv 2404.02948.
    """
    u_DR, s_R, v_RF = jnp.linalg.svd(w_DF, full_matrices=False)
    root_R = jnp.sqrt(s_R[:rank] / scale)
    return u_DR[:, :rank] * root_R, v_RF[:rank].T * root_R


def olora(w_DF: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """The first orthonormal output directions of a QR decomposition of Wᵀ.

    Args:
      w_DF: a matrix, float32.
      rank: R.
      scale: γ; as in PEFT, the start is γ a b.

    Returns:
      a_DR, rows of the triangle, and b_FR, orthonormal columns.

    Source: Büyükakyüz 2024, arXiv 2406.01775.
    """
    del scale
    q_FR, r_RD = jnp.linalg.qr(w_DF.T)
    return r_RD[:rank].T, q_FR[:, :rank]


Decomposition = Callable[[jax.Array, int, float], tuple[jax.Array, jax.Array]]
DECOMPOSITIONS: dict[str, Decomposition] = {"pissa": pissa, "olora": olora}
