"""What to adapt and how: rules from patterns to ranks, and the adapters they make."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.inits import INITIALISERS
from lora_jax.lift import Attached, Lifting, run
from lora_jax.methods import LoRA, fold_path
from lora_jax.trace import LINEAR, Site, Sites, table, trace
from lora_jax.tree import Tree, count, nbytes, nearest

_ATTENTION = r"attn|attention|(^|/)(q|k|v|o|qkv|query|key|value|out)(_proj)?(/|$)"
_MLP = r"mlp|ffn|feed_?forward|expert|(^|/)(gate|up|down|gate_up|wi|wo|fc\d?)(_proj)?(_\d)?(/|$)"
PRESETS: dict[str, Callable[[Site], bool]] = {
    "all-linear": lambda site: True,
    "attention": lambda site: bool(re.search(_ATTENTION, site.path)),
    "mlp": lambda site: bool(re.search(_MLP, site.path)) and not re.search(_ATTENTION, site.path),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the weights that a pattern matches get.

    Attributes:
      target: a regular expression searched for in the path, or a preset: "all-linear" (every dense and expert weight
        but the output head), and those of them that belong to "attention" or to the "mlp", judged by their names.
      rank: R, the columns of `a`.
      alpha: α; the scale γ is α/R.
      rslora: whether γ is α/√R instead (arXiv 2312.03732).
      dropout: the probability with which an element of the adapter's input is dropped in training.
      init: the distribution of the factor that does not start at zero, "uniform" or "normal".
    """

    target: str = "all-linear"
    rank: int = 16
    alpha: float = 32.0
    rslora: bool = False
    dropout: float = 0.0
    init: str = "uniform"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank} (target {self.target!r})")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), not {self.dropout} (target {self.target!r})")
        if self.init not in INITIALISERS:
            raise ValueError(f"no initialiser {self.init!r}; there are {', '.join(INITIALISERS)}")

    @property
    def scale(self) -> float:
        """γ, the factor before `a b`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def matches(self, site: Site) -> bool:
        """Whether the rule means this weight."""
        if self.target in PRESETS:
            return site.kind in LINEAR and site.adaptable and not site.head and PRESETS[self.target](site)
        return bool(re.search(self.target, site.path))


class Spec:
    """The user's choice: rules, of which the first that matches a weight decides, and what to leave out.

    `Spec(rank=8)` is short for `Spec(Rule(rank=8))`.

    Args:
      *rules: in order of precedence.
      exclude: regular expressions; a weight whose path one of them matches is not adapted.
      **fields: the fields of a single rule.
    """

    def __init__(self, *rules: Rule, exclude: Sequence[str] = (), **fields: Any):
        if rules and fields:
            raise ValueError(f"give rules or a single rule's fields ({', '.join(fields)}), not both")
        self.rules = rules or (Rule(**fields),)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and (self.rules, self.exclude) == (other.rules, other.exclude)

    def __hash__(self) -> int:
        return hash((self.rules, self.exclude))

    def __repr__(self) -> str:
        rules = ", ".join(map(repr, self.rules))
        return f"Spec({rules}, exclude={self.exclude!r})"


def select(sites: Sites, spec: Spec) -> dict[str, Rule]:
    """Finds the rule of every weight to adapt.

    Args:
      sites: from `trace`.
      spec: the rules.

    Returns:
      `{path: rule}`, in the order of the sites.

    Raises:
      ValueError: if a rule or an exclusion matches nothing, or a rank is larger than the matrix.
    """
    for pattern in spec.exclude:
        if not any(re.search(pattern, path) for path in sites):
            raise ValueError(f"exclude={pattern!r} matches no parameter; nearest: {nearest(pattern, sites)}")
    chosen: dict[str, Rule] = {}
    matched: dict[Rule, list[Site]] = {rule: [] for rule in spec.rules}
    for site in sites.values():
        if any(re.search(pattern, site.path) for pattern in spec.exclude):
            continue
        for rule in spec.rules:
            if rule.matches(site):
                matched[rule].append(site)
                if site.adaptable:
                    chosen[site.path] = rule
                    _check_rank(site, rule)
                break
    for rule, found in matched.items():
        if not any(site.adaptable for site in found):
            raise ValueError(_no_match(rule, found, sites))
    return chosen


def _check_rank(site: Site, rule: Rule) -> None:
    _, d_in, d_out = site.dimensions()
    if rule.rank > min(d_in, d_out):
        raise ValueError(
            f"rank {rule.rank} is larger than the matrix {d_in} x {d_out} of {site.path!r}: "
            f"choose at most {min(d_in, d_out)}, or exclude it"
        )


def _no_match(rule: Rule, found: Sequence[Site], sites: Sites) -> str:
    if found:
        site = found[0]
        return f"target {rule.target!r} matches only {site.path!r} and the like, of kind {site.kind}: nothing to factor"
    if rule.target in PRESETS:
        heads = [site.path for site in sites.values() if site.head]
        hint = f" (the output head {heads[0]!r} is left out: name it to adapt it)" if heads else ""
        linear = [site.path for site in sites.values() if site.kind in LINEAR]
        return f"target {rule.target!r} matches no weight{hint}; linear weights: {', '.join(linear) or 'none'}"
    taken = [path for path in sites if re.search(rule.target, path)]
    if taken:
        return (
            f"target {rule.target!r} matches only weights that an earlier rule or exclude takes, such as {taken[0]!r}"
        )
    return f"target {rule.target!r} matches no parameter; nearest: {nearest(rule.target, sites)}"


def init(key: jax.Array, params: Tree, sites: Sites, spec: Spec) -> dict[str, LoRA]:
    """Makes the adapters a spec asks for. The lifted function is at first the function itself, exactly.

    `a` is random and `b` zero; for an embedding, whose input selects a row of `a`, `b` is normal and `a` zero (as in
    PEFT). Every leaf's key is folded from its path, so one adapter does not depend on which others there are.

    Args:
      key: a PRNG key.
      params: the base tree; only shapes are read.
      sites: from `trace`.
      spec: which weights, and at which rank.

    Returns:
      `{path: adapter}`, a pytree whose leaves are the float32 factors.

    Raises:
      ValueError: if a rule matches nothing, or a rank is larger than the matrix.
    """
    del params  # methods that start from the base's values read it
    return {path: _init_one(key, sites[path], rule) for path, rule in select(sites, spec).items()}


def _init_one(key: jax.Array, site: Site, rule: Rule) -> LoRA:
    stacked, inp, out = (tuple(site.shape[axis] for axis in axes) for axes in site.axes)
    shape_a, shape_b = (*stacked, *inp, rule.rank), (*stacked, *out, rule.rank)
    key = fold_path(key, site.path)
    if site.kind == "embedding":
        a, b = jnp.zeros(shape_a), jax.random.normal(key, shape_b)
    else:
        a, b = INITIALISERS[rule.init](key, shape_a, math.prod(inp)), jnp.zeros(shape_b)
    return LoRA(a, b, rule.scale, site.axes, rule.dropout)


@dataclasses.dataclass(frozen=True)
class Report:
    """What a spec would do to a function, found out without computing anything; printed, a table.

    Attributes:
      sites: every parameter and its use.
      rules: the rule of each weight to adapt.
      adapters: the adapters' shapes.
      base_parameters: how many parameters the base has.
      base_bytes: their size.
      materialised: (path, operation, source line) where a dense sum would be formed.
    """

    sites: Sites
    rules: Mapping[str, Rule]
    adapters: Mapping[str, LoRA]
    base_parameters: int
    base_bytes: int
    materialised: Sequence[tuple[str, str, str]]

    def __str__(self) -> str:
        rows = [("target", "shape", "kind", "rank", "scale", "parameters")]
        for path, rule in self.rules.items():
            site = self.sites[path]
            parameters = f"{count(self.adapters[path]):,}"
            rows.append((path, str(list(site.shape)), site.kind, str(rule.rank), f"{rule.scale:g}", parameters))
        trained, size = count(self.adapters), nbytes(self.adapters)
        lines = [
            table(rows),
            f"{len(self.rules)} targets, {trained:,} adapter parameters ({size / 1e6:.1f} MB), "
            f"{trained / self.base_parameters:.2%} of the base's {self.base_parameters:,} "
            f"({self.base_bytes / 1e6:.1f} MB)",
        ]
        if heads := [site.path for site in self.sites.values() if site.head and site.path not in self.rules]:
            lines.append(f"output head, left out: {', '.join(heads)}")
        lines += [f"materialised: {path} at `{op}`, {where}" for path, op, where in self.materialised]
        return "\n".join(lines)


def report(
    f: Callable[..., Any],
    params: Tree,
    *args: Any,
    spec: Spec,
    materialise: Sequence[str] = (),
    **kwargs: Any,
) -> Report:
    """A dry run: what would be adapted, at what size, and where a dense weight would be formed.

    Args:
      f: a function `f(params, *args, **kwargs)`.
      params: arrays or `jax.ShapeDtypeStruct`s.
      *args: likewise.
      spec: which weights, and at which rank.
      materialise: as for `lift`.
      **kwargs: as `*args`.

    Returns:
      A report to print or to read.

    Raises:
      ValueError: as `init`.
      LiftError: as `lift`.
    """
    sites = trace(f, params, *args, **kwargs)
    adapters = jax.eval_shape(lambda key: init(key, params, sites, spec), jax.random.key(0))
    lifting = Lifting(tuple(materialise))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), adapters)
    jax.eval_shape(lambda adapters: run(f, Attached(params, adapters), args, kwargs, lifting), abstract)
    return Report(sites, select(sites, spec), adapters, count(params), nbytes(params), tuple(lifting.materialised))
