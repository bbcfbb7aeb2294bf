"""The deltas Δ = γ a b of adapters as matrices: sums, products, errors, SVD, and merges of dense ones.

Factors are seen as a_SDR and b_SFR, whatever the axes of their weight: S stacked matrices of D inputs and F outputs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Axes
from lora_jax.grouping import Weighted
from lora_jax.methods import LoRA
from lora_jax.stored import array


def check_rank(path: str, rank: int, d_in: int, d_out: int) -> None:
    """Raises ValueError unless a matrix of these dimensions can have this rank."""
    if not 1 <= rank <= min(d_in, d_out):
        raise ValueError(f"no rank {rank} for the matrix {d_in} x {d_out} of {path!r}: choose 1 to {min(d_in, d_out)}")


def matrices(adapter: LoRA) -> tuple[jax.Array, jax.Array]:
    """The factors as a_SDR and b_SFR, without γ."""
    n = len(adapter.axes.stacked)
    layers, rank = math.prod(adapter.a.shape[:n]), adapter.rank
    d_in, d_out = math.prod(adapter.a.shape[n:-1]), math.prod(adapter.b.shape[n:-1])
    return adapter.a.reshape(layers, d_in, rank), adapter.b.reshape(layers, d_out, rank)


def values(leaf: Any) -> np.ndarray:
    """A leaf of a checkpoint as an array, whatever it is stored as."""
    return np.asarray(array(leaf))


def weight_matrices(leaf: Any, axes: Axes) -> jax.Array:
    """A whole weight as w_SDF."""
    weight = jnp.asarray(array(leaf))
    sizes = [math.prod(weight.shape[axis] for axis in group) for group in axes]
    return weight.transpose([axis for group in axes for axis in group]).reshape(sizes)


def refactored(like: LoRA, a_SDR: jax.Array, b_SFR: jax.Array, scale: float) -> LoRA:
    """An adapter of the same weight as another, with these factors."""
    a, b = (new.reshape(*old.shape[:-1], new.shape[-1]) for new, old in ((a_SDR, like.a), (b_SFR, like.b)))
    return dataclasses.replace(like, a=a, b=b, scale=scale)


def folded(adapter: LoRA, weight: float = 1.0) -> LoRA:
    """The delta times a weight with γ = 1: both are multiplied into `b`."""
    return dataclasses.replace(adapter, b=weight * adapter.scale * adapter.b, scale=1.0)


def total(adapters: Weighted) -> LoRA:
    """Σ wₖ Δₖ, by concatenation along the rank."""
    parts = [folded(adapter, weight) for adapter, weight in adapters]
    a, b = jnp.concatenate([part.a for part in parts], -1), jnp.concatenate([part.b for part in parts], -1)
    return dataclasses.replace(parts[0], a=a, b=b)


def product(a_SDR: jax.Array, b_SRF: jax.Array) -> jax.Array:
    """The matrix product, in full precision on every platform."""
    return jnp.matmul(a_SDR, b_SRF, precision=jax.lax.Precision.HIGHEST)


def error(adapter: LoRA, exact: LoRA) -> float:
    """‖Δ' − Δ‖/‖Δ‖ of two adapters of one weight, through QR of their factors; 0 if Δ is zero."""

    whole = total([(exact, 1.0)])
    return ratio(_norm(*matrices(total([(adapter, 1.0), (whole, -1.0)]))), _norm(*matrices(whole)))


@jax.jit
def _norm(a_SDR: jax.Array, b_SFR: jax.Array) -> jax.Array:
    r_a, r_b = (jnp.linalg.qr(factor, mode="r") for factor in (a_SDR, b_SFR))
    return jnp.linalg.norm(product(r_a, r_b.mT))


def ratio(lost: jax.Array, whole: jax.Array) -> float:
    """A relative error, of norms of which there may be one for each layer; 0 where there was nothing to lose."""
    lost_norm, norm = (float(np.linalg.norm(np.asarray(norms, np.float64))) for norms in (lost, whole))
    return lost_norm / norm if norm else math.inf if lost_norm else 0.0


