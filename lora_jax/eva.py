"""EVA: factors that start from the activations of a calibration batch, and ranks where these vary most."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters import Axes, factor, marked
from lora_jax.factored import Factored
from lora_jax.lift import attach, lift
from lora_jax.methods import LoRA
from lora_jax.spec import Spec, select
from lora_jax.stored import weight
from lora_jax.trace import Sites
from lora_jax.tree import Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Moments:
    """An adapter that changes nothing; its gradient is Σ x xᵀ over the inputs of its weight, [*stacked, *in, D]."""

    moments: jax.Array
    axes: Axes = dataclasses.field(metadata={"static": True})

    def factored(
        self, w: Any, path: str, key: jax.Array | None = None, shared: Mapping[str, Any] | None = None
    ) -> Factored:
        return Factored(weight(w), moments=factor(self.moments, (*self.axes.stacked, *self.axes.inp)), path=path)

    def check(self, path: str, shape: Sequence[int]) -> None:
        pass  # it is made from the shape

    def trained(self) -> _Moments:
        return marked(self)


def second_moments(f: Callable[..., Any], params: Tree, *args: Any, sites: Sites, paths: Sequence[str]) -> dict:
    """Σ x xᵀ over the inputs x of some weights, in one pass through the function and its scans.

    Args:
      f: a function whose every product with these weights is a `dot_general`.
      params: its parameters.
      *args: a calibration batch.
      sites: from `trace`.
      paths: of the weights.

    Returns:
      `{path: [*stacked, D, D]}`, float32, where D is the size of the weight's input.

    Raises:
      LiftError: if a weight is used in another way.
    """
    probes = {}
    for path in paths:
        site = sites[path]
        stacked, inp = (tuple(site.shape[axis] for axis in axes) for axes in site.axes[:2])
        probes[path] = _Moments(jnp.zeros((*stacked, *inp, math.prod(inp))), site.axes)

    def total(probes: dict[str, _Moments]) -> jax.Array:
        outputs = jax.tree.leaves(lift(f)(attach(params, probes), *args))
        return sum((jnp.sum(y.astype(jnp.float32)) for y in outputs), jnp.zeros(()))

    found = {path: probe.moments for path, probe in jax.jit(jax.grad(total))(probes).items()}
    return {path: x.reshape(*x.shape[: len(sites[path].axes.stacked)], -1, x.shape[-1]) for path, x in found.items()}


def eva(f: Callable[..., Any], params: Tree, *args: Any, sites: Sites, spec: Spec, limit: float = 2.0) -> dict:
    """LoRA adapters whose `a` is the inputs' leading principal directions, `b` zero, and ranks redistributed.

    Directions of all chosen weights compete by the share of their input's variance that they explain, in such a way
    that as many are chosen as the spec's ranks add up to, the leading one of every matrix among them. The layers of
    a stack have one array, so its rank is that of the layer with most, and the columns that another layer does not
    get are zero and stay so.

    Args:
      f: as for `trace`.
      params: its parameters.
      *args: a calibration batch.
      sites: from `trace`.
      spec: LoRA rules; their ranks are the average ones.
      limit: ρ: no weight gets more than this times its rule's rank.

    Returns:
      `{path: adapter}`, as `init`.

    Raises:
      ValueError: if a rule is of another method.
      LiftError: if a weight is used other than in products.

    Source: Paischer et al. 2024, arXiv 2410.07170.
    """
    chosen = select(sites, spec)
    for path, rule in chosen.items():
        if rule.method != "lora" or rule.share:
            raise ValueError(f"EVA starts LoRA's factors; the rule of {path!r} has method {rule.method!r}")
    moments = second_moments(f, params, *args, sites=sites, paths=list(chosen))
    directions, shares = {}, {}
    for path, rule in chosen.items():
        most = min(int(limit * rule.rank_at(sites[path])), *sites[path].dimensions()[1:])
        values, vectors = jnp.linalg.eigh(moments[path])
        explained = np.maximum(np.asarray(values, np.float64), 0)
        explained /= np.maximum(explained.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
        shares[path] = explained[..., ::-1][..., :most].copy()
        shares[path][..., 0] = np.inf  # without any direction a matrix could not learn
        directions[path] = vectors[..., ::-1][..., :most]
    budget = sum(shares[path][..., 0].size * rule.rank_at(sites[path]) for path, rule in chosen.items())
    ranked = np.sort(np.concatenate([share.ravel() for share in shares.values()]))[::-1]
    least = ranked[min(budget, len(ranked)) - 1]
    adapters = {}
    for path, rule in chosen.items():
        kept = shares[path] >= least
        rank = int(kept.sum(-1).max())
        site = sites[path]
        stacked, inp, out = (tuple(site.shape[axis] for axis in axes) for axes in site.axes)
        a = jnp.where(kept[..., None, :rank], directions[path][..., :rank], 0).reshape(*stacked, *inp, rank)
        adapters[path] = LoRA(a, jnp.zeros((*stacked, *out, rank)), rule.scale_at(site), site.axes, rule.dropout)
    return adapters
