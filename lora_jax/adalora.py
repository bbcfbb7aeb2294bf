"""AdaLoRA's optimizer: prunes the singular values that matter least, and keeps the directions near orthonormal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.methods import AdaLoRA


class PruningState(NamedTuple):
    """What pruning knows.

    Attributes:
      step: updates made.
      sensitivity: of each adapter, the running mean of |p · dL/dp| over its arrays.
      uncertainty: the running mean of how far that was from its mean.
      inner: the optimizer's state.
    """

    step: jax.Array
    sensitivity: Any
    uncertainty: Any
    inner: Any


def adalora(
    tx: optax.GradientTransformation,
    rank: int,
    start: int,
    end: int,
    every: int = 10,
    beta: float = 0.85,
    orthogonal: float = 0.1,
) -> optax.GradientTransformation:
    """Wraps an optimizer of AdaLoRA adapters: the budget of singular values falls from all to an average rank.

    A triplet (column of `a`, singular value, column of `b`) matters as the sum of the means of its parameters'
    sensitivities times their uncertainties. The budget falls with the cube of the time that is left; the triplets that
    matter least, over all weights and layers, lose their singular value until they matter again; after `end` what is
    pruned stays so.

    The gradient of `orthogonal · Σ ‖aᵀa − I‖² + ‖bᵀb − I‖²`, Frobenius norms, is added.

    Args:
      tx: an optimizer of adapters, all of them `AdaLoRA`.
      rank: how many singular values a matrix keeps on average.
      start: the step at which pruning begins.
      end: the step at which the budget is reached.
      every: steps between prunings in between.
      beta: of the running means.
      orthogonal: the weight of the regulariser.

    Returns:
      A transformation that needs the parameters: `update(gradients, state, adapters)`.

    Raises:
      ValueError: if `start` is not before `end`, a setting is out of range, an adapter is of another method, or `rank`
        leaves nothing to prune.

    Source: Zhang et al. 2023, arXiv 2303.10512.
    """
    if not 0 <= start < end:
        raise ValueError(f"pruning begins at step {start}, which must be before step {end}, where it ends")
    for name, value in (("rank", rank), ("every", every)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), not {beta}")

    def init(adapters: Any) -> PruningState:
        for path, adapter in adapters.items():
            if not isinstance(adapter, AdaLoRA):
                raise ValueError(f"the adapter of {path!r} is {type(adapter).__name__}, not AdaLoRA: nothing to prune")
        values = sum(adapter.e.size for adapter in adapters.values())
        matrices = sum(math.prod(adapter.e.shape[:-1]) for adapter in adapters.values())
        if rank * matrices >= values:
            raise ValueError(f"nothing to prune: rank={rank} keeps all {values / matrices:g} singular values a matrix")
        # Two trees of zeros, so that each can be donated.
        means, spreads = (jax.tree.map(jnp.zeros_like, adapters) for _ in range(2))
        return PruningState(jnp.zeros((), jnp.int32), means, spreads, tx.init(adapters))

    def update(gradients: Any, state: Any, adapters: Any = None) -> tuple[Any, Any]:
        if adapters is None:
            raise ValueError("pruning needs the adapters: update(gradients, state, adapters)")
        now = jax.tree.map(lambda p, g: jnp.abs(p * g), adapters, gradients)
        mean = jax.tree.map(lambda m, x: beta * m + (1 - beta) * x, state.sensitivity, now)
        spread = jax.tree.map(lambda u, x, m: beta * u + (1 - beta) * jnp.abs(x - m), state.uncertainty, now, mean)
        regularised = jax.tree.map(jnp.add, gradients, _orthogonality(adapters, orthogonal))
        updates: Any
        updates, inner = tx.update(regularised, state.inner, adapters)
        step = state.step + 1
        scores = {path: _importance(mean[path], spread[path]) for path in adapters}
        total = sum(score.size for score in scores.values())
        matrices = sum(score.size // score.shape[-1] for score in scores.values())
        left = jnp.clip((end - step) / (end - start), 0, 1)
        keep = jnp.where(step < start, total, rank * matrices + (total - rank * matrices) * left**3).astype(jnp.int32)
        ranked = jnp.sort(jnp.concatenate([score.ravel() for score in scores.values()]))[::-1]
        least = ranked[jnp.clip(keep - 1, 0, total - 1)]
        pruning = (step >= start) & ((step % every == 0) | (step >= end))

        def pruned(path: str) -> AdaLoRA:
            adapter, change = adapters[path], updates[path]
            out = jnp.where(step > end, adapter.e == 0, scores[path] < least)
            return dataclasses.replace(change, e=jnp.where(pruning & out, -adapter.e, change.e))

        return {path: pruned(path) for path in updates}, PruningState(step, mean, spread, inner)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]


def _importance(mean: AdaLoRA, spread: AdaLoRA) -> jax.Array:
    """[*stacked, R]: a singular value's own score and the means of those of its two columns."""
    a, e, b = (getattr(mean, name) * getattr(spread, name) for name in ("a", "e", "b"))
    own = tuple(range(e.ndim - 1, a.ndim - 1)), tuple(range(e.ndim - 1, b.ndim - 1))
    return e + a.mean(own[0]) + b.mean(own[1])


def _orthogonality(adapters: Mapping[str, AdaLoRA], weight: float) -> Any:
    """The gradient of weight · Σ ‖xᵀx − I‖² over both factors of every matrix."""

    def penalty(adapters: Mapping[str, AdaLoRA]) -> jax.Array:
        total = jnp.zeros(())
        for adapter in adapters.values():
            stacked = adapter.e.shape[:-1]
            for x in (adapter.a, adapter.b):
                x_SDR = x.reshape(*stacked, -1, x.shape[-1])
                gram = jnp.einsum("...dr,...ds->...rs", x_SDR, x_SDR)
                total += jnp.sum((gram - jnp.eye(x.shape[-1])) ** 2)
        return weight * total

    return jax.grad(penalty)(adapters)
