"""What adapters change: the size of each delta and how many directions it has, alone and beside another's.

Of low-rank deltas Δ = γ a b everything comes from the factors, through QR decompositions; Δ is not formed.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import deltas
from lora_jax.adapters import SHARED
from lora_jax.interop import merged
from lora_jax.interop.portable import low_rank

Adapters = Mapping[str, Any]


class Change(NamedTuple):
    """What an adapter does to each matrix of a weight: S of them, one for each layer (and expert).

    Attributes:
      kind: the method's name.
      rank: of the factors; 0 where there are none.
      scale: γ.
      norms_S: ‖Δ‖.
      relative_S: ‖Δ‖/‖W‖.
      effective_S: exp of the entropy of Δ's singular values divided by their sum; NaN where Δ is zero or not low-rank.

    Source: Roy and Vetterli 2007, "The effective rank".
    """

    kind: str
    rank: int
    scale: float
    norms_S: np.ndarray
    relative_S: np.ndarray
    effective_S: np.ndarray


class Likeness(NamedTuple):
    """Two changes Δ and Δ' of each matrix of a weight.

    Attributes:
      cosine_S: ⟨Δ, Δ'⟩/(‖Δ‖‖Δ'‖), NaN where one is zero.
      distance_S: ‖Δ' − Δ‖/‖Δ‖.
      inputs_S: the mean squared cosine of the principal angles between the spaces that the two read from: 1 where one
        lies in the other, 0 where they are orthogonal; NaN where one is not low-rank.
      outputs_S: the same of those that they write to.
    """

    cosine_S: np.ndarray
    distance_S: np.ndarray
    inputs_S: np.ndarray
    outputs_S: np.ndarray


def changes(adapters: Adapters, base: Mapping[str, Any]) -> dict[str, Change]:
    """What each adapter does to its weight.

    Args:
      adapters: `{path: adapter}`.
      base: the weights, by path.

    Returns:
      `{path: change}`.
    """
    found = {}
    for path, adapter in adapters.items():
        if path.startswith(SHARED):
            continue
        leaf, kind = base[path], type(adapter).__name__
        lora = low_rank(path, adapters, leaf.shape)
        if lora is None:
            pairs = [(np.linalg.norm(w), np.linalg.norm(delta)) for w, delta in _dense(path, adapters, leaf)]
            whole, norms = np.array(pairs).T
            found[path] = Change(kind, 0, 1.0, norms, norms / whole, np.full(len(norms), np.nan))
            continue
        s_SR = np.asarray(_spectrum(*deltas.matrices(deltas.folded(lora))))
        norms = np.linalg.norm(s_SR, axis=-1)
        whole = np.concatenate(
            [_norms(merged.values(leaf, place), len(lora.axes.stacked) - len(place)) for place in _layers(path, leaf)]
        )
        found[path] = Change(kind, lora.rank, lora.scale, norms, norms / whole, effective_rank(s_SR))
    return found


def effective_rank(s_SR: np.ndarray) -> np.ndarray:
    """exp(−Σ p log p) of singular values, p = s/Σ s; NaN where they are all zero."""
    total = s_SR.sum(-1, keepdims=True)
    p = np.divide(s_SR, total, out=np.zeros_like(s_SR), where=total > 0)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), -1)
    return np.where(total[..., 0] > 0, np.exp(entropy), np.nan)


def likeness(path: str, leaf: Any, left: Adapters, right: Adapters) -> Likeness:
    """Compares two adapters of a weight.

    Args:
      path: the weight's.
      leaf: the weight.
      left: adapters, of which one is Δ.
      right: adapters, of which one is Δ'.

    Returns:
      What the two have in common.
    """
    one, two = (low_rank(path, adapters, leaf.shape) for adapters in (left, right))
    if one is None or two is None:
        pairs = zip(*(_dense(path, adapters, leaf) for adapters in (left, right)), strict=True)
        flat = [(np.ravel(x), np.ravel(y)) for (_, x), (_, y) in pairs]
        dots, first, second = np.array([(x @ y, x @ x, y @ y) for x, y in flat], np.float64).T
        angles = [np.full(len(flat), np.nan)] * 2
    else:
        (a, b), (c, d) = (deltas.matrices(deltas.folded(lora)) for lora in (one, two))
        dots, first, second = (np.asarray(_inner(*four)) for four in ((a, b, c, d), (a, b, a, b), (c, d, c, d)))
        angles = [np.asarray(x) for x in _overlaps(a, b, c, d)]
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = dots / np.sqrt(first * second)
        distance = np.sqrt(np.maximum(first + second - 2 * dots, 0) / first)
    return Likeness(cosine, distance, *angles)


def _layers(path: str, leaf: Any) -> list[tuple[int, ...]]:
    return [(layer,) for layer in range(leaf.shape[0])] if path.startswith("layers/") else [()]


def _dense(path: str, adapters: Adapters, leaf: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The weight and its change, of each layer."""
    shared = {name: entry for name, entry in adapters.items() if name.startswith(SHARED)}
    for place in _layers(path, leaf):
        before, after, _ = merged.dense(path, leaf, adapters[path], shared, place)
        yield before, after - before


def _norms(w: np.ndarray, more: int) -> np.ndarray:
    """Of each matrix in a layer, where `more` axes, of experts, lead to them."""
    return np.linalg.norm(w.reshape(math.prod(w.shape[:more]), -1).astype(np.float64), axis=-1)


@jax.jit
def _spectrum(a_SDR: jax.Array, b_SFR: jax.Array) -> jax.Array:
    r_a, r_b = (jnp.linalg.qr(factor, mode="r") for factor in (a_SDR, b_SFR))
    return jnp.linalg.svd(deltas.product(r_a, r_b.mT), compute_uv=False)


@jax.jit
def _inner(a_SDR: jax.Array, b_SFR: jax.Array, c_SDR: jax.Array, d_SFR: jax.Array) -> jax.Array:
    """⟨a bᵀ, c dᵀ⟩ = Σ (aᵀc) ∘ (bᵀd)."""
    return jnp.sum(deltas.product(a_SDR.mT, c_SDR) * deltas.product(b_SFR.mT, d_SFR), (-2, -1))


@jax.jit
def _overlaps(*factors: jax.Array) -> list[jax.Array]:
    """The likeness of the spaces that two deltas read from, and of those that they write to."""
    (u, v, n), (x, y, m) = (_spaces(*pair) for pair in (factors[:2], factors[2:]))
    shared = [jnp.sum(jnp.square(deltas.product(p.mT, q)), (-2, -1)) for p, q in ((u, x), (v, y))]
    return [total / jnp.minimum(n, m) for total in shared]


def _spaces(a_SDR: jax.Array, b_SFR: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Singular vectors of a bᵀ, zeros where a singular value is none, and how many there are."""
    (q_a, r_a), (q_b, r_b) = jnp.linalg.qr(a_SDR), jnp.linalg.qr(b_SFR)
    u, s, v = jnp.linalg.svd(deltas.product(r_a, r_b.mT), full_matrices=False)
    real = s > 1e-6 * s[..., :1]
    u, v = (deltas.product(q, x) * real[..., None, :] for q, x in ((q_a, u), (q_b, v.mT)))
    return u, v, real.sum(-1)