Nearest = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def nearest(delta_SDF: jax.Array, rank: int) -> Nearest:
    """The nearest a bᵀ to dense deltas, by SVD.

    Args:
      delta_SDF: float32.
      rank: R.

    Returns:
      a_SDR, whose columns are orthonormal; b_SFR, whose columns are as long as the singular values; the norms
      ‖Δ − a bᵀ‖ and ‖Δ‖ of each matrix.
    """
    u, s, v = jnp.linalg.svd(delta_SDF, full_matrices=False)
    a, b = u[..., :rank], (s[..., None] * v)[..., :rank, :].mT
    lost, whole = (jnp.linalg.norm(x, axis=(-2, -1)) for x in (delta_SDF - product(a, b.mT), delta_SDF))
    return a, b, lost, whole


@functools.partial(jax.jit, static_argnames="rank")
def reranked(a_SDR: jax.Array, b_SFR: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """The nearest a bᵀ of a lower rank, by SVD of the small matrix between the QR decompositions of both factors."""
    (q_a, r_a), (q_b, r_b) = jnp.linalg.qr(a_SDR), jnp.linalg.qr(b_SFR)
    a, b, *_ = nearest(product(r_a, r_b.mT), rank)
    return product(q_a, a), product(q_b, b)


Merge = Callable[[list[jax.Array], jax.Array, float, Any], jax.Array]


@functools.partial(jax.jit, static_argnames=("merge", "density", "rank"))
def merged(
    merge: Merge,
    factors: list[tuple[jax.Array, jax.Array]],
    weights_K: jax.Array,
    keys: jax.Array | None,
    density: float,
    rank: int,
) -> Nearest:
    """Merges dense deltas and factors the result, one stacked matrix after another: K dense ones exist at a time.

    Args:
      merge: `elected` or `dropped`.
      factors: K pairs a_SDR, b_SFR, with γ in one of them.
      weights_K: of the merge.
      keys: S PRNG keys, or `None`.
      density: of the merge.
      rank: of the result.

    Returns:
      What `nearest` does, with S in front.
    """

    def layer(operands: tuple[list[tuple[jax.Array, jax.Array]], jax.Array | None]):
        factors, key = operands
        return nearest(merge([product(a, b.mT) for a, b in factors], weights_K, density, key), rank)

    return jax.lax.map(layer, (factors, keys))


@functools.partial(jax.jit, static_argnames="rank")
def difference(before_SDF: jax.Array, after_SDF: jax.Array, rank: int) -> Nearest:
    """`nearest` of after − before, one stacked matrix after another, with S in front."""

    def layer(two: tuple[jax.Array, jax.Array]):
        return nearest(two[1].astype(jnp.float32) - two[0].astype(jnp.float32), rank)

    return jax.lax.map(layer, (before_SDF, after_SDF))


def elected(deltas: list[jax.Array], weights_K: jax.Array, density: float, key: None) -> jax.Array:
    """TIES: Σ w Δ over those of the K trimmed deltas that have the sign of their sum, divided by how many these are."""
    del key
    trimmed = jnp.stack([_trimmed(delta, density) for delta in deltas])
    sign = jnp.where(trimmed.sum(0, keepdims=True) >= 0, 1.0, -1.0)
    agrees = jnp.sign(trimmed) == sign
    total = jnp.sum(weights_K[:, None, None] * jnp.where(agrees, trimmed, 0.0), 0)
    return total / jnp.maximum(agrees.sum(0), 1).astype(jnp.float32)


def _trimmed(delta: jax.Array, density: float) -> jax.Array:
    kept = int(density * delta.size)
    if not kept:
        return jnp.zeros_like(delta)
    size = jnp.abs(delta)
    return jnp.where(size >= jnp.sort(size, axis=None)[-kept], delta, 0.0)


def dropped(deltas: list[jax.Array], weights_K: jax.Array, density: float, key: jax.Array) -> jax.Array:
    """DARE: Σ w m ∘ Δ / density with m ~ Bernoulli(density)."""
    keys = jax.random.split(key, len(deltas))
    masks = [jax.random.bernoulli(key, density, delta.shape) for key, delta in zip(keys, deltas, strict=True)]
    kept = [jnp.where(mask, delta, 0.0) / density for mask, delta in zip(masks, deltas, strict=True)]
    return jnp.sum(weights_K[:, None, None] * jnp.stack(kept), 0)
