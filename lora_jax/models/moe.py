"""Mixtures of experts: a router sends every token to a few of many MLPs.

Shapes: N tokens, D model, E experts, A active experts of a token, S = N·A rows that experts compute, in G groups of M
rows, each of one expert.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

WEIGHTS = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}
# A group has as many rows as an expert on average, or where these are more than so many, the geometric mean of the two:
# longer groups are filled up with more zeros, shorter ones need their expert's matrices picked more often.
LONGEST = 512
ROOM = 2  # times as many rows as the experts of a device have on average are computed at once

Mlp = Callable[[jax.Array, jax.Array], jax.Array]


class Experts(nnx.Module):
    """x·W with a matrix for every group of rows."""

    def __init__(self, experts: int, shape: tuple[int, int], rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(1, 2, batch_axis=0)
        self.kernel = nnx.Param(init(rngs.params(), (experts, *shape)))

    def __call__(self, x_GMD: jax.Array, expert_G: jax.Array) -> jax.Array:
        """The product, in the dtype of x, of every group with the matrix of its expert."""
        return checkpoint_name(_product(x_GMD, self.kernel[...], expert_G), "kept")


@functools.partial(jax.checkpoint, prevent_cse=False)
def _product(x_GMD: jax.Array, kernel_EDF: jax.Array, expert_G: jax.Array) -> jax.Array:
    # The backward pass picks the matrices again: kept, they would be copies of all experts.
    kernel_GDF = kernel_EDF.at[expert_G].get(mode="clip").astype(x_GMD.dtype)
    return jnp.einsum("GMD,GDF->GMF", x_GMD, kernel_GDF)


def routed(
    mlp: Mlp,
    x_ND: jax.Array,
    scores_NE: jax.Array,
    active: int,
    normalised: bool,
    weights: str = "softmax",
    weighted_inputs: bool = False,
    along: str = "",
) -> jax.Array:
    """Σ over a token's experts e of p_e·mlp_e(x), those of the largest scores, where p is the softmax of the scores.

    Args:
      mlp: (x_GMD, expert_G) -> y_GMD, for groups of rows of one expert each.
      x_ND: tokens.
      scores_NE: what the router says of each expert.
      active: experts of a token, A.
      normalised: the probabilities of those are divided by their sum, as if the softmax were of theirs alone.
      weights: what makes p of the scores, a name of `WEIGHTS`.
      weighted_inputs: the sum is of mlp_e(p_e·x).
      along: an axis of the mesh, within a `shard_map` over it, along which both tokens and experts are divided: `mlp`
        has this device's experts, numbered from 0. Each device computes what the tokens of all ask of these.

    Returns:
      y_ND, in the dtype of x.
    """
    scores_NE, experts = scores_NE.astype(jnp.float32), scores_NE.shape[-1]
    expert_NA = jax.lax.top_k(scores_NE, active)[1]
    p_NA = jnp.take_along_axis(WEIGHTS[weights](scores_NE), expert_NA, axis=-1)
    if normalised:
        p_NA = p_NA / jnp.sum(p_NA, axis=-1, keepdims=True)
    p_NA = p_NA.astype(x_ND.dtype)
    if not along:
        return _computed(mlp, x_ND, expert_NA, p_NA, experts, 1, weighted_inputs).astype(x_ND.dtype)
    devices = jax.lax.axis_size(along)
    x_ND, expert_NA, p_NA = (jax.lax.all_gather(x, along, tiled=True) for x in (x_ND, expert_NA, p_NA))
    expert_NA = expert_NA - experts // devices * jax.lax.axis_index(along)
    y_ND = _computed(mlp, x_ND, expert_NA, p_NA, experts, devices, weighted_inputs)
    return jax.lax.psum_scatter(y_ND.astype(x_ND.dtype), along, tiled=True)


def _computed(
    mlp: Mlp, x_ND: jax.Array, expert_NA: jax.Array, p_NA: jax.Array, experts: int, devices: int, weighted_inputs: bool
) -> jax.Array:
    """Σ over those of a token's experts that are this device's, numbered from 0; float32.

    All tokens may ask for these. What they ask on average, `ROOM` times, is computed at once, and the rest, if there is
    any, by and by.
    """
    rows, own = expert_NA.size, experts // devices
    mean = rows / experts
    each = max(1, math.ceil(math.sqrt(mean * min(mean, LONGEST))))
    expert_G, row_GM, total = _groups(expert_NA.reshape(-1), own, each)
    room = min(len(expert_G), _most(math.ceil(ROOM * rows / devices), own, each))

    def added(y_ND: jax.Array, start: int | jax.Array) -> jax.Array:
        group_G = start + jnp.arange(room)
        own_GM = row_GM.at[group_G].get(mode="fill", fill_value=rows)
        token_GM = own_GM // expert_NA.shape[1]
        p_GM = p_NA.reshape(-1).at[own_GM].get(mode="fill", fill_value=0)[..., None]
        x_GMD = x_ND.at[token_GM].get(mode="fill", fill_value=0)
        y_GMD = mlp(p_GM * x_GMD if weighted_inputs else x_GMD, expert_G.at[group_G].get(mode="clip"))
        y_GMD = y_GMD.astype(jnp.float32)
        if not weighted_inputs:
            y_GMD = p_GM.astype(jnp.float32) * y_GMD
        return y_ND.at[token_GM].add(y_GMD, mode="drop")

    y_ND = added(jnp.zeros(x_ND.shape, jnp.float32), 0)
    starts = jnp.arange(room, len(expert_G), room)
    if not starts.size:
        return y_ND

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def later(y_ND: jax.Array, start: jax.Array) -> tuple[jax.Array, None]:
        return jax.lax.cond(start < total, added, lambda y_ND, _: y_ND, y_ND, start), None

    rest = jax.checkpoint(lambda y_ND: jax.lax.scan(later, y_ND, starts)[0], prevent_cse=False)
    return jax.lax.cond(total > room, rest, lambda y_ND: y_ND, y_ND)


def _groups(expert_S: jax.Array, experts: int, each: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows in groups of `each` of one expert, filled up with none.

    Args:
      expert_S: the expert of every row; those outside 0 ... experts - 1 are in no group.
      experts: how many there are.
      each: rows of a group.

    Returns:
      The expert of every group, its rows, S for none, and how many groups have any.
    """
    S = expert_S.size
    is_SE = expert_S[:, None] == jnp.arange(experts)[None]
    rank_SE = jnp.cumsum(is_SE, axis=0, dtype=jnp.int32)  # of a row among its expert's; a sort takes TPUs longer
    groups_E = -(-rank_SE[-1] // each)
    end_E = jnp.cumsum(groups_E)
    G = _most(S, experts, each)
    place_SE = ((end_E - groups_E) * each - 1)[None] + rank_SE
    outside_S = G * each + jnp.arange(S)
    place_S = jnp.where(is_SE.any(1), jnp.sum(place_SE, 1, where=is_SE), outside_S)
    row_GM = jnp.full(G * each, S).at[place_S].set(jnp.arange(S), mode="drop", unique_indices=True).reshape(G, each)
    expert_G = jnp.minimum(jnp.sum(jnp.arange(G)[:, None] >= end_E[None], axis=1), experts - 1)
    return expert_G, row_GM, end_E[-1]


def _most(rows: int, experts: int, each: int) -> int:
    """How many groups rows can take."""
    return (rows + min(rows, experts) * (each - 1)) // each
