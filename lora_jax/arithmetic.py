"""Operations on adapters: every one is defined by the dense deltas Δ = γ a b that the adapters stand for.

    from lora_jax import arithmetic

    both          = arithmetic.add([maths, code], weights=[1.0, 0.5])  # Δ₁ + Δ₂/2, exactly: the ranks add up
    small, errors = arithmetic.rerank(both, rank=16)                   # its best approximation of rank 16
    bank          = arithmetic.stack([maths, code])                    # for jax.vmap over adapters
    found, errors = arithmetic.extract(base, tuned, sites, spec)       # the adapter between two checkpoints

What is exact, but for float32's rounding, returns adapters and can be jitted. What approximates returns adapters and
their errors, `{path: ‖Δ' − Δ‖/‖Δ‖}`, in Frobenius norms over all stacked layers, 0 where there was nothing to lose.

Trees are `{path: LoRA}`; where one of several has no adapter for a path, its Δ there is zero, unless a function says
otherwise. Results are float32; but for `scale`'s, starts are written into their factors, and factors that experts share
are repeated. What has nothing to do with Δ, such as dropout, they take from the first adapter. Factors that are NaN or
infinite (where not traced), and adapters of other methods, are a ValueError everywhere.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import deltas
from lora_jax.adapters import check, fold_path
from lora_jax.grouping import Adapters, checked, grouped, understood, written_out
from lora_jax.methods import LoRA
from lora_jax.spec import Spec
from lora_jax.start import init
from lora_jax.trace import Sites
from lora_jax.tree import Tree, leaves_by_path, nearest

Approximation = tuple[dict[str, LoRA], dict[str, float]]


def scale(adapters: Adapters, factor: float) -> dict[str, LoRA]:
    """Multiplies the deltas by a number: c Δ. Only γ changes.

    Args:
      adapters: `{path: LoRA}`.
      factor: c.

    Returns:
      Adapters of the same ranks.

    Raises:
      ValueError: if `factor` is NaN or infinite.
    """
    if not math.isfinite(factor):
        raise ValueError(f"adapters cannot be scaled by {factor}")
    loras = {path: checked(path, adapter) for path, adapter in adapters.items()}
    return {path: dataclasses.replace(x, scale=float(factor) * x.scale) for path, x in loras.items()}


def add(trees: Iterable[Adapters], weights: Sequence[float] | None = None) -> dict[str, LoRA]:
    """Adds deltas up, Σ wₖ Δₖ, exactly: the factors are concatenated along the rank, with γ and w in `b`.

    Args:
      trees: K trees of adapters, of any ranks and scales.
      weights: w, 1 each unless given; negative ones subtract.

    Returns:
      Adapters of every path in any tree, whose ranks are the sums of the ranks; `rerank` makes them smaller.

    Raises:
      ValueError: if the adapters of a path are not of one weight, or there are not K finite weights.
    """
    return {path: deltas.total(found) for path, found in grouped(trees, weights).items()}


def average(trees: Iterable[Adapters], weights: Sequence[float] | None = None) -> dict[str, LoRA]:
    """The mean of deltas, Σ wₖ Δₖ / Σ wₖ, exactly, as `add`.

    Args:
      trees: K trees of adapters, of any ranks and scales.
      weights: w, not negative, such as each client's number of examples; equal unless given.

    Returns:
      Adapters of every path in any tree, whose ranks are the sums of the ranks.

    Raises:
      ValueError: as `add`, or if a weight is negative or all are zero.

    Source: Wang et al. 2024 (FLoRA), arXiv 2409.05976.
    """
    return {path: deltas.total(found) for path, found in grouped(trees, weights, shares=True).items()}


def fedavg(trees: Iterable[Adapters], weights: Sequence[float] | None = None) -> Approximation:
    """Federated averaging of the factors themselves: mean(a) mean(b), of the same rank.

    This is not the mean of the deltas, unless all `a` or all `b` are the same: the errors say how far it is from it.

    Args:
      trees: K trees of adapters with the same paths, ranks and scales.
      weights: as for `average`.

    Returns:
      The adapters, and their errors as an approximation of `average(trees, weights)`.

    Raises:
      ValueError: as `average`, or if paths, ranks or scales differ.

    Source: McMahan et al. 2017, arXiv 1602.05629; the error, Sun et al. 2024, arXiv 2403.12313.
    """
    adapters, errors = {}, {}
    for path, found in grouped(trees, weights, shares=True, everywhere="fedavg").items():
        ranks, scales = [x.rank for x, _ in found], [x.scale for x, _ in found]
        if len(set(ranks)) > 1 or len(set(scales)) > 1:
            raise ValueError(
                f"fedavg needs factors of one rank and scale, but {path!r} has ranks {ranks} and scales {scales}; "
                "average takes any"
            )
        mean_a, mean_b = sum(w * x.a for x, w in found), sum(w * x.b for x, w in found)
        adapters[path] = dataclasses.replace(found[0][0], a=mean_a, b=mean_b)
        errors[path] = deltas.error(adapters[path], deltas.total(found))
    return adapters, errors


def stack(trees: Iterable[Adapters]) -> dict[str, LoRA]:
    """Puts K trees of adapters into one, on a new leading axis of every factor, exactly.

    `jax.vmap(f, in_axes=(0, None))(stack(trees), x)` runs them all over one base; `jax.tree.map(lambda x: x[k], bank)`
    is the k-th again. Smaller ranks are filled up with zeros; where scales differ they go into `b`.

    Args:
      trees: K trees of adapters with the same paths.

    Returns:
      Adapters whose factors are [K, *stacked, *in, R] and [K, *stacked, *out, R].

    Raises:
      ValueError: if paths differ, the adapters of a path are not of one weight, or their dropout differs.
    """
    bank = {}
    for path, found in grouped(trees, everywhere="stack").items():
        first, rank = found[0][0], max(x.rank for x, _ in found)
        if len(dropouts := {x.dropout for x, _ in found}) > 1:
            raise ValueError(f"a stack has one dropout, but the adapters of {path!r} have {sorted(dropouts)}")
        if len({x.scale for x, _ in found}) > 1:
            found = [(deltas.folded(x), w) for x, w in found]
        a, b = (jnp.stack([_padded(getattr(x, name), rank) for x, _ in found]) for name in "ab")
        bank[path] = dataclasses.replace(first, a=a, b=b, scale=found[0][0].scale)
    return bank


def _padded(factor: jax.Array, rank: int) -> jax.Array:
    return jnp.pad(factor, [(0, 0)] * (factor.ndim - 1) + [(0, rank - factor.shape[-1])])


def rerank(adapters: Adapters, rank: int) -> Approximation:
    """The nearest deltas of a lower rank: SVD of γ a b through QR of `a` and of `b`, without forming it.

    It costs O((d_in + d_out) R²). In the result the columns of `a` are orthonormal, the lengths of those of `b` are the
    singular values of Δ/γ, in descending order, and γ is as it was.

    Args:
      adapters: `{path: LoRA}`.
      rank: at most this; an adapter that has less keeps its rank.

    Returns:
      The adapters, and their errors.

    Raises:
      ValueError: if `rank` is less than 1 or larger than a matrix.
    """
    new, errors = {}, {}
    for path, adapter in adapters.items():
        old = written_out(path, adapter)
        a, b = deltas.matrices(old)
        deltas.check_rank(path, rank, a.shape[-2], b.shape[-2])
        a, b = deltas.reranked(a, b, rank)
        new[path] = deltas.refactored(old, a, b, old.scale)
        errors[path] = deltas.error(new[path], old)
    return new, errors


def extract(base: Tree, tuned: Tree, sites: Sites, spec: Spec) -> Approximation:
    """The adapters nearest to the difference of two checkpoints: Δ = tuned − base, by SVD, a matrix at a time.

    Args:
      base: the parameters before.
      tuned: the parameters after, a tree of the same paths and shapes.
      sites: from `trace`.
      spec: which weights, and at which rank and scale.

    Returns:
      The adapters, and the errors: of each of them, and 1.0 for any other leaf that differs, which is lost.

    Raises:
      ValueError: if the trees do not have the same paths and shapes, the sites or the spec do not fit them, or a
        difference is not finite.
    """
    before, after = leaves_by_path(base), leaves_by_path(tuned)
    for path in before | after:
        shapes = [list(leaves[path].shape) if path in leaves else "missing" for leaves in (before, after)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{path!r} is {shapes[0]} in the base, {shapes[1]} in the tuned checkpoint: no difference")
    adapters, errors = {}, {}

    def shapes_of(key: jax.Array) -> dict[str, LoRA]:
        loras = {path: understood(path, x) for path, x in init(key, base, sites, spec).items()}
        return {path: written_out(path, dataclasses.replace(x, start=None)) for path, x in loras.items()}

    for path, like in jax.eval_shape(shapes_of, jax.random.key(0)).items():
        if path not in before:
            raise ValueError(f"no parameter {path!r} in these checkpoints; nearest: {nearest(path, before)}")
        check(like, path, before[path].shape)
        two = [deltas.weight_matrices(leaves[path], like.axes) for leaves in (before, after)]
        a, b, lost, whole = deltas.difference(*two, like.rank)
        adapters[path] = deltas.refactored(like, a, b / like.scale, like.scale)
        errors[path] = deltas.ratio(lost, whole)
        if not math.isfinite(errors[path]):
            raise ValueError(f"the two checkpoints' difference at {path!r} is not finite everywhere")
    for path, leaf in before.items():
        if path not in adapters and np.any(deltas.values(leaf) != deltas.values(after[path])):
            errors[path] = 1.0
    return adapters, errors


def ties(
    trees: Iterable[Adapters], rank: int, density: float = 0.2, weights: Sequence[float] | None = None
) -> Approximation:
    """TIES: trim, elect signs, and take the mean of those that agree, on the dense deltas of one matrix at a time.

    Of each Δₖ the `density` largest elements are kept; an element's sign is that of their sum over k; the result is
    Σ wₖ Δₖ over the n that have that sign, divided by n; then factored by SVD. This is PEFT's `ties_svd`: it trims each
    matrix by itself, where the paper trims all of a model's together, and the weights have no vote on the sign.

    Args:
      trees: K trees of adapters, of any ranks and scales.
      rank: of the result.
      density: the fraction of each matrix's elements to keep, in (0, 1].
      weights: w, 1 each unless given.

    Returns:
      Adapters of every path in any tree, and their errors as an approximation of the merged deltas.

    Raises:
      ValueError: as `add`, if `rank` is less than 1 or larger than a matrix, or `density` is out of range.

    Source: Yadav et al. 2023, arXiv 2306.01708.
    """
    return _merged(deltas.elected, trees, rank, density, weights, None)


def dare(
    key: jax.Array, trees: Iterable[Adapters], rank: int, density: float, weights: Sequence[float] | None = None
) -> Approximation:
    """DARE: drop elements at random, rescale the others, and add up, on the dense deltas of one matrix at a time.

    Σ wₖ mₖ ∘ Δₖ / density, mₖ ~ Bernoulli(density), then factored by SVD: PEFT's `dare_linear_svd`.

    Args:
      key: a PRNG key; the masks of a path do not depend on which other paths there are.
      trees: K trees of adapters, of any ranks and scales.
      rank: of the result.
      density: the probability with which an element is kept, 1 − p of the paper, in (0, 1].
      weights: w, 1 each unless given.

    Returns:
      Adapters of every path in any tree, and their errors as an approximation of the merged deltas.

    Raises:
      ValueError: as `ties`.

    Source: Yu et al. 2023, arXiv 2311.03099.
    """
    return _merged(deltas.dropped, trees, rank, density, weights, key)


def _merged(
    merge: deltas.Merge,
    trees: Iterable[Adapters],
    rank: int,
    density: float,
    weights: Sequence[float] | None,
    key: jax.Array | None,
) -> Approximation:
    if not 0 < density <= 1:
        raise ValueError(f"density is the fraction of elements to keep, in (0, 1], not {density}")
    adapters, errors = {}, {}
    for path, found in grouped(trees, weights).items():
        factors = [deltas.matrices(deltas.folded(x)) for x, _ in found]
        layers, d_in, _ = factors[0][0].shape
        deltas.check_rank(path, rank, d_in, factors[0][1].shape[1])
        keys = None if key is None else jax.random.split(fold_path(key, path), layers)
        weights_K = jnp.asarray([w for _, w in found], jnp.float32)
        a, b, lost, whole = deltas.merged(merge, factors, weights_K, keys, float(density), rank)
        adapters[path], errors[path] = deltas.refactored(found[0][0], a, b, 1.0), deltas.ratio(lost, whole)
    return adapters, errors
