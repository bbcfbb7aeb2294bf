"""Mixtures of experts: a router sends every token to a few of many MLPs.

Shapes: N tokens, D model, E experts, A active experts of a token, M = N·A rows that experts compute.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

WEIGHTS = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}


class Experts(nnx.Module):
    """x·W with a matrix for every group of rows."""

    def __init__(self, experts: int, shape: tuple[int, int], rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(1, 2, batch_axis=0)
        self.kernel = nnx.Param(init(rngs.params(), (experts, *shape)))

    def __call__(self, x_MD: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """The product, in the dtype of x, whose rows stand expert by expert, `sizes_E` of each."""
        return checkpoint_name(jax.lax.ragged_dot(x_MD, self.kernel[...].astype(x_MD.dtype), sizes_E), "kept")


def routed(
    mlp: Callable[[jax.Array, jax.Array], jax.Array],
    x_ND: jax.Array,
    scores_NE: jax.Array,
    active: int,
    normalised: bool,
    weights: str = "softmax",
    weighted_inputs: bool = False,
) -> jax.Array:
    """Σ over a token's experts e of p_e·mlp_e(x), those of the largest scores, where p is the softmax of the scores.

    Args:
      mlp: (x_MD, sizes_E) -> y_MD, for rows that stand expert by expert.
      x_ND: tokens.
      scores_NE: what the router says of each expert.
      active: experts of a token, A.
      normalised: the probabilities of those are divided by their sum, as if the softmax were of theirs alone.
      weights: what makes p of the scores, a name of `WEIGHTS`.
      weighted_inputs: the sum is of mlp_e(p_e·x).

    Returns:
      y_ND, in the dtype of x.
    """
    scores_NE = scores_NE.astype(jnp.float32)
    expert_NA = jax.lax.top_k(scores_NE, active)[1]
    p_NA = jnp.take_along_axis(WEIGHTS[weights](scores_NE), expert_NA, axis=-1)
    if normalised:
        p_NA = p_NA / jnp.sum(p_NA, axis=-1, keepdims=True)
    expert_M = expert_NA.reshape(-1)
    order_M = jnp.argsort(expert_M)
    p_NA, x_MD = p_NA.astype(x_ND.dtype), x_ND[order_M // active]
    if weighted_inputs:
        x_MD, p_NA = p_NA.reshape(-1, 1)[order_M] * x_MD, jnp.ones_like(p_NA)
    y_MD = mlp(x_MD, jnp.bincount(expert_M, length=scores_NE.shape[-1]))
    y_NAD = y_MD[jnp.argsort(order_M)].reshape(*p_NA.shape, -1)
    return jnp.einsum("NA,NAD->ND", p_NA, y_NAD)
