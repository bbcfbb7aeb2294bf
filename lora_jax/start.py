"""Making adapters: what each method starts from, and on which weights it works."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.adapters import fold_path
from lora_jax.bottleneck import Bottleneck
from lora_jax.inits import DECOMPOSITIONS, INITIALISERS, Decomposition
from lora_jax.leaves import Leaf, Rows
from lora_jax.methods import IA3, PROJECTIONS, AdaLoRA, DoRA, LoRA, Projections, VeRA
from lora_jax.spec import Rule, Spec, select
from lora_jax.stored import array
from lora_jax.trace import Site, Sites
from lora_jax.tree import Tree, leaves_by_path


def init(key: jax.Array, params: Tree, sites: Sites, spec: Spec) -> dict[str, Any]:
    """Makes the adapters a spec asks for. The lifted function is at first the function itself.

    For LoRA, `a` is random and `b` zero; for an embedding, whose input selects a row of `a`, `b` is normal and `a` zero
    (as in PEFT). Every leaf's key is folded from its path, so one adapter does not depend on which others there are.

    Args:
      key: a PRNG key.
      params: the base tree; only shapes are read, but by methods that start from its values (DoRA, PiSSA, OLoRA, and
        leaves that are trained whole).
      sites: from `trace`.
      spec: which weights, and at which rank.

    Returns:
      `{path: adapter}`, a pytree whose leaves are float32; with VeRA also `"/vera"`, what its adapters share.

    Raises:
      ValueError: if a rule matches nothing, a rank is larger than the matrix, or a method does not work on a weight.
    """
    chosen = select(sites, spec)
    leaves = leaves_by_path(params)
    adapters = {
        path: MAKERS[rule.method](fold_path(key, path), sites[path], rule, leaves.get(path))
        for path, rule in chosen.items()
    }
    wide = [(sites[path].dimensions(), rule.rank) for path, rule in chosen.items() if rule.method == "vera"]
    if wide:
        shapes = [(max(dimensions[side] for dimensions, _ in wide), wide[0][1]) for side in (1, 2)]
        draws = zip(jax.random.split(fold_path(key, PROJECTIONS)), shapes, strict=True)
        # As PEFT draws them: kaiming uniform over the rank for what follows it.
        a, b = (_kaiming(k, shape, fan) for (k, shape), fan in zip(draws, (shapes[0][0], shapes[1][1]), strict=True))
        adapters[PROJECTIONS] = Projections(a, b)
    return adapters


def _kaiming(key: jax.Array, shape: tuple[int, int], fan_in: int) -> jax.Array:
    return jax.random.uniform(key, shape, jnp.float32, -1, 1) * math.sqrt(3 / fan_in)


class _Shapes(NamedTuple):
    stacked: tuple[int, ...]
    inp: tuple[int, ...]
    out: tuple[int, ...]


def _shapes(site: Site) -> _Shapes:
    return _Shapes(*(tuple(site.shape[axis] for axis in axes) for axes in site.axes))


def decomposed(decomposition: Decomposition, w: jax.Array, site: Site, rule: Rule) -> tuple[jax.Array, jax.Array]:
    """Factors taken from every matrix of a weight, one after the other.

    Args:
      decomposition: of one matrix.
      w: the weight.
      site: where it stands.
      rule: its rule.

    Returns:
      a [*stacked, *in, R] and b [*stacked, *out, R].
    """
    stacked, inp, out = _shapes(site)
    rank, scale = rule.rank_at(site), rule.scale_at(site)
    w_SDF = w.transpose([axis for axes in site.axes for axis in axes]).astype(jnp.float32)
    w_SDF = w_SDF.reshape(-1, math.prod(inp), math.prod(out))
    a, b = jax.lax.map(lambda w_DF: decomposition(w_DF, rank, scale), w_SDF)
    return a.reshape(*stacked, *inp, rank), b.reshape(*stacked, *out, rank)


def _lora(key: jax.Array, site: Site, rule: Rule, leaf: Any, frozen: tuple[str, ...] = ()) -> LoRA:
    stacked, inp, out = _shapes(site)
    rank = rule.rank_at(site)
    common = (rule.share, site.main.experts if rule.share else ())
    each = tuple(site.shape[axis] for axis in site.axes.stacked if axis not in common[1])
    shape_a = (*(each if rule.share == "a" else stacked), *inp, rank)
    shape_b = (*(each if rule.share == "b" else stacked), *out, rank)
    start = None
    if site.kind == "embedding":
        a, b = jnp.zeros(shape_a), jax.random.normal(key, shape_b)
    elif rule.init in DECOMPOSITIONS:
        a, b = decomposed(DECOMPOSITIONS[rule.init], array(leaf), site, rule)
        start = (a.copy(), b.copy())  # a and its start are donated apart
    else:
        a, b = INITIALISERS[rule.init](key, shape_a, math.prod(inp)), jnp.zeros(shape_b)
    return LoRA(a, b, rule.scale_at(site), site.axes, rule.dropout, start, frozen, common)


def _lora_fa(key: jax.Array, site: Site, rule: Rule, leaf: Any) -> LoRA:
    return _lora(key, site, rule, leaf, frozen=("a",))


def _dora(key: jax.Array, site: Site, rule: Rule, leaf: Any) -> DoRA:
    stacked, inp, out = site.axes
    norm = jnp.sqrt(jnp.sum(jnp.square(array(leaf).astype(jnp.float32)), inp))
    left = sorted((*stacked, *out))
    return DoRA(_lora(key, site, rule, leaf), norm.transpose([left.index(axis) for axis in (*stacked, *out)]))


def _adalora(key: jax.Array, site: Site, rule: Rule, leaf: Any) -> AdaLoRA:
    stacked, inp, out = _shapes(site)
    rank = rule.rank_at(site)
    key_a, key_b = jax.random.split(key)
    a = 0.02 * jax.random.normal(key_a, (*stacked, *inp, rank))
    b = 0.02 * jax.random.normal(key_b, (*stacked, *out, rank))
    return AdaLoRA(a, jnp.zeros((*stacked, rank)), b, rule.scale_at(site), site.axes, rule.dropout)


def _vera(key: jax.Array, site: Site, rule: Rule, leaf: Any) -> VeRA:
    stacked, _, out = _shapes(site)
    return VeRA(jnp.full((*stacked, rule.rank), 0.1), jnp.zeros((*stacked, *out)), site.axes, rule.dropout)


def _ia3(key: jax.Array, site: Site, rule: Rule, leaf: Any) -> IA3:
    stacked, inp, out = _shapes(site)
    return IA3(jnp.ones((*stacked, *(out if rule.side == "out" else inp))), site.axes, rule.side)


def _bottleneck(key: jax.Array, site: Site, rule: Rule, leaf: Any) -> Bottleneck:
    stacked, _, out = _shapes(site)
    shape = (*stacked, *out, rule.rank)
    return Bottleneck(INITIALISERS[rule.init](key, shape, math.prod(out)), jnp.zeros(shape), site.axes)


def _full(key: jax.Array, site: Site, rule: Rule, leaf: Any) -> Leaf:
    # A copy: the base is never donated with what is trained.
    return Leaf(jnp.array(array(leaf), jnp.float32, copy=True))


def _rows(key: jax.Array, site: Site, rule: Rule, leaf: Any) -> Rows:
    return Rows(jnp.zeros((len(rule.rows), *_shapes(site).out)), rule.rows, site.axes)


MAKERS: Mapping[str, Callable[[jax.Array, Site, Rule, Any], Any]] = {
    "lora": _lora,
    "lora-fa": _lora_fa,
    "dora": _dora,
    "adalora": _adalora,
    "vera": _vera,
    "ia3": _ia3,
    "bottleneck": _bottleneck,
    "full": _full,
    "rows": _rows,
}
